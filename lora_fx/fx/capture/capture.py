"""Capture: any traceable model as graphs, one program for each mode, dtype and argument set.

A `Captured` holds the weightless source, the skeleton and the programs traced so far. What was
not traced yet is traced when it is first asked for.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Parity, sizes_text
from lora_fx.conditions import Condition, Size
from lora_fx.errors import CaptureError, LoraFxError, expect, one_line
from lora_fx.fx.capture.agreement import Agreement, sizes_of
from lora_fx.fx.capture.call import Signature, in_separate_memory, leaves_of, program_key
from lora_fx.fx.capture.capture_error import TAKEN, explain
from lora_fx.fx.capture.cleaned_graph import Pinned, Traced
from lora_fx.fx.capture.door import Door, Requested, dims_of_one, without_dims
from lora_fx.fx.capture.drawn_calls import drawn_calls
from lora_fx.fx.capture.example import describe, limits, sample_call
from lora_fx.fx.capture.expert_forms import EveryTurn, traceable_experts
from lora_fx.fx.capture.model_source import ModelSource, base_dtype, hooked_forward
from lora_fx.fx.capture.observed import EveryLayer
from lora_fx.fx.capture.quantised_layers import plain_layers
from lora_fx.fx.capture.recorded_run import record
from lora_fx.fx.capture.root_module import RootModule, as_module
from lora_fx.fx.capture.signals import is_convolved, may_have_signals
from lora_fx.fx.capture.trace import raises_alike, trace
from lora_fx.fx.capture.unchanged import alike, as_it_was
from lora_fx.fx.dotted_names import all_tensors
from lora_fx.fx.fake_tensors import is_fake
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.skeleton import Skeleton
from lora_fx.fx.trees import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from lora_fx.inputs import (
    SIZES,
    Dynamic,
    Inputs,
    Named,
    default_dynamic,
    merge_dynamic,
    possible_signals,
    refuse_unequal,
    with_lengths,
)
from lora_fx.patching import alone, patched
from lora_fx.progress import stage
from lora_fx.text import Json, counted

MOST_PATHS = 8
"""The most graphs of one call; a model with more paths is refused from then on."""


class Captured:
    """A model as graphs: one for each mode, dtype and set of arguments, traced on first use.

    Attributes:
        inputs: The signature: names, dtypes and dimensions of the example's tensors.
        pinned: Dimensions that were asked to be dynamic and that the model fixed.
        notes: Notes for the user, from all captures so far.
        quantised: The user's own module where that has quantised layers; `model` is another then.
        adapter: The adapter in a file's branches; None for a model with source.
        repeat: Blocks that repeat are traced once, and the graph compared with the model.
        compared: Where such graphs were compared with it, and how far they were off.
        tokenizer_folder: The folder of its tokenizer, of a model that was opened by name.
        idle: Doubtful conditions that a run has shown to be of no meaning; None before that run.
        live: True where the model itself trains, and the graph shows its targets.
    """

    adapter: Adapter | None = None
    quantised: nn.Module | None = None
    repeat = True
    compared: tuple[Parity, ...] = ()
    idle: frozenset[object] | None = None
    _limits_known = False
    live = False
    tokenizer_folder: Path | None = None
    _signals: tuple[str, ...] = ()
    """Inputs [N, T, F] or [N, C, L] of which nobody said what is free; the first trace tells."""

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
        expect(args, (tuple, list), "args", "a tuple", "pass args=(x,), or kwargs={'x': x}")
        expect({} if kwargs is None else kwargs, Mapping, "kwargs", "a dict", "kwargs={'x': x}")
        expect(dynamic or {}, Mapping, "dynamic", "a dict", "dynamic={'x': {0: 'batch'}}")
        user_module = as_module(model)
        self.model, notes = plain_layers(user_module, base_dtype(user_module))
        self.quantised = None if self.model is user_module else user_module
        forward: Any = self.model.forward if isinstance(model, nn.Module) else model
        self.signature = Signature(forward)
        self.repeat = repeat
        self.source = ModelSource.of(self.model)
        self.base_dtype = base_dtype(self.model)
        self.notes: list[str] = list(notes)
        if self.source.why:
            self.notes.append(self.source.why)

        self.named = self._bound(args, kwargs or {})
        self.inputs: Inputs = describe(self.named)
        self.requested: Requested = merge_dynamic(
            self.inputs, default_dynamic(self.inputs), dynamic, static
        )
        refuse_unequal(self.inputs, self.requested, dynamic)
        self._signals = possible_signals(self.inputs, dynamic or {}, static)
        self.inputs = self.inputs.with_dims(self.requested)

        self.tracings: dict[tuple[object, ...], list[Traced]] = {}
        self._digests: dict[str, dict[str, bytes]] = {}
        self.unproven: dict[str, Json] = {}
        """Sizes → a row of `unproven[]`, for sizes that a proof has to leave out."""

    def _bound(self, args: Sequence[object], kwargs: Named) -> dict[str, Any]:
        """Return the example's arguments by name, each in its own memory."""
        try:
            named = self.signature.bind(tuple(args), dict(kwargs))
        except TypeError as e:
            raise LoraFxError(
                f"the example inputs do not fit {type(self.model).__name__}.forward: {e}",
                f"its signature is forward{self.signature.signature}",
            ) from e
        example_leaves, spec = tree_flatten(named)
        leaves = in_separate_memory(example_leaves)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise LoraFxError(
                "no example input is a tensor",
                f"pass args or kwargs for forward{self.signature.signature}",
            )
        bound: dict[str, Any] = tree_unflatten(leaves, spec)
        return bound

    def __repr__(self) -> str:
        """Return the model's class, and the signature with its dimensions."""
        traced = self._graph_of_example(training=False)
        shown = self.inputs if traced is None else self.bounded_inputs()
        rows = shown.to_json()
        inputs = ", ".join(f"{row['name']}: {row['dtype']} {row['shape']}" for row in rows)
        return f"{type(self).__name__}({type(self.model).__name__}, {inputs})"

    def extend_example(self, name: str, tensor: torch.Tensor, dims: Mapping[int, str]) -> None:
        """Add an argument to the example, before anything is traced.

        Args:
            name: The argument.
            tensor: Its value.
            dims: Its free dimensions and the names of their sizes.
        """
        assert not self.tracings
        self.named = self._bound((), {**self.named, name: tensor})
        self.requested = {**self.requested, name: dict(dims)}
        self.inputs = describe(self.named).with_dims(self.requested)

    def fix_sizes(self) -> None:
        """Trace at the example's sizes from now on, for callers that run no other sizes."""
        self.requested = {}
        self._signals = ()
        self.inputs = self.inputs.with_dims({})

    @property
    def pinned(self) -> list[Pinned]:
        """The dimensions that should be dynamic in the eval graph, but that the model fixed."""
        return self.traced(False, self.named).pinned

    @property
    def recorded(self) -> bool:
        """Whether the eval graph is one recorded run, on a path that the base's weights chose."""
        return any(pin.rung == "recorded" for pin in self.pinned)

    @property
    def recorded_in_training(self) -> bool:
        """Whether there is a train graph, apart from the eval graph, that is one recorded run."""
        train_graph = self._graph_of_example(training=True)
        if train_graph is None or train_graph is self._graph_of_example(training=False):
            return False
        return any(pin.rung == "recorded" for pin in train_graph.pinned)

    def _graph_of_example(self, training: bool) -> Traced | None:
        """Return the example's graph in a mode, if it is already traced."""
        key = (training, False, self.base_dtype, *self._example_key)
        tracings = self.tracings.get(key)
        return tracings[0] if tracings else None

    @property
    def ranges(self) -> tuple[Condition, ...]:
        """The conditions on sizes, each once, under which the captured path is taken."""
        conditions: dict[str, Condition] = {}
        for condition in self.traced(False, self.named).door.conditions:
            if condition.demanded and not any(condition.bounds()):
                continue
            if self.inputs.implied(condition):
                continue
            row = condition.to_json()
            # inputs that share a size say the same of it
            symbol = self.inputs.symbol(str(row["input"]), int(row["dim"]))
            text = str({**row, "input": symbol, "dim": symbol, "line": ""})
            conditions.setdefault(text, condition)
        return tuple(conditions.values())

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
        """Raise LoraFxError if a mode cannot run: a .pt2 file may hold only the other one."""

    def fx_graph(self, training: bool = False, root: nn.Module | None = None) -> FxGraph:
        """Return a fresh copy of a mode's graph for passes.

        Args:
            training: The mode.
            root: The tree that holds the tensors, and that passes edit. None makes one which shares
                the storage of the parameters, so that the user's module stays as it is.
        """
        traced = self.traced(training, self.named)
        if root is None:
            root = Skeleton(lambda name: nn.Module(), flags=True).of(self.model)
        return traced.fx_graph(root, training)

    @alone()
    def traced(
        self,
        training: bool,
        named: Named,
        dtype: torch.dtype | None = None,
        *,
        portable: bool = False,
    ) -> Traced:
        """Return the cleaned graph for a mode, arguments, their sizes and a base dtype.

        A portable one has its experts batched: see lora_fx.fx.capture.expert_forms.

        Raises:
            SizeError: The model does not run at these sizes, or no graph of it holds for them.
        """
        leaves = tree_leaves(dict(named))
        is_example = named is self.named
        call_key = self._example_key if is_example else program_key(named, leaves)
        key = (training, portable, dtype or self.base_dtype, *call_key)
        tracings = self.tracings.setdefault(key, [])
        of_other_mode = self.tracings.get((not training, *key[1:]), [])
        capture = partial(self._capture, training, dtype=dtype, portable=portable)

        if not tracings:  # the example's path comes first, whatever is called first
            if of_other_mode and of_other_mode[0].modeless:
                tracings.append(of_other_mode[0])
            else:
                first_call = self.named if call_key == self._example_key else named
                tracings.append(capture(first_call))

        usable = [*tracings, *(traced for traced in of_other_mode[1:] if traced.modeless)]
        fitting = (traced for traced in usable if is_example or traced.door.admits(leaves))
        traced = next(fitting, None)
        if traced is None:
            traced = self._elsewhere(tracings, named, partial(capture, named))
        if all(traced is not other for other in tracings):
            tracings.append(traced)
        return traced

    @cached_property
    def _example_key(self) -> tuple[object, ...]:
        return program_key(self.named, tree_leaves(dict(self.named)))

    def _elsewhere(
        self, tracings: Sequence[Traced], named: Named, capture: Callable[..., Traced]
    ) -> Traced:
        """Return the graph at sizes where no graph so far is valid: another path of the code."""
        leaves = tree_leaves(dict(named))
        refusal = tracings[0].door.refused(leaves)
        assert refusal is not None
        if len(tracings) >= MOST_PATHS or not self._may_have_a_path(tracings[0].door, leaves):
            raise refusal
        try:  # a free size is never 1 in an export: there the size is part of the path
            traced = capture(fixed=dims_of_one(named, self.requested))
        except CaptureError as e:
            raise refusal from e
        if not traced.door.admits(leaves):
            raise refusal
        return traced

    def _may_have_a_path(self, door: Door, leaves: Sequence[Any]) -> bool:
        """Whether sizes that a condition refuses may take another path of the model.

        False if the model itself refuses these sizes, or if a differing size was never free.
        """
        for name, fixed_sizes, leaf in zip(door.names, door.sizes, leaves, strict=True):
            for dim, size in enumerate(fixed_sizes or ()):
                if size in (None, leaf.shape[dim]):
                    continue
                if dim not in self.requested.get(name, {}):
                    return False
        broken = [c for c in door.conditions if not c.holds(door.given(c, leaves))]
        return not broken or not all(condition.demanded for condition in broken)

    def paths(self, training: bool, dtype: torch.dtype | None) -> list[tuple[Named, Traced]]:
        """Return the paths that sizes decide, each with a call; the example's path comes first.

        From each one goes on outside each of its conditions and fixed sizes. Where a loop over the
        steps fixes a size, another one is fixed too, and not worth a place of its own.
        """
        paths: list[tuple[Named, Traced]] = [(self.named, self.traced(training, self.named, dtype))]
        for named, traced in paths:  # which grows
            fixed_sizes = traced.door.fixed(self.requested)
            pins = [
                Condition(f"s0 == {number}", (("s0", *size),))
                for size, number in fixed_sizes.items()
            ]
            for condition in (*traced.door.conditions, *pins):
                if condition.demanded:
                    continue
                call = self._call_beyond(condition, named, traced.door)
                if call is None or len(paths) == MOST_PATHS:
                    continue
                with contextlib.suppress(LoraFxError):  # the model does not run there
                    other = self.traced(training, call, dtype)
                    if condition in pins and self._fixes_others(other, fixed_sizes):
                        continue
                    if all(other is not path_graph for _, path_graph in paths):
                        paths.append((call, other))
        return paths

    def _fixes_others(self, traced: Traced, fixed_sizes: Mapping[Size, int]) -> bool:
        """Whether a graph fixes a size at a number other than 1 and other than the given size."""
        numbers = traced.door.fixed(self.requested)
        return any(n != 1 and fixed_sizes.get(size) != n for size, n in numbers.items())

    def _call_beyond(self, condition: Condition, named: Named, door: Door) -> Named | None:
        """Return a call that breaks only this condition of a door; size 1 is tried last."""
        tensors = {name: x for name, x in leaves_of(named) if isinstance(x, torch.Tensor)}
        other_conditions = [c for c in door.conditions if c is not condition]
        dims = without_dims(self.requested, door.fixed(self.requested).keys() - condition.about)
        base_sizes: dict[str, int] = {}
        for name, symbols in dims.items():
            for dim, symbol in symbols.items():
                base_sizes[symbol] = max(base_sizes.get(symbol, 0), tensors[name].shape[dim])
        specs = tuple(
            replace(spec, shape=tuple(tensors[spec.name].shape))
            for spec in self.bounded_inputs().specs
        )

        for least in (2, 1):
            at_least = [Condition(f"s0 >= {least}", (("s0", *size),)) for size in condition.about]
            inputs = Inputs(specs, (*other_conditions, *at_least)).with_dims(dims)
            sizes_outside = inputs.outside(condition, base_sizes)
            if sizes_outside is not None:
                device = next(iter(tensors.values())).device
                return sample_call(inputs, self.named, sizes_outside, device=device)
        return None

    def _capture(
        self,
        training: bool,
        named: Named,
        dtype: torch.dtype | None,
        *,
        portable: bool,
        fixed: Collection[tuple[str, int]] = (),
    ) -> Traced:
        """Capture a graph in the first of several ways that works for the model."""
        source = self.source.in_dtype(dtype, self.base_dtype)
        dynamic = default_dynamic(describe(named))
        unknown = {name: dims for name, dims in dynamic.items() if name not in self.inputs.names}
        requested = without_dims({**self.requested, **unknown}, fixed)
        with traceable_experts(source.module, portable=portable) as expert_notes:
            try:
                traced = self._trace(source, training, named, requested)
            except CaptureError as e:
                traced = self._by_a_lower_rung(e, source, training, named)
            else:
                if named is self.named and not fixed:
                    traced = self._with_free_lengths(traced, source, training)
        if not portable:
            traced.notes = (*traced.notes, *expert_notes)
        self._settle(traced)
        notes = [*_output_notes(traced, training), *traced.notes]
        self.notes += [note for note in notes if note not in self.notes]
        return traced

    def _with_free_lengths(self, traced: Traced, source: ModelSource, training: bool) -> Traced:
        """Return a graph with free lengths of signals [N, C, L], whose channels the model fixes.

        A float of three dimensions is taken for a sequence [N, T, F] first. Where the model fixes
        dimension 1, and dimension 2 can be free in its place, it is a signal. Where the model fixes
        both, it is one if a convolution reads it; of others both dimensions are said to be fixed.
        """
        pins = {pin.input for pin in traced.pinned if pin.dim == 1}
        signals = []
        for name in self._signals:
            may_hold_steps = 1 in self.requested[name]  # one channel is never taken for a sequence
            if name in pins or not may_hold_steps:
                signals.append(name)
        self._signals = ()
        if not signals or not may_have_signals(traced.graph):
            return traced
        requested = with_lengths(self.inputs, self.requested, signals)
        try:
            freed = self._trace(source, training, self.named, requested)
        except CaptureError:
            return traced

        of_fixed_length = {p.input for p in freed.pinned if p.dim == 2 and p.input in signals}
        placeholders = freed.graph.find_nodes(op="placeholder")
        placeholder_of = dict(zip(freed.door.names, placeholders, strict=True))
        sequences = {name for name in of_fixed_length if not is_convolved(placeholder_of[name])}
        pins_of_features = [p for p in freed.pinned if p.input in sequences & pins and p.dim == 2]
        signals = [name for name in signals if name not in sequences]
        if not signals:
            traced.pinned += pins_of_features
            return traced
        pins_of_steps = [p for p in traced.pinned if p.input in sequences and p.dim == 1]
        both_dims = [(name, dim) for name in sequences for dim in (1, 2)]
        pins_of_others = [p for p in freed.pinned if (p.input, p.dim) not in both_dims]
        order = {name: position for position, name in enumerate(placeholder_of)}
        freed.pinned = [*pins_of_others, *pins_of_steps, *pins_of_features]
        freed.pinned.sort(key=lambda pin: (order[pin.input], pin.dim))
        requested = with_lengths(self.inputs, self.requested, signals)
        self.requested = requested
        self.inputs = self.inputs.with_dims(requested)
        for spec in self.inputs.specs:
            if spec.name in signals:
                varies = "" if spec.name in of_fixed_length else ", and dimension 2 may vary"
                channels = counted(spec.shape[1], "channel")
                self.notes.append(
                    f"{spec.name!r} is a signal of {channels}: dimension 1 is fixed{varies}"
                )
        return freed

    def _by_a_lower_rung(
        self, error: CaptureError, source: ModelSource, training: bool, named: Named
    ) -> Traced:
        """Capture a model for which an export with free sizes failed.

        1. Where the model's own code raises the same, or no program can hold it, the error stands.
        2. An export of the path that a plain run takes, with free sizes.
        3. An export with the sizes of the example.
        4. One recorded run, where the model has values and the graph holds for other values too.

        Args:
            error: Why the export failed.
            source: The model's code.
            training: The mode.
            named: The call.
        """
        if TAKEN in error.message:  # no program can hold that name, however it is captured
            raise error
        if self._raises_too(error, source, training, named):
            raise error

        why = one_line(error.message, 200)
        with contextlib.suppress(CaptureError):
            plain_traced = self._plain_run(source, training, named)
            if plain_traced is not None:
                return plain_traced
        with contextlib.suppress(CaptureError):
            return self._at_fixed_sizes(source, training, named, why)
        if source is not self.source or not self._has_values():
            raise error
        return self._recorded_run(error, training, named, why)

    def _raises_too(
        self, error: CaptureError, source: ModelSource, training: bool, named: Named
    ) -> bool:
        """Whether the model itself raises the error of its export, so that no capture works."""
        if source is self.source and self._has_values():
            model = self.model
            forward = hooked_forward(model)
        else:
            model = source.module
            forward = source.forward
        with as_it_was(model, training):
            entry = RootModule(model, self.signature, forward)
            return raises_alike(entry, named, error.__cause__)

    def _plain_run(self, source: ModelSource, training: bool, named: Named) -> Traced | None:
        """Export the path that a model takes if nothing compiles it; None if that fails.

        Loops over the experts that values chose run over all of them. None where the graph is not
        the model then, or where that cannot be tried.
        """
        if source is not self.source or not self._has_values():
            return None
        uncompiled = patched(torch.compiler, is_compiling=lambda: False)
        with uncompiled, EveryTurn() as loops:
            traced = self._trace(source, training, named, self.requested)
        with alike(self.model, training=training):
            if not self._holds_for_other_values(traced, named):
                return None
        if loops.turns:
            self.notes.append(
                "experts that the model runs in a loop over the chosen ones are captured as a "
                "loop over all of them, which gives the same numbers"
            )
        return traced

    def _at_fixed_sizes(
        self, source: ModelSource, training: bool, named: Named, why: str
    ) -> Traced:
        traced = self._trace(source, training, named, {})
        fixed_sizes = traced.door.fixed(self.requested)
        traced.pinned = [Pinned(*size, number, why) for size, number in fixed_sizes.items()]
        return traced

    def _recorded_run(self, error: CaptureError, training: bool, named: Named, why: str) -> Traced:
        """Record one run; raise the error of the export if that is not possible."""
        try:
            with as_it_was(self.model, training), torch.random.fork_rng(devices=[]):
                entry = RootModule(self.model, self.signature, hooked_forward(self.model))
                traced = record(entry, named, why)
                self._name_constants(traced)
                if not self._holds_for_other_values(traced, named):
                    raise error  # what its values decide is not what another input's would
        except CaptureError:
            raise
        except Exception as e:
            raise error from e
        true_for = "the example's sizes and for the choices that its values make"
        note = f"the graph is one recorded run, valid for {true_for}: {why}"
        if note not in self.notes:
            self.notes.append(note)
        return traced

    def _holds_for_other_values(self, traced: Traced, named: Named) -> bool:
        """Whether a recorded graph gives the model's numbers on other inputs of its sizes.

        Small, large and negated inputs are drawn too, since branches may depend on these.
        """
        inputs = describe(named)
        drawn = [sample_call(inputs, named, SIZES[0], seed) for seed in range(2)]
        calls: list[Named] = [*drawn]
        for call in (named, *drawn):
            for factor in (-1.0, 16.0, 1 / 16):
                multiplied = partial(_multiplied, factor)
                calls.append(tree_map_only(torch.Tensor, multiplied, dict(call)))

        agreement = self._beside(traced, None)
        for call in calls:
            parity = agreement.at(call)
            if parity is not None and not parity.ok:
                return False
        return True

    def _trace(
        self,
        source: ModelSource,
        training: bool,
        named: Named,
        requested: Requested,
    ) -> Traced:
        """Export a graph; export again without copied blocks if they differ from the model."""
        mode = "train" if training else "eval"
        with stage(f"capturing, {mode} mode"), as_it_was(source.module, training):
            try:
                entry = RootModule(source.module, self.signature, source.forward)
                traced = trace(entry, named, requested, repeat=self.repeat)
            except LoraFxError:
                raise
            except Exception as e:
                raise explain(e, type(self.model).__name__, training) from e
        self._name_constants(traced)

        can_be_compared = source is self.source and self._has_values()
        if not traced.copies or not can_be_compared:
            return traced
        modes = (training, not training) if traced.modeless else (training,)
        with stage("comparing the graph with the model"):
            is_equal = all(self._is_the_model(traced, named, mode, requested) for mode in modes)
        if is_equal:
            return traced

        traced = self._trace(source, training, named, requested)
        traced.modeless = False  # what is unlike may be so by its mode
        parity = self._beside(traced, training).at(named)
        if not (parity is None or parity.ok or random_ops(traced.graph)):
            self.notes.append(
                f"this graph differs from the model by {parity.rel:.1e} on the example, with its "
                "blocks traced one by one: forward keeps a state that a copy of the model does "
                "not have"
            )
        return traced

    def _is_the_model(
        self, traced: Traced, named: Named, training: bool, requested: Requested
    ) -> bool:
        """Whether a graph with copies of blocks gives the model's numbers at all compared sizes.

        The sizes are the example's and two more; see lora_fx.fx.capture.drawn_calls. After a
        difference, no block is copied any more.
        """
        mode = "train" if training else "eval"
        agreement = replace(self._beside(traced, training), of=f"copied blocks, {mode} mode")
        own_constants = traced.constants.keys() - all_tensors(self.model).keys()
        if not (own_constants or traced.bodies or random_ops(traced.graph)):
            # the other mode's graph may be equal, and what it gave is known then
            digests = self._digests.setdefault(str(traced.graph), {})
            agreement = replace(agreement, digests=digests)

        example = describe(named).with_dims(requested)
        specs = limits(example, traced.graph, traced.door)
        inputs = Inputs(specs, traced.door.conditions, traced.cuts)
        tensors = (leaf for _, leaf in leaves_of(named) if isinstance(leaf, torch.Tensor))
        drawn = drawn_calls(inputs, named, traced.graph, next(tensors).device)
        compared: list[Parity] = []
        for calls in (iter([named]), *drawn):
            first_call = next(calls)
            parity = _first_parity(agreement, chain([first_call], calls))
            if parity is None:
                sizes = {name: list(shape) for name, shape in sizes_of(first_call).items()}
                reason = f"{agreement.of}: the model does not run at these sizes"
                self.unproven[str(sizes)] = {"sizes": sizes, "reason": reason}
            elif parity.ok:
                compared.append(parity)
            else:
                self.repeat = False
                self.notes.append(
                    "blocks that look alike compute different things, so each was traced "
                    f"separately: their copies differ by {parity.rel:.1e} at "
                    f"{sizes_text(parity.sizes)} ({parity.of})"
                )
                return False
        self.compared = (*self.compared, *compared)
        return True

    def _beside(self, traced: Traced, training: bool | None) -> Agreement:
        """Return the comparison of a graph with the model in a mode; None keeps the model's."""
        mode = self.model.training if training is None else training
        graph = traced.fx_graph(self.model, mode).graph  # which reads codes as numbers

        @contextlib.contextmanager
        def alone() -> Iterator[None]:
            layers = EveryLayer([]) if training else contextlib.nullcontext()
            with alike(self.model, training=training), layers:
                yield

        return Agreement(self.model, self.signature, graph, self._tensors(traced), alone)

    def _has_values(self) -> bool:
        return all(type(p.data) is torch.Tensor and not p.is_meta for p in self.model.parameters())

    def _name_constants(self, traced: Traced) -> None:
        """Restore the names of the model's tensors that a function reads through its closure."""
        names: dict[int, str] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            names[id(tensor)] = name
            if tensor.device.type != "meta" and tensor.numel():
                names.setdefault(tensor.data_ptr(), name)

        renamed: dict[str, str] = {}
        for constant, tensor in list(traced.constants.items()):
            known_name = names.get(id(tensor))
            if known_name is None and not is_fake(tensor) and tensor.numel():
                known_name = names.get(tensor.data_ptr())
            if known_name is not None:
                renamed[constant] = known_name
                del traced.constants[constant]
        for node in traced.graph.find_nodes(op="get_attr"):
            node.target = renamed.get(str(node.target), node.target)

    def settle(self, idle: Collection[Condition]) -> None:
        """Drop the doubtful conditions that are idle, and keep the other doubtful conditions.

        A condition is idle if the model also runs, with right results, at sizes that break it.
        """
        self.idle = frozenset((condition.text, condition.sizes) for condition in idle)
        for tracings in self.tracings.values():
            for traced in tracings:
                self._settle(traced)

    def _settle(self, traced: Traced) -> None:
        if self.idle is None:
            return
        door = traced.door
        doubted = [c for c in traced.doubtful if (c.text, c.sizes) not in self.idle]
        conditions = tuple(dict.fromkeys([*door.conditions, *doubted]))
        traced.door = replace(door, conditions=conditions)

    def bounded_inputs(self) -> Inputs:
        """Return the signature with the limits of integer inputs from the eval graph."""
        if not self._limits_known:
            traced = self.traced(False, self.named)
            specs = limits(self.inputs, traced.graph, traced.door)
            self.inputs = Inputs(specs, traced.door.conditions, traced.cuts)
            self._limits_known = True
        return self.inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        """Copy; code and graphs are shared, but later traces belong to the copy."""
        duplicate = copy.copy(self)
        duplicate.tracings = {key: list(tracings) for key, tracings in self.tracings.items()}
        return duplicate


def _output_notes(traced: Traced, training: bool) -> list[str]:
    """Return notes on a graph's outputs: those left out, and those drawn at random."""
    why = "is left out: a key-value cache is not a tensor"
    notes = [f"the output {name!r} {why}" for name in traced.left_out]
    drawn = [] if training else random_ops(traced.graph)
    if drawn:
        notes.append(
            f"the model draws random numbers in eval mode ({', '.join(drawn)}): the proofs in "
            "torch draw the same numbers, but ONNX Runtime draws others, so no file can be "
            "compared"
        )
    return notes


def _first_parity(agreement: Agreement, calls: Iterable[Named]) -> Parity | None:
    """Return the parity at the first call that the model takes; None if it takes none."""
    for call in calls:
        parity = agreement.at(call)
        if parity is not None:
            return parity
    return None


def _multiplied(factor: float, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor * factor
    return tensor.clone()
