"""Prove a model equal to another by running both: the check that stands before every write.

The gate is relative to the largest output: ORT_TOL for fp32. Where a model exceeds it, its own
fp32-against-fp64 error decides, output by output: 4 × that + 1e-7. Narrower dtypes are gated by
their own epsilon, and by the adapter's effect.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import (
    CEILING,
    EPSILON,
    ORT_TOL,
    Gate,
    Parity,
    compare_fairly,
    narrow_gate,
    rel,
    shapes_of,
    sizes_text,
)
from lora_fx.conditions import Condition, SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.capture.call import filled, leaf_names, onnx_conditions, onnx_name
from lora_fx.fx.capture.capture import Captured, alike
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.graph.nodes import dtype_name, random_ops
from lora_fx.fx.graph.ops import OPS
from lora_fx.fx.module.module import CapturedModule, by_output, copied, plain
from lora_fx.fx.tensors import has_values, to_numpy
from lora_fx.inputs import Extents, Inputs, Named
from lora_fx.passes.proofs.reference import Run
from lora_fx.progress import stage
from lora_fx.text import Json


def arrays_of(named: Named) -> dict[str, Array]:
    """The tensors among flattened named arguments, as arrays by ONNX input name."""
    return {
        onnx_name(n): to_numpy(x)
        for n, x in zip(leaf_names(named), pytree.tree_leaves(dict(named)), strict=True)
        if isinstance(x, torch.Tensor)
    }


def named_of(example: Named, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """What arrays_of was made of, in the structure of the example and with its constants."""
    first = next(x for x in pytree.tree_leaves(dict(example)) if isinstance(x, torch.Tensor))
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
) -> list[Parity]:
    """Run both at every size; sizes that a pinned dimension makes equal run once.

    Args:
        ours: {input: array} → {output: array}.
        reference: The model to be equal to, in eval mode.
        arrays: A user's inputs instead of sampled ones (one run).
        sizes: Instead of those of the capture.
        tol: The gate in fp32.
        of: A word for the report: what is compared.
    """
    reference.eval()
    results: list[Parity] = []
    growing, known = own_errors(reference, arrays, sizes), dict[str, float]()

    def own() -> Iterator[dict[str, float]]:
        yield known
        for errors in growing:  # for every size on from where the last one stopped
            known.update(errors)
            yield known

    for named, feeds, extra in feeds_of(reference, arrays, sizes):
        shapes = shapes_of(feeds)
        try:
            expected = reference.flat(named)
        except (IndexError, RuntimeError, ValueError) as e:
            where = ", ".join(f"{k} {list(v)}" for k, v in shapes.items())
            if _runs(reference.captured, named):
                raise LoraFxError(
                    f"the captured graph does not run at {where}, and the model does: "
                    f"{one_line(e, 160)}",
                    "fix the dimension with --static NAME:DIM, and report this model",
                ) from e
            if extra or (arrays is None and sizes is None and is_real(reference.captured.named)):
                # a size beyond a cut, or of inputs that depend on each other: the example remains
                leave_out(reference, shapes, f"the model does not run there: {one_line(e, 160)}")
                continue
            raise LoraFxError(
                f"the model does not run at {where}: {one_line(e, 160)}",
                "fix the dimension with --static NAME:DIM, or give real data with --inputs",
            ) from e
        reference.captured.unproven.pop(str(shapes), None)
        gates = {n: _gate(reference, named, n, v, tol) for n, v in expected.items()}
        with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
            results.append(compare_fairly(ours(feeds), expected, shapes, gates, own, of=of))
    return results


def feeds_of(
    reference: CapturedModule, arrays: Named | None = None, sizes: Sequence[Extents] | None = None
) -> Iterator[tuple[Named, dict[str, Array], bool]]:
    """(named arguments, {ONNX input: array}, whether it may fail) of every size and the example."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    captured = reference.captured
    every, sizes = sizes is None, sizes or captured.inputs.checks
    for size in sizes if arrays is None else sizes[:1]:
        named = reference.sample(size, arrays)
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
        example = reference._in_own_dtype()
        yield example, arrays_of(example), True


