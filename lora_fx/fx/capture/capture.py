"""Capture: any traceable model as graphs, one program for each mode, dtype and set of arguments.

A `Captured` holds the weightless source, the skeleton and the programs traced so far. What was
not traced yet is traced when it is first asked for.
"""

from __future__ import annotations

import contextlib
import copy
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Parity, sizes_text
from lora_fx.conditions import Condition
from lora_fx.errors import CaptureError, LoraFxError, expect, one_line
from lora_fx.fx import quantised_parameters
from lora_fx.fx.capture import call, trace
from lora_fx.fx.capture.agreement import Agreement, drawn_calls, sizes_of
from lora_fx.fx.capture.call import Called, Door, Requested, Signature, program_key
from lora_fx.fx.capture.quantised_layers import plain_layers
from lora_fx.fx.capture.trace import Pinned, RootModule, Traced
from lora_fx.fx.dotted_names import all_tensors, parameter_of
from lora_fx.fx.fake_tensors import FakeTensorMode, is_fake
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.skeleton import Skeleton
from lora_fx.fx.symbolic_sizes import ShapeEnv
from lora_fx.fx.tensors import AdapterTensors
from lora_fx.fx.trees import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from lora_fx.inputs import SIZES, Dynamic, Inputs, Named, default_dynamic, merge_dynamic
from lora_fx.patching import patched
from lora_fx.progress import stage
from lora_fx.text import Json

MOST_PATHS = 8
"""Graphs of one call: a model that takes another path at every size is refused from then on."""


@dataclass
class ModelSource:
    """The code of a model without its weights.

    Attributes:
        module: A copy whose tensors are fake, or the model itself where it cannot be copied.
        mode: The mode of the fake tensors; None when `module` is the user's own.
        method: The name of a bound method that is captured; empty where the module is called.
        why: The reason why it could not be copied, and what follows.
        copies: The same in other dtypes, made on first use.
    """

    module: nn.Module
    mode: FakeTensorMode | None = None
    method: str = ""
    why: str = ""
    copies: dict[torch.dtype, ModelSource] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSource:
        """Copy a model without its weights; where it cannot be copied, take it as it is."""
        if isinstance(model, Called):
            bound = getattr(model.function, "__self__", None)
            if not isinstance(bound, nn.Module):
                return cls(model)
            return cls(*weightless(bound), str(getattr(model.function, "__name__", "forward")))
        try:
            return cls(*weightless(model))
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
            why = f"{type(model).__name__} cannot be copied ({one_line(e, 80)})"
            return cls(model, why=f"{why}: captures trace the model itself, in its own dtype only")

    @property
    def forward(self) -> Callable[..., Any]:
        """What a capture calls."""
        named: Any = getattr(self.module, self.method or "forward")
        return named if self.method else _hooked(self.module)

    def in_dtype(self, dtype: torch.dtype | None, base: torch.dtype | None) -> ModelSource:
        """The source with its floating tensors in another dtype.

        A graph cannot be converted: both casts of an RMSNorm read float32, and only one of them
        follows the model. Traced again in the new dtype, the numbers are the original's.
        """
        if dtype is None or dtype == base:
            return self
        if self.mode is None:
            raise LoraFxError(
                f"this model was captured as it is, in {base}, and cannot be traced in {dtype}",
                "convert the original first, then capture it",
            )
        if dtype not in self.copies:
            fake = weightless(self.module, dtype, self.mode)
            self.copies[dtype] = ModelSource(*fake, self.method)
        return self.copies[dtype]


