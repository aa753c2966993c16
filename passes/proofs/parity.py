"""Prove a model equal to another by running both: the check that stands before every write.

The gate is relative to the largest output: ORT_TOL for fp32. Where a model exceeds it, its own
fp32-against-fp64 error decides, output by output: 4 × that + 1e-7. Narrower dtypes are gated by
their own epsilon, and by the adapter's effect.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import (
    CEILING,
    EPSILON,
    ORT_TOL,
    Gate,
    Outputs,
    Parity,
    compare_fairly,
    grow,
    narrow_gate,
    shapes_of,
    sizes_text,
    wide_gate,
)
from lora_fx.conditions import Condition, SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.capture.call import copied, leaf_names
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.example import filled
from lora_fx.fx.capture.onnx_names import onnx_conditions, onnx_name
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.graph.nodes import dtype_name, random_ops
from lora_fx.fx.graph.ops import OPS
from lora_fx.fx.graph.rounding import Wide, nearby, widened
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.tensors import from_numpy, has_values, to_numpy
from lora_fx.fx.train.step import STATES, Slot, TrainGraph, Update
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import OTHER_SIZES, Extents, Inputs, Named
from lora_fx.passes.proofs.interpreted import ModuleRerun, choices_of, move
from lora_fx.passes.proofs.reference import SEEDS, Choices, Rerun, Run, compared
from lora_fx.progress import stage
from lora_fx.text import Json


def arrays_of(named: Named) -> dict[str, Array]:
    """The tensors among flattened named arguments, as arrays by ONNX input name."""
    return {
        onnx_name(n): to_numpy(x)
        for n, x in zip(leaf_names(named), tree_leaves(dict(named)), strict=True)
        if isinstance(x, torch.Tensor)
    }


def named_of(example: Named, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """What arrays_of was made of, in the structure of the example and with its constants."""
    first = next(x for x in tree_leaves(dict(example)) if isinstance(x, torch.Tensor))
    device = None if first.is_meta else first.device
    return filled(example, {n: feeds.get(onnx_name(n)) for n in leaf_names(example)}, device)


def prove(
    ours: Run,
    reference: CapturedModule,
    *,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    tol: float = ORT_TOL,
    of: str = "",
    rerun: Rerun | None = None,
) -> list[Parity]:
    """Run both at every size; sizes that a pinned dimension makes equal run once.

    Args:
        ours: {input: array} → {output: array}.
        reference: The model to be equal to, in eval mode.
        arrays: A user's inputs instead of sampled ones (one run).
        sizes: Instead of those of the capture.
        tol: The gate in fp32.
        of: A word for the report: what is compared.
        rerun: Other ways to run what is compared.
    """
    reference.eval()
    captured = execution_of(reference).captured
    results: list[Parity] = []
    run = LatestRun(reference)
    growing, known = own_errors(reference, arrays, sizes, run), dict[str, float]()

    def own() -> Iterator[dict[str, float]]:
        yield known
        for errors in growing:  # for every size on from where the last one stopped
            known.update(errors)
            yield known

    for named, feeds, extra in feeds_of(reference, arrays, sizes):
        shapes = shapes_of(feeds)
        try:
            expected = run(named)
        except (IndexError, RuntimeError, ValueError) as e:
            where = ", ".join(f"{k} {list(v)}" for k, v in shapes.items())
            if _runs(captured, named):
                raise LoraFxError(
                    f"the captured graph does not run at {where}, and the model does: "
                    f"{one_line(e, 160)}",
                    f"{OTHER_SIZES}; and report this model",
                ) from e
            if extra or (arrays is None and sizes is None and is_real(captured.named)):
                # a size beyond a cut, or of inputs that depend on each other: the example remains
                leave_out(reference, shapes, f"the model does not run there: {one_line(e, 160)}")
                continue
            raise LoraFxError(
                f"the model does not run at {where}: {one_line(e, 160)}",
                OTHER_SIZES,
            ) from e
        captured.unproven.pop(str(shapes), None)
        gates = {n: _gate(reference, named, n, v, tol) for n, v in expected.items()}
        with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
            choose = partial(choices_of, reference, named)
            found, said = compared(ours, rerun, feeds, expected, gates, own, choose, of=of)
        results.append(found)
        if said:
            leave_out(reference, shapes, said)
    return results


@dataclass(eq=False)
class LatestRun:
    """A model as {output: array} of named arguments, which does not run twice on the same.

    Attributes:
        model: The model.
        feeds: What it ran on the last time, by the names of inputs.
        outputs: What it gave.
    """

    model: CapturedModule
    feeds: Mapping[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)

    def __call__(self, named: Named) -> dict[str, Array]:
        """The outputs, of a run or of the last one."""
        feeds = arrays_of(named)
        alike = feeds.keys() == self.feeds.keys()
        if not (alike and all(np.array_equal(v, self.feeds[n]) for n, v in feeds.items())):
            self.outputs = execution_of(self.model).flat(named)
            self.feeds = feeds
        return self.outputs


def feeds_of(
    reference: CapturedModule, arrays: Named | None = None, sizes: Sequence[Extents] | None = None
) -> Iterator[tuple[Named, dict[str, Array], bool]]:
    """(named arguments, {ONNX input: array}, whether it may fail) of every size and the example."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    execution = execution_of(reference)
    captured = execution.captured
    every, sizes = sizes is None, sizes or captured.inputs.checks
    for size in sizes if arrays is None else sizes[:1]:
        named = execution.sample(size, arrays)
        feeds = arrays_of(named)
        shapes = tuple(v.shape for v in feeds.values())
        if shapes in seen:
            continue
        seen.add(shapes)
        if refused := outside(reference, named):
            leave_out(reference, shapes_of(feeds), f"another path: {refused.message}")
            continue
        yield named, feeds, isinstance(size, Mapping)
    if arrays is None and every and is_real(captured.named):
        example = execution.in_own_dtype()
        yield example, arrays_of(example), True