def leave_out(reference: CapturedModule, sizes: Mapping[str, tuple[int, ...]], reason: str) -> None:
    """Note a size that nothing is proven of, for the report."""
    row = {"sizes": {k: list(v) for k, v in sizes.items()}, "reason": reason}
    reference.captured.unproven[str(sizes)] = row


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
    leaves = (x for x in pytree.tree_leaves(dict(named)) if isinstance(x, torch.Tensor))
    return all(has_values(x) for x in leaves)


def guards(reference: CapturedModule) -> tuple[Condition, ...]:
    """The conditions outside which a file of this model may be another model.

    That it is one is not tried: at such sizes ONNX Runtime 1.31 may end the process, as a
    recurrent layer of no steps does.
    """
    implied = reference.captured.bounded_inputs().implied  # dimensions of one name say as much
    return onnx_conditions([c for c in reference.conditions() if not (c.demanded or implied(c))])


def outside(reference: CapturedModule, named: Named) -> SizeError | None:
    """Why the graph of the example does not hold at these sizes; None where it does."""
    captured = reference.captured
    traced = captured.traced(False, captured.named, reference.base_dtype)
    return traced.door.refused(pytree.tree_leaves(dict(named)))


def _gate(reference: CapturedModule, named: Named, name: str, expected: Any, tol: float) -> Gate:
    """`tol` for fp32; that of narrower outputs or adapted weights by their rounding."""
    found, updates = getattr(reference, "found", None), getattr(reference, "updates", {})
    stored = (found[key].parameter.dtype for key in updates) if found else ()
    eps = max(EPSILON.get(n, 0.0) for n in (expected.dtype.name, *stored, *_narrow(reference)))
    if not eps:
        return Gate(tol, CEILING)
    with reference.base():
        base = reference.flat(named)[name]
    return narrow_gate(tol, eps, base, expected)


def _narrow(reference: CapturedModule) -> set[str]:
    """The dtypes of a model's products: by autocast in forward not those of its weights."""
    captured = reference.captured
    traced = captured.traced(False, captured.named, reference.base_dtype)
    made = (n.meta.get("val") for n in traced.graph.nodes if n.target in OPS)
    return {dtype_name(v.dtype) for v in made if isinstance(v, torch.Tensor)}


FEW = 8
"""Numbers of an output, a loss, of which three moves of the weights tell too little."""