class Captured:
    """A model as graphs: one for each mode, dtype and set of arguments, traced on first use.

    Attributes:
        inputs: The signature: names, dtypes and dimensions of the example's tensors.
        pinned: Dimensions that were asked to be dynamic and that the model fixed.
        notes: What had to be said on the way.
        quantised: The user's own module where that has quantised layers; `model` is another then.
        adapter: What a file's branches hold; None for a model with source.
        repeat: Blocks that repeat are traced once, and the graph compared with the model.
        compared: Where such graphs were compared with it, and how far they were off.
        tokenizer_folder: The folder of its tokenizer, of a model that was opened by name.
    """

    adapter: Adapter | None = None
    quantised: nn.Module | None = None
    repeat = True
    compared: tuple[Parity, ...] = ()
    idle: frozenset[object] | None = None
    tokenizer_folder: Path | None = None
    _limits_known = False
    live = False  # True where the model itself trains, and the graph shows its targets

    def __init__(
        self,
        model: object,
        args: Sequence[object] = (),
        kwargs: Named | None = None,
        dynamic: Dynamic | None = None,
        static: Sequence[str] = (),
        *,
        repeat: bool = True,
    ) -> None:
        expect(args, (tuple, list), "args", "a tuple", "args=(x,), or kwargs={'x': x}")
        expect({} if kwargs is None else kwargs, Mapping, "kwargs", "a dict", "kwargs={'x': x}")
        expect(dynamic or {}, Mapping, "dynamic", "a dict", "dynamic={'x': {0: 'batch'}}")
        own = call.as_module(model)
        self.model, said = plain_layers(own, base_dtype(own))
        self.quantised = None if self.model is own else own
        forward: Any = self.model.forward if isinstance(model, nn.Module) else model
        self.signature = Signature(forward)
        self.repeat = repeat
        self.source = ModelSource.of(self.model)
        self.base_dtype = base_dtype(self.model)
        self.notes: list[str] = [*said, *filter(None, [self.source.why])]
        try:
            self.named = self.signature.bind(tuple(args), dict(kwargs or {}))
        except TypeError as e:
            raise LoraFxError(
                f"the example inputs do not fit {type(self.model).__name__}.forward: {e}",
                f"its signature is forward{self.signature.signature}",
            ) from e
        given, spec = tree_flatten(self.named)
        self.named = tree_unflatten(leaves := call.apart(given), spec)
        if not any(isinstance(x, torch.Tensor) for x in leaves):
            raise LoraFxError(
                "no example input is a tensor",
                f"pass args or kwargs for forward{self.signature.signature}",
            )
        self.inputs: Inputs = call.describe(self.named)
        self.requested: Requested = merge_dynamic(
            self.inputs, default_dynamic(self.inputs), dynamic, static
        )
        self.inputs = self.inputs.with_dims(self.requested)
        self.tracings: dict[tuple[object, ...], list[Traced]] = {}
        self._digests: dict[str, dict[str, bytes]] = {}
        self.unproven: dict[str, Json] = {}
        """Sizes → a row of `unproven[]`, for those that a proof had to leave out."""

    def __repr__(self) -> str:
        """The model's class, and the signature with its dimensions."""
        inputs = ", ".join(f"{r['name']}: {r['dtype']} {r['shape']}" for r in self.inputs.to_json())
        return f"{type(self).__name__}({type(self.model).__name__}, {inputs})"

    def fix_sizes(self) -> None:
        """Trace from now on at the sizes of the example: half the time, where nothing else runs."""
        self.requested = {}
        self.inputs = self.inputs.with_dims({})

    @property
    def pinned(self) -> list[Pinned]:
        """The dimensions that the eval graph was asked to keep free and could not."""
        return self.traced(False, self.named).pinned

    @property
    def recorded(self) -> bool:
        """Whether the eval graph is one recorded run, which has the branches of the base."""
        return any(pin.rung == "recorded" for pin in self.pinned)

    @property
    def recorded_in_training(self) -> bool:
        """Whether a train graph was traced that is one recorded run, and is not the eval graph."""

        def of_example(training: bool) -> list[Traced]:
            key = (training, False, self.base_dtype, *self._example_key)
            return self.tracings.get(key, [])[:1]

        evals = of_example(False)
        apart = [t for t in of_example(True) if all(t is not other for other in evals)]
        return any(pin.rung == "recorded" for traced in apart for pin in traced.pinned)

    @property
    def ranges(self) -> tuple[Condition, ...]:
        """The sizes, each once, at which the path that was captured is the one that is taken."""
        door = self.traced(False, self.named).door
        told = (c for c in door.conditions if not c.demanded or any(c.bounds()))
        rows: dict[str, Condition] = {}
        for c in (c for c in told if not self.inputs.implied(c)):
            row = c.to_json()
            size = self.inputs.symbol(str(row["input"]), int(row["dim"]))  # that inputs share
            rows.setdefault(str({**row, "input": size, "dim": size, "line": ""}), c)
        return tuple(rows.values())

    @property
    def eval(self) -> fx.GraphModule:
        """The eval graph as a GraphModule over the model's tensors; outputs are flat."""
        return self._graph_module(False)

    @property
    def train(self) -> fx.GraphModule:
        """The train graph as a GraphModule over the model's tensors; outputs are flat."""
        return self._graph_module(True)

    def _graph_module(self, training: bool) -> fx.GraphModule:
        self.allows(training, "update")
        return self.fx_graph(training, self.model).module()

    def _tensors(self, traced: Traced) -> dict[str, Any]:
        # what the weightless source holds in the place of the model's tensors is fake
        return traced.constants | all_tensors(self.model) | traced.bodies

    def allows(self, training: bool, norm_stats: str = "frozen") -> None:
        """Raise LoraFxError where a mode cannot be run: a file may hold the other one only."""

    def fx_graph(self, training: bool = False, root: nn.Module | None = None) -> FxGraph:
        """A fresh copy of a mode's graph, as passes see it.

        Args:
            training: The mode.
            root: The tree that holds the tensors, and that passes edit. None makes one which shares
                the storage of the parameters, so that the user's module stays as it is.
        """
        traced = self.traced(training, self.named)
        if root is None:
            root = Skeleton(lambda name: nn.Module(), flags=True).of(self.model)
        return traced.fx_graph(root, training)

    def traced(
        self,
        training: bool,
        named: Named,
        dtype: torch.dtype | None = None,
        *,
        portable: bool = False,
    ) -> Traced:
        """The cleaned graph for a mode, a set of arguments, their sizes and a base dtype.

        A portable one has its experts batched: see lora_fx.fx.capture.trace.

        Raises:
            SizeError: The model does not run at these sizes, or no graph of it holds for them.
        """
        leaves, example = tree_leaves(dict(named)), named is self.named
        of_call = self._example_key if example else program_key(named, leaves)
        key = (training, portable, dtype or self.base_dtype, *of_call)
        held = self.tracings.setdefault(key, [])
        others = self.tracings.get((not training, *key[1:]), [])
        new = partial(self._new, training, dtype=dtype, portable=portable)
        if not held:  # the example's path comes first, whatever is called first
            first = self.named if of_call == self._example_key else named
            held.append(others[0] if others and others[0].modeless else new(first))
        more = [t for t in others[1:] if t.modeless]
        found = next((t for t in [*held, *more] if example or t.door.admits(leaves)), None)
        if found is None:
            found = self._elsewhere(held, named, partial(new, named))
        if all(found is not t for t in held):
            held.append(found)
        return found

    @cached_property
    def _example_key(self) -> tuple[object, ...]:
        return program_key(self.named, tree_leaves(dict(self.named)))

    def _elsewhere(
        self, held: Sequence[Traced], named: Named, new: Callable[..., Traced]
    ) -> Traced:
        """The graph at sizes where those so far do not hold: another path of the model's code."""
        leaves = tree_leaves(dict(named))
        refused = held[0].door.refused(leaves)
        assert refused is not None
        if len(held) >= MOST_PATHS or not self._another(held[0].door, leaves):
            raise refused
        try:  # a free size is never 1 in an export: there the size is part of the path
            found = new(fixed=trace.ones_of(named, self.requested))
        except CaptureError as e:
            raise refused from e
        if not found.door.admits(leaves):
            raise refused
        return found

    def paths(self, training: bool, dtype: torch.dtype | None) -> list[tuple[Named, Traced]]:
        """The paths of the model's code that sizes decide, each with a call; the example's first.

        From each one goes on outside each of its conditions and fixed sizes. Where a loop over the
        steps fixes a size, another one is fixed too, and not worth a place of its own.
        """
        found: list[tuple[Named, Traced]] = [(self.named, self.traced(training, self.named, dtype))]
        for named, traced in found:
            fixed = traced.door.fixed(self.requested)
            pins = [Condition(f"s0 == {n}", (("s0", *size),)) for size, n in fixed.items()]
            for condition in (*traced.door.conditions, *pins):
                given = None if condition.demanded else self._beyond(condition, named, traced.door)
                if given is None or len(found) == MOST_PATHS:
                    continue
                with contextlib.suppress(LoraFxError):  # the model does not run there
                    other = self.traced(training, given, dtype)
                    own = other.door.fixed(self.requested).items() if condition in pins else ()
                    lone = any(n != 1 and fixed.get(size) != n for size, n in own)
                    if not lone and all(other is not t for _, t in found):
                        found.append((given, other))
        return found

    def _beyond(self, condition: Condition, named: Named, door: Door) -> Named | None:
        """A call like `named` that breaks a condition of a door and no other, at size 1 at last."""
        tensors = {n: x for n, x in call.leaves_of(named) if isinstance(x, torch.Tensor)}
        rest = [c for c in door.conditions if c is not condition]
        dims = trace.less(self.requested, door.fixed(self.requested).keys() - condition.about)
        base: dict[str, int] = {}
        for name, symbols in dims.items():
            for d, symbol in symbols.items():
                base[symbol] = max(base.get(symbol, 0), tensors[name].shape[d])
        known = self.bounded_inputs().specs
        specs = tuple(replace(s, shape=tuple(tensors[s.name].shape)) for s in known)
        for least in (2, 1):
            more = [Condition(f"s0 >= {least}", (("s0", *size),)) for size in condition.about]
            inputs = Inputs(specs, (*rest, *more)).with_dims(dims)
            outside = inputs.outside(condition, base)
            if outside is not None:
                device = next(iter(tensors.values())).device
                return call.sample_call(inputs, self.named, outside, device=device)
        return None

    def _another(self, door: Door, leaves: Sequence[Any]) -> bool:
        """Whether what a door refuses may have a path of its own.

        Not where the model does not run, and not at sizes that nobody asked to be free.
        """
        for name, want, leaf in zip(door.names, door.sizes, leaves, strict=True):
            other = {d for d, n in enumerate(want or ()) if n not in (None, leaf.shape[d])}
            if other - set(self.requested.get(name, {})):
                return False
        broken = [c for c in door.conditions if not c.holds(door.given(c, leaves))]
        return not broken or not all(c.demanded for c in broken)

    def _new(
        self,
        training: bool,
        named: Named,
        dtype: torch.dtype | None,
        *,
        portable: bool,
        fixed: Collection[tuple[str, int]] = (),
    ) -> Traced:
        source = self.source.in_dtype(dtype, self.base_dtype)
        new = default_dynamic(call.describe(named))
        unknown = {n: d for n, d in new.items() if n not in self.inputs.names}
        requested = trace.less({**self.requested, **unknown}, fixed)
        with trace.traceable_experts(source.module, portable=portable) as said:
            try:
                traced = self._trace(source, training, named, requested)
            except CaptureError as e:
                traced = self._lower(e, source, training, named)
        if not portable:
            traced.notes = (*traced.notes, *said)
        self._settle(traced)
        cache = "is left out: a key-value cache is no tensor"
        left = [f"the output {n!r} {cache}" for n in traced.left_out]
        if not training and (drawn := random_ops(traced.graph)):
            left.append(
                f"the model draws random numbers in eval mode ({', '.join(drawn)}): proofs in "
                "torch draw them alike; ONNX Runtime draws others, so no file can be compared"
            )
        self.notes += [n for n in (*left, *traced.notes) if n not in self.notes]
        return traced

    def _lower(
        self, error: CaptureError, source: ModelSource, training: bool, named: Named
    ) -> Traced:
        """The rungs below an export with free sizes.

        They are one of the path that a plain run takes, one with fixed sizes, and one recorded
        run.
        """
        if TAKEN in error.message:  # no program can hold that name, however it is captured
            raise error
        if self._raises_too(error, source, training, named):
            raise error
        why = one_line(error.message, 200)
        with contextlib.suppress(CaptureError):
            if (traced := self._plain_run(source, training, named)) is not None:
                return traced
        with contextlib.suppress(CaptureError):
            traced = self._trace(source, training, named, {})
            fixed = traced.door.fixed(self.requested)
            traced.pinned = [Pinned(*at, size, why) for at, size in fixed.items()]
            return traced
        if source is not self.source or not self._has_values():
            raise error
        try:
            with as_it_was(self.model, training), torch.random.fork_rng(devices=[]):
                entry = RootModule(self.model, self.signature, _hooked(self.model))
                traced = trace.record(entry, named, why)
                self._name_constants(traced)
                if not self._again(traced, named):
                    raise error  # what its values decide is not what another input's would
        except CaptureError:
            raise
        except Exception as e:
            raise error from e
        true_for = "the example's sizes and for what its values decide"
        note = f"one recorded run, true for {true_for}: {why}"
        if note not in self.notes:
            self.notes.append(note)
        return traced

    def _raises_too(
        self, error: CaptureError, source: ModelSource, training: bool, named: Named
    ) -> bool:
        """Whether the model's own code raises what its export raised, so that no rung takes it."""
        has_values = source is self.source and self._has_values()
        model = self.model if has_values else source.module
        forward = _hooked(model) if has_values else source.forward
        with as_it_was(model, training):
            entry = RootModule(model, self.signature, forward)
            return trace.raises_alike(entry, named, error.__cause__)

    def _plain_run(self, source: ModelSource, training: bool, named: Named) -> Traced | None:
        """An export of the path that a model takes where nothing compiles it.

        Loops over the experts that values chose run over all of them. None where the graph is not
        the model then, or where that cannot be tried.
        """
        if source is not self.source or not self._has_values():
            return None
        plain = patched(torch.compiler, is_compiling=lambda: False)
        with plain, trace.EveryTurn() as loops:
            traced = self._trace(source, training, named, self.requested)
        with alike(self.model, training=training):
            if not self._again(traced, named):
                return None
        if loops.turns:
            self.notes.append(
                "experts that run in a loop over those that were chosen are captured as a loop "
                "over all of them, which has the same numbers"
            )
        return traced

    def _again(self, traced: Traced, named: Named) -> bool:
        """Whether a recorded graph gives the model's numbers on other inputs of its sizes.

        They are drawn small, large and with the other sign too: branches go by such things.
        """
        fixed = call.describe(named)
        drawn = [named, *(call.sample_call(fixed, named, SIZES[0], seed) for seed in range(2))]
        others = [
            tree_map_only(torch.Tensor, partial(_times, factor), dict(n))
            for n in drawn
            for factor in (-1.0, 16.0, 1 / 16)
        ]
        agreement = self._beside(traced, None)
        found = (agreement.at(other) for other in (*drawn[1:], *others))
        return all(parity is None or parity.ok for parity in found)

    def _as_the_model(
        self, traced: Traced, named: Named, training: bool, requested: Requested
    ) -> bool:
        """Whether a graph with copies of blocks gives the model's numbers, where it is compared.

        That is at the example and at two sizes more; see lora_fx.fx.capture.agreement.
        """
        of = f"copied blocks, {'train' if training else 'eval'} mode"
        agreement = replace(self._beside(traced, training), of=of)
        made = traced.constants.keys() - all_tensors(self.model).keys()
        if not (made or traced.bodies or random_ops(traced.graph)):  # the other mode's may be equal
            agreement = replace(agreement, digests=self._digests.setdefault(str(traced.graph), {}))
        example = call.describe(named).with_dims(requested)
        specs = call.limits(example, traced.graph, traced.door)
        inputs = Inputs(specs, traced.door.conditions, traced.cuts)
        device = next(x.device for _, x in call.leaves_of(named) if isinstance(x, torch.Tensor))
        drawn = drawn_calls(inputs, named, traced.graph, device)
        compared: list[Parity] = []
        for calls in (iter([named]), *drawn):
            tried: list[Named] = []
            found: Parity | None = None
            for other in calls:
                tried.append(other)
                found = agreement.at(other)
                if found is not None:
                    break
            if found is None:
                sizes = {n: list(shape) for n, shape in sizes_of(tried[0]).items()}
                why = f"{agreement.of}: the model does not run there"
                self.unproven[str(sizes)] = {"sizes": sizes, "reason": why}
            elif found.ok:
                compared.append(found)
            else:
                self.repeat = False
                self.notes.append(
                    "blocks that look alike are not: each was traced by itself, since their "
                    f"copies are {found.rel:.1e} off at {sizes_text(found.sizes)} ({found.of})"
                )
                return False
        self.compared = (*self.compared, *compared)
        return True

    def _beside(self, traced: Traced, training: bool | None) -> Agreement:
        """A graph beside the model, in a mode; None is the mode that the model is in."""
        mode = self.model.training if training is None else training
        view = traced.fx_graph(self.model, mode)  # which reads codes as numbers

        @contextlib.contextmanager
        def alone() -> Iterator[None]:
            layers = trace.EveryLayer([]) if training else contextlib.nullcontext()
            with alike(self.model, training=training), layers:
                yield

        return Agreement(self.model, self.signature, view.graph, self._tensors(traced), alone)

    def _has_values(self) -> bool:
        return all(type(p.data) is torch.Tensor and not p.is_meta for p in self.model.parameters())

    def settle(self, idle: Collection[Condition]) -> None:
        """Take these of what was doubtful for conditions of no meaning, and the rest for true."""
        self.idle = frozenset((c.text, c.sizes) for c in idle)
        for held in self.tracings.values():
            for traced in held:
                self._settle(traced)

    def _settle(self, traced: Traced) -> None:
        if self.idle is not None:
            more = [c for c in traced.doubtful if (c.text, c.sizes) not in self.idle]
            door = traced.door
            traced.door = replace(door, conditions=tuple(dict.fromkeys([*door.conditions, *more])))

    def _trace(
        self,
        source: ModelSource,
        training: bool,
        named: Named,
        requested: Requested,
    ) -> Traced:
        mode = "train" if training else "eval"
        with stage(f"capturing, {mode} mode"), as_it_was(source.module, training):
            try:
                entry = RootModule(source.module, self.signature, source.forward)
                traced = trace.trace(entry, named, requested, repeat=self.repeat)
            except LoraFxError:
                raise
            except Exception as e:
                raise explain(e, type(self.model).__name__, training) from e
        self._name_constants(traced)
        own = traced.copies and source is self.source and self._has_values()
        if not own:
            return traced
        modes = (training, not training) if traced.modeless else (training,)
        if all(self._as_the_model(traced, named, mode, requested) for mode in modes):
            return traced
        traced = self._trace(source, training, named, requested)
        traced.modeless = False  # what is unlike may be so by its mode
        found = self._beside(traced, training).at(named)
        if not (found is None or found.ok or random_ops(traced.graph)):
            self.notes.append(
                f"this graph is {found.rel:.1e} off the model on the example, its blocks traced "
                "one by one: forward keeps something that a copy of the model has not"
            )
        return traced

    def _name_constants(self, traced: Traced) -> None:
        """Give the model's own tensors that a function closed over their names back."""
        owned: dict[int, str] = {}
        for name, p in [*self.model.named_parameters(), *self.model.named_buffers()]:
            owned[id(p)] = name
            if p.device.type != "meta" and p.numel():
                owned.setdefault(p.data_ptr(), name)
        renamed = {}
        for name, t in list(traced.constants.items()):
            fake = is_fake(t)
            known = owned.get(id(t)) or (not fake and t.numel() and owned.get(t.data_ptr()))
            if known:
                renamed[name] = str(known)
                del traced.constants[name]
        for node in traced.graph.find_nodes(op="get_attr"):
            node.target = renamed.get(str(node.target), node.target)

    def bounded_inputs(self) -> Inputs:
        """The signature with the integer limits that the eval graph shows."""
        if not self._limits_known:
            traced = self.traced(False, self.named)
            specs = call.limits(self.inputs, traced.graph, traced.door)
            self.inputs = Inputs(specs, traced.door.conditions, traced.cuts)
            self._limits_known = True
        return self.inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        """Copy without the code and graphs, which are shared; later traces stay the copy's own."""
        new = copy.copy(self)
        new.tracings = {k: list(v) for k, v in self.tracings.items()}
        return new