def leave_out(reference: CapturedModule, sizes: Mapping[str, tuple[int, ...]], reason: str) -> None:
    """Note a size that nothing is proven of, for the report."""
    row = {"sizes": {k: list(v) for k, v in sizes.items()}, "reason": reason}
    execution_of(reference).captured.unproven[str(sizes)] = row


def rows_of(captured: Captured) -> Json:
    """`ranges[]` and `unproven[]` of a capture, as reports have them."""
    ranges = [c.to_json() for c in captured.ranges]
    return {"ranges": ranges, "unproven": [*captured.unproven.values()]}


def _runs(captured: Captured, named: Named) -> bool:
    """Whether the user's own model, not the graph of it, runs on arguments."""
    try:
        with quiet(), torch.no_grad(), alike(captured.model, training=False):
            captured.signature.call(captured.model, copied(named))
    except Exception:  # of the user's code, or a model that has no weights
        return False
    return True


def is_real(named: Named) -> bool:
    """Whether arguments have values: the example of a file, or of a meta model, has none."""
    leaves = (x for x in tree_leaves(dict(named)) if isinstance(x, torch.Tensor))
    return all(has_values(x) for x in leaves)


def guards(reference: CapturedModule) -> tuple[Condition, ...]:
    """The conditions outside which a file of this model may be another model.

    That it is one is not tried: at such sizes ONNX Runtime 1.31 may end the process, as a
    recurrent layer of no steps does.
    """
    # dimensions of one name say as much
    implied = execution_of(reference).captured.bounded_inputs().implied
    return onnx_conditions([c for c in reference.conditions() if not (c.demanded or implied(c))])


def outside(reference: CapturedModule, named: Named) -> SizeError | None:
    """Why the graph of the example does not hold at these sizes; None where it does."""
    execution = execution_of(reference)
    captured = execution.captured
    traced = captured.traced(False, captured.named, execution.base_dtype)
    return traced.door.refused(tree_leaves(dict(named)))


def _gate(reference: CapturedModule, named: Named, name: str, expected: Any, tol: float) -> Gate:
    """`tol` for fp32; that of narrower outputs or adapted weights by their rounding."""
    stored: list[str] = []
    if isinstance(reference, AdaptedModule):
        found = insertion_of(reference).found
        stored = [found[key].parameter.dtype for key in reference.updates]
    eps = max(EPSILON.get(n, 0.0) for n in (expected.dtype.name, *stored, *_narrow(reference)))

    def unadapted() -> Array:
        with reference.base():
            return execution_of(reference).flat(named)[name]

    if eps:
        return narrow_gate(tol, eps, unadapted(), expected)
    return wide_gate(tol, expected, unadapted if stored else None)


def _narrow(reference: CapturedModule) -> set[str]:
    """The dtypes of a model's products: by autocast in forward not those of its weights."""
    execution = execution_of(reference)
    captured = execution.captured
    traced = captured.traced(False, captured.named, execution.base_dtype)
    made = (n.meta.get("val") for n in traced.graph.nodes if n.target in OPS)
    return {dtype_name(v.dtype) for v in made if isinstance(v, torch.Tensor)}