def own_errors(
    model: CapturedModule,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Iterator[dict[str, float]]:
    """Per output, how far rounding moves a model's values: the largest so far of several inputs.

    It is the rel of its fp32 values to its own in fp64, and of those with every weight moved by
    half a unit of its last place, which is what a fold does. One input may round well by chance, a
    user's too, so every size is drawn with every seed. Where no fp64 run is possible, the moved
    weights alone tell.
    """
    sizes = model.captured.inputs.checks if sizes is None else sizes
    example = model._in_own_dtype()
    calls: list[Callable[[], Named]]
    calls = [partial(model.sample, size, None, seed) for size in sizes for seed in seeds]
    if arrays is not None:
        calls.insert(0, partial(model.sample, sizes[0], arrays))
    elif is_real(example):  # what is drawn need not fit
        calls.insert(0, lambda: example)
    worst: dict[str, float] = {}
    graph, exactly = model.graph(False).graph, model.flat
    if not random_ops(graph):  # in fp64 torch draws other numbers
        exactly = _wide(model, graph)
    runs: list[tuple[Named, dict[str, Array]]] = []
    for call in calls:
        try:
            named = call()
            if outside(model, named):
                continue
            ours = model.flat(named)
        except (LoraFxError, RuntimeError, TypeError, ValueError, IndexError):
            continue  # it is no run of the proof either
        try:
            exact = exactly(named)
        except (RuntimeError, TypeError, ValueError):
            exactly, exact = model.flat, ours
        runs.append((named, exact))
        yield grow(worst, ours, exact)
    moved = copy.deepcopy(model).eval()  # one, moved anew for every seed
    few = any(v.size < FEW for _, values in runs for v in values.values())
    for seed in range(4 * len(seeds)) if few else seeds:
        _move(model, moved, seed)
        for named, values in runs:
            yield grow(worst, moved.flat(named), values)


def grow(
    worst: dict[str, float], values: Mapping[str, Array], exact: Mapping[str, Array]
) -> dict[str, float]:
    """The largest difference so far of each output, where these have a larger one; edits it."""
    for name, value in values.items():
        found = rel(value, exact[name])
        worst[name] = max(worst.get(name, 0.0), found if math.isfinite(found) else 0.0)
    return worst


def _wide(model: CapturedModule, graph: fx.Graph) -> Callable[[Named], dict[str, Array]]:
    """A model's eval graph in fp64: every float is one, every cast to a narrower one is to fp64.

    A capture of the model in fp64 would cost another, and a model that writes `x.float()` has none.
    """
    run = Wide(model, graph=graph)
    traced = model.captured.traced(False, model.captured.named, model.base_dtype)

    def exactly(named: Named) -> dict[str, Array]:
        leaves = [run.read(x) for x in pytree.tree_leaves(copied(named))]
        with torch.no_grad(), alike(model):
            out = run.run(*leaves, enable_io_processing=False)
        return by_output(pytree.tree_unflatten(list(out), traced.out_spec))

    return exactly


class Wide(fx.Interpreter):
    """A graph in fp64."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of an op, on numbers in fp64; an embedding's rows become it when gathered."""
        if target is not torch.ops.aten.embedding.default:
            args, kwargs = (fx.node.map_aggregate(a, self.read) for a in (args, kwargs))
        return self.read(super().call_function(target, args, kwargs))

    def read(self, x: Any) -> Any:
        """See widened."""
        return widened(x)


def widened(x: Any) -> Any:
    """A float as fp64, and the dtype of one as that of fp64; anything else as it is."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _move(model: CapturedModule, other: CapturedModule, seed: int) -> None:
    """Make another the model with every weight moved by half a unit of its last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(nearby(p, generator))


def nearby(x: Any, generator: torch.Generator) -> Any:
    """A tensor with every float moved by half a unit of its last place, up or down."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return x * (1 + signs * torch.finfo(x.dtype).eps / 2)


def torch_run(module: CapturedModule) -> Run:
    """A torch module as {input: array} → {output: array}."""
    return lambda feeds: module.flat(named_of(module._in_own_dtype(), feeds))


# A captured torch model as the reference of an export.


class TorchReference:
    """Adapters are the branches that insert adds.

    Args:
        captured: The base model.
        branched: What adds an adapter's branches to it.
        arrays: A user's inputs by name, instead of sampled ones.
        tol: The gate.
    """

    def __init__(
        self,
        captured: Captured,
        branched: Callable[[Adapter], CapturedModule],
        arrays: Named | None = None,
        tol: float = ORT_TOL,
    ) -> None:
        self.branched, self.arrays, self.tol = branched, arrays, tol
        self.base = plain(captured)
        self.base.eval()
        self._last: tuple[Adapter | None, CapturedModule] = (None, self.base)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See Reference."""
        return onnx_conditions(self.base.conditions())

    @property
    def inputs(self) -> Inputs:
        """See Reference."""
        return self.base.captured.inputs

    def details(self) -> Json:
        """See Reference."""
        return rows_of(self.base.captured)

    def guards(self) -> tuple[Condition, ...]:
        """See Reference."""
        return guards(self.base)

    ceiling, mixes = CEILING, False

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """See Reference."""
        named = self.base.sample(size, self.arrays, seed)
        example = self.base._in_own_dtype()
        try:
            self.base.flat(named)
        except (IndexError, RuntimeError, ValueError):  # inputs that depend on each other, maybe
            named = example if self.arrays is None and is_real(example) else named
        return arrays_of(named)

    def run(self, adapter: Adapter | None) -> Run:
        """See Reference."""
        return torch_run(self._module(adapter))

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Fp32 against fp64."""
        return own_errors(self._module(adapter))

    def prove(self, run: Run, adapter: Adapter | None, of: str) -> list[Parity]:
        """See Reference."""
        return prove(run, self._module(adapter), arrays=self.arrays, tol=self.tol, of=of)

    def _module(self, adapter: Adapter | None) -> CapturedModule:
        if adapter is None:
            return self.base
        if self._last[0] is not adapter:
            self._last = (adapter, self.branched(adapter).eval())
        return self._last[1]