def copied(named: Named) -> dict[str, Any]:
    """The arguments with a copy of every tensor."""
    return dict(tree_map_only(torch.Tensor, torch.clone, dict(named)))


def _times(factor: float, x: torch.Tensor) -> torch.Tensor:
    return x * factor if x.is_floating_point() else x.clone()


@contextlib.contextmanager
def as_it_was(model: nn.Module, training: bool | None = False) -> Iterator[None]:
    """A block in which a model runs in a mode; what a run may leave behind is put back after it.

    None is the mode that it is in.

    That is every module's mode, its buffers, in place or replaced, its children, and the tensors
    and plain values among its attributes. Hooks write such (weight_norm's weight), a trace would
    leave fake ones, and BigBird takes other attention from the first short input on.
    """
    # an attached model's frozen norms say False, whatever they are set to
    held = [
        (m, m.__dict__.get("training", m.training), dict(m._buffers), _plain(m))
        for m in model.modules()
    ]
    children = [(m, dict(m._modules)) for m in model.modules() if m._modules]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for m, was, buffers, plain in held:
            m.training = was
            m._buffers.update(buffers)
            m.__dict__.update(plain)
        for m, modules in children:
            m._modules.update(modules)
        with torch.no_grad():
            for b, value in values:
                b.copy_(value)