FEW = 8
"""Numbers of an output, a loss, of which three moves of the weights tell too little."""


def own_errors(
    model: CapturedModule,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    run: Callable[[Named], dict[str, Array]] | None = None,
) -> Iterator[dict[str, float]]:
    """Per output, how far rounding moves a model's values: the largest so far of several inputs.

    It is the rel of its fp32 values to its own in fp64, and of those with every weight moved by
    half a unit of its last place, which is what a fold does. One input may round well by chance, a
    user's too, so every size is drawn with every seed. Where no fp64 run is possible, the moved
    weights alone tell.

    Args:
        model: Whose rounding it is.
        arrays: A user's inputs, which come first.
        sizes: Instead of those of the capture.
        run: Runs the model, and may know the outputs from before.
    """
    execution = execution_of(model)
    run = run or execution.flat
    sizes = execution.captured.inputs.checks if sizes is None else sizes
    example = execution.in_own_dtype()
    calls: list[Callable[[], Named]]
    calls = [partial(execution.sample, size, None, seed) for size in sizes for seed in SEEDS]
    if arrays is not None:
        calls.insert(0, partial(execution.sample, sizes[0], arrays))
    elif is_real(example):  # what is drawn need not fit
        calls.insert(0, lambda: example)
    worst: dict[str, float] = {}
    graph = model.graph(False).graph
    # fp64 draws other numbers
    exactly = execution.flat if random_ops(graph) else _wide(model, graph)
    runs: list[tuple[Named, dict[str, Array]]] = []
    for call in calls:
        try:
            named = call()
            if outside(model, named):
                continue
            ours = run(named)
        except (LoraFxError, RuntimeError, TypeError, ValueError, IndexError):
            continue  # it is no run of the proof either
        try:
            exact = exactly(named)
        except (RuntimeError, TypeError, ValueError):
            exactly, exact = execution.flat, ours
        runs.append((named, exact))
        yield grow(worst, ours, exact)
    moved = copy.deepcopy(model).eval()  # one, moved anew for every seed
    few = any(v.size < FEW for _, values in runs for v in values.values())
    for seed in range(4 * len(SEEDS)) if few else SEEDS:
        move(model, moved, seed)
        for named, values in runs:
            yield grow(worst, execution_of(moved).flat(named), values)


def _wide(model: CapturedModule, graph: fx.Graph) -> Callable[[Named], dict[str, Array]]:
    """A model's eval graph in fp64: every float is one, every cast to a narrower one is to fp64.

    A capture of the model in fp64 would cost another, and a model that writes `x.float()` has none.
    """
    run = Wide(model, graph=graph)
    execution = execution_of(model)
    captured = execution.captured
    traced = captured.traced(False, captured.named, execution.base_dtype)

    def exactly(named: Named) -> dict[str, Array]:
        leaves = [run.read(x) for x in tree_leaves(copied(named))]
        with torch.no_grad(), alike(model):
            out = run.run(*leaves, enable_io_processing=False)
        return by_output(tree_unflatten(list(out), traced.out_spec))

    return exactly


def torch_rerun(module: CapturedModule, *, same: bool = True) -> ModuleRerun:
    """Other ways to run a torch module, on arrays by input name; see ModuleRerun."""
    execution = execution_of(module)
    return ModuleRerun(module, lambda feeds: named_of(execution.in_own_dtype(), feeds), same)


def torch_run(module: CapturedModule) -> Run:
    """A torch module as {input: array} → {output: array}."""
    execution = execution_of(module)
    return lambda feeds: execution.flat(named_of(execution.in_own_dtype(), feeds))


# A captured torch model as the reference of an export.


@dataclass(eq=False)
class TorchReference:
    """Adapters are the branches that insert adds.

    Attributes:
        captured: The base model.
        branched: What adds an adapter's branches to it.
        arrays: A user's inputs by name, instead of sampled ones.
        tol: The gate.
    """

    captured: Captured
    branched: Callable[[Adapter], CapturedModule]
    arrays: Named | None = None
    tol: float = ORT_TOL

    def __post_init__(self) -> None:
        """Make the module of the base."""
        self.base = plain(self.captured).eval()
        self._last: tuple[Adapter | None, CapturedModule] = (None, self.base)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See Reference."""
        return onnx_conditions(self.base.conditions())

    @property
    def inputs(self) -> Inputs:
        """See Reference."""
        return execution_of(self.base).captured.inputs

    def details(self) -> Json:
        """See Reference."""
        return rows_of(execution_of(self.base).captured)

    def guards(self) -> tuple[Condition, ...]:
        """See Reference."""
        return guards(self.base)

    ceiling, mixes = CEILING, False

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """See Reference."""
        execution = execution_of(self.base)
        named = execution.sample(size, self.arrays, seed)
        example = execution.in_own_dtype()
        try:
            execution.flat(named)
        except (IndexError, RuntimeError, ValueError):  # inputs that depend on each other, maybe
            named = example if self.arrays is None and is_real(example) else named
        return arrays_of(named)

    def run(self, adapter: Adapter | None) -> Run:
        """See Reference."""
        return torch_run(self._module(adapter))

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """See Reference."""
        module = self._module(adapter)
        return choices_of(module, named_of(execution_of(module).in_own_dtype(), feeds))

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Fp32 against fp64."""
        return own_errors(self._module(adapter))

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """See Reference."""
        module = self._module(adapter)
        return prove(run, module, arrays=self.arrays, tol=self.tol, of=of, rerun=rerun)

    def _module(self, adapter: Adapter | None) -> CapturedModule:
        if adapter is None:
            return self.base
        if self._last[0] is not adapter:
            self._last = (adapter, self.branched(adapter).eval())
        return self._last[1]


# A training step is torch's: ONNX Runtime's loss, gradients and update at every size.
#
# What it has to equal is the train program, not rewritten, run with autograd and followed by
# torch.optim. A and B are drawn, so that every gradient has something to say; the optimizer's
# states are of the size of the gradients, but zero at the first size, where m' is the gradient
# itself. Gates are widened by the model's own rounding, as for any export: that of the same step in
# fp64, and of weights moved by half a unit of their last place.


LR, TAKEN, SEED = 1e-2, 3, 5
"""The rate, the number of the step and the seed at which steps are compared."""
DRAWN = 0.05
"""The deviation of drawn elements of B."""
MOVES = 12
"""Times that every weight is moved by half a unit of its last place: a loss is one number."""
DRAWS = 3
"""Of A and B. Where rounding turns a ReLU, a gradient is another one: no proof can be had there."""


def prove_step(
    run: Run,
    graph: TrainGraph,
    slots: Sequence[Slot],
    update: Update,
    labelled: Callable[[Named], tuple[Named, Array]],
    arrays: Named | None,
) -> list[Parity]:
    """Compare a step at every size; `run` gives {output: array} of {input: array}.

    Args:
        run: The file in ONNX Runtime.
        graph: The train program, whose scales are the module's own.
        slots: A and B of every update.
        update: The optimizer's part.
        labelled: The whole call of a batch without labels, and its labels.
        arrays: A user's inputs instead of sampled ones.
    """
    results: list[Parity] = []
    owner, generator = graph.module, np.random.default_rng(0)
    for named, _, extra in feeds_of(owner, arrays):
        try:
            named, labels = labelled(named)
        except (IndexError, RuntimeError, ValueError) as e:
            if not extra:
                raise
            leave_out(owner, shapes_of(arrays_of(named)), f"the model does not run there: {e}")
            continue
        feeds = {**arrays_of(named), "labels": labels}
        shapes = shapes_of(feeds)
        if refused := graph.traced.door.refused(tree_leaves(dict(named))):
            leave_out(owner, shapes, f"another path: {refused.message}")
            continue
        step = _Torch(graph, slots, update)
        for draw in range(DRAWS):
            held = {
                s.name: _drawn(s, attrgetter(s.tensor)(graph.flat), generator, draw) for s in slots
            }
            numbers = {"step": np.array(TAKEN, np.int64), "seed": np.array(SEED, np.int64)}
            given = {**feeds, **held, **numbers, "lr": np.array(LR, np.float32)}
            sizes = step.gradients(given)
            for s in (s for s in slots if s.trained) if STATES[update.optimizer] else ():
                size = max(float(np.sqrt(np.mean(sizes[s.name] ** 2))), 1e-6)
                moved = 0.5 * bool(results) * size
                m = moved * generator.standard_normal(held[s.name].shape)
                v = size**2 * generator.uniform(0.5, 1.5, m.shape)
                given |= {f"{s.name}.m": m.astype(np.float32), f"{s.name}.v": v.astype(np.float32)}
            expected, known = step(given), dict[str, float]()
            gates = {n: Gate(ORT_TOL, CEILING) for n in expected}
            own = partial(step.rounding, given, expected, known)
            with stage(f"comparing a step at {sizes_text(shapes)}"):
                found = compare_fairly(run(given), expected, shapes, gates, own, of="step")
            if found.ok or 4 * known.get(found.output, 0.0) < CEILING:
                break
        results.append(found)
    return results