@contextlib.contextmanager
def alike(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """A block in which a model draws the same random numbers every time, and is as it was after."""
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if there else 0)
    with as_it_was(model, training), torch.random.fork_rng(devices):
        yield


PLAIN = {bool, int, float, str, tuple, type(None)}
"""Types of attributes that a run can only replace."""


def _plain(module: nn.Module) -> dict[str, object]:
    if isinstance(module, LazyModuleMixin):
        return {}  # its first run makes it a module of another class
    return {
        k: v for k, v in module.__dict__.items() if type(v) in PLAIN or isinstance(v, torch.Tensor)
    }


def _hooked(model: nn.Module) -> Callable[..., Any]:
    """The forward of a module, with the module's own hooks where it has some."""
    if not (model._forward_pre_hooks or model._forward_hooks):
        return model.forward
    order = Signature(model.forward).positional

    def forward(*args: Any, **named: Any) -> Any:
        # hooks see positional arguments, as in an ordinary call
        given = takewhile(named.__contains__, order[len(args) :])
        rest = [named.pop(name) for name in given]
        return model._call_impl(*args, *rest, **named)  # type: ignore[no-untyped-call]

    return forward


def base_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter that is not an adapter's."""
    own = (m for m in model.modules() if not isinstance(m, AdapterTensors))
    held = (p for m in own for p in m._parameters.values() if p is not None)
    return next((p.dtype for p in held if p.is_floating_point()), None)


# Why a model could not be captured: the line of the user's code, the cause, what to do.


TAKEN = "torch.fx has a use of its own for the name of a module, such as graph, that holds weights"
_CAUSES = (
    (
        "GuardOnDataDependentSymNode|data-dependent",
        "a branch or a size depends on a tensor's value",
        "compute both branches with torch.where, or make the value a Python argument",
    ),
    (
        r"aten\._local_scalar_dense",
        "a tensor's value is read (.item(), int(), bool())",
        "keep it a tensor: torch.where, masks, or a Python argument",
    ),
    (
        "references nonexistent attribute",
        TAKEN,
        "rename the module",
    ),
    ("numpy", "numpy is called on a tensor", "use torch's own functions"),
    (
        "FakeTensor",
        "a tensor made outside the model meets the traced ones",
        "register it as a buffer, or make it in forward",
    ),
)


_SIZES = ("mat1 and mat2", "must match", "size mismatch", "shape", "Expected size", "inconsist")


def explain(error: Exception, name: str, training: bool) -> CaptureError:
    """The error to raise: which line of the user's code it was, why, and what to do."""
    mode = "train" if training else "eval"
    where = _user_line(error) or f"{name}.forward"
    text = f"{type(error).__name__}: {error}"
    why = one_line(text, 160)
    todo = "check that the model runs on the example inputs; -v prints the traceback"
    if any(words in text for words in _SIZES):
        why = f"sizes do not fit: {one_line(error, 160)}"
        todo = "check the example inputs against what the model expects"
    why, todo = next(((w, t) for cause, w, t in _CAUSES if re.search(cause, text)), (why, todo))
    return CaptureError(f"cannot capture {name} in {mode} mode at {where}: {why}", todo)