def _drawn(slot: Slot, tensor: Tensor, generator: np.random.Generator, draw: int) -> Array:
    """At first what the module has, B drawn where it is 0; then moved. As the file has them."""
    start = np.swapaxes(to_numpy(tensor.detach()), -1, -2) * np.float32(slot.scale)
    drawn = generator.standard_normal(start.shape) * DRAWN
    moved = start if start.any() and not draw else start + drawn
    return np.ascontiguousarray(moved, np.float32)


@dataclass(frozen=True)
class _Torch:
    """The step by autograd and torch.optim, in fp32 or fp64, or of weights moved by a seed."""

    graph: TrainGraph
    slots: Sequence[Slot]
    update: Update
    wide: bool = False
    seed: int | None = None

    def gradients(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """∂L of the module's own tensors, by the names of slots."""
        held, _ = self._backward(given)
        return {n: to_numpy(w.grad) for n, w in held.items() if w.grad is not None}

    def __call__(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of a step."""
        held, loss = self._backward(given)
        trained = [s for s in self.slots if s.trained]
        adam = self.update.optimizer == "adamw"
        if self.update.clip:
            torch.nn.utils.clip_grad_norm_([held[s.name] for s in trained], self.update.clip)
        groups = [{"params": [held[s.name]], "lr": LR * s.rate} for s in trained]
        kind: Any = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(groups, lr=LR, weight_decay=self.update.weight_decay)
        for s in trained if adam else ():
            moments = {n: self._own(given[f"{s.name}.{x}"])
                       for n, x in (("exp_avg", "m"), ("exp_avg_sq", "v"))}  # fmt: skip
            optimizer.state[held[s.name]] = {"step": torch.tensor(TAKEN - 1.0), **moments}
        optimizer.step()
        made = {"loss": to_numpy(loss.detach())}
        for s in trained:
            w = held[s.name]
            made[f"{s.name}.next"] = np.swapaxes(to_numpy(w.detach()), -1, -2) * s.scale
            for n, x in (("exp_avg", "m"), ("exp_avg_sq", "v")) if adam else ():
                made[f"{s.name}.{x}.next"] = np.swapaxes(to_numpy(optimizer.state[w][n]), -1, -2)
        return made

    def rounding(
        self, given: Outputs, expected: Outputs, known: dict[str, float]
    ) -> Iterator[dict[str, float]]:
        """How far rounding moves each output, written into `known`: at first that of fp32."""
        exact = replace(self, wide=True)(given)
        yield grow(known, expected, exact)
        for seed in range(MOVES):
            yield grow(known, replace(self, seed=seed)(given), exact)

    def _backward(self, given: Mapping[str, Array]) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of the module by the names of slots, with gradients, and the loss."""
        held = {s.name: (self._own(given[s.name]) / s.scale).requires_grad_(s.trained)
                for s in self.slots}  # fmt: skip
        by_tensor = {s.tensor: held[s.name] for s in self.slots}
        run = _Run(self.graph.flat, by_tensor, self.wide, self.seed)
        inputs = [torch.tensor(given[n]) for n in self.graph.names]
        labels = torch.tensor(given["labels"])
        wide = _WideLoss() if self.wide else contextlib.nullcontext()
        with torch.enable_grad(), alike(self.graph.module), wide:
            loss = self.graph.loss(run, [run.read(x) for x in inputs], run.read(labels))
            loss.backward()  # type: ignore[no-untyped-call]
        return held, loss

    def _own(self, array: Array) -> Tensor:
        """An array of the file as the module lays it out."""
        dtype = np.float64 if self.wide else np.float32
        return from_numpy(np.swapaxes(array, -1, -2).astype(dtype))


class _WideLoss(TorchFunctionMode):
    """A loss in fp64: one that takes scores in float32 would round them as the fp32 step does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        args, kwargs = fx.node.map_aggregate((args, dict(kwargs or {})), widened)
        return func(*args, **kwargs)


class _Run(Wide):
    """A train program over tensors of its own by name, in fp32 or fp64."""

    def __init__(
        self, module: fx.GraphModule, tensors: Mapping[str, Tensor], wide: bool, seed: int | None
    ) -> None:
        super().__init__(module)
        self.tensors, self.wide = tensors, wide
        self.moves = None if seed is None else torch.Generator().manual_seed(seed)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.tensors:
            return self.tensors[target]
        held = super().get_attr(target, args, kwargs)
        return nearby(held, self.moves) if self.moves else held

    def read(self, x: Any) -> Any:
        return super().read(x) if self.wide else x