def _user_line(error: BaseException) -> str:
    """file:line `code` of the innermost frame that is neither torch's nor ours."""
    root = __file__.rpartition("/lora_fx/")[0]
    ours = ("<", *(f"{root}/{folder}/" for folder in ("lora_fx", "passes", "cli")))
    said = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = frame.filename
        standard = "/lib/python3" in path and "site-packages" not in path
        library = "/torch/" in path or (standard and frame.name != "<module>")
        if not library and not path.startswith(ours):
            said = f"{path}:{frame.lineno} `{frame.line}`"
    return said


def weightless(
    model: nn.Module, dtype: torch.dtype | None = None, mode: FakeTensorMode | None = None
) -> tuple[nn.Module, FakeTensorMode]:
    """A deep copy of the module whose tensors are fake, on the CPU where they were on meta.

    It has the code and none of the memory: with both graphs, 11 MiB for a model of 993 MiB. Every
    capture traces it, so the user's module is never switched to train, and its batch norms keep
    their statistics.

    Args:
        model: The module.
        dtype: Floating tensors take this dtype, as `.to(dtype)` would.
        mode: The mode of an earlier weightless copy, to copy such a copy.
    """
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    memo: dict[int, Any] = {}
    numbers = {id(parameter_of(model, n)): q for n, q in quantised_parameters.forms(model).items()}
    for t in [*model.parameters(), *model.buffers()]:
        device, q = "cpu" if t.device.type == "meta" else t.device, numbers.get(id(t))
        like = t if q is None else torch.empty(q.shape, dtype=q.dtype, device="meta")
        want = dtype if dtype is not None and like.is_floating_point() else like.dtype
        with mode:
            fake = torch.empty_strided(like.shape, like.stride(), dtype=want, device=device)
        memo[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    copied = copy.deepcopy(model, memo)
    if numbers:
        quantised_parameters.forget(copied)
    return copied, mode
