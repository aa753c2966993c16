"""Agreement: a graph gives its model's numbers, at the example and at sizes that are drawn.

A graph whose blocks were copied may be the model's at the example and nowhere else: a window or a
clip of distances shows beyond its own length only. So two calls more are drawn. In one every free
size but the batch is four times the example's; in the other the batch is, the rest is small, and
floats are large. They are nearer where the graph holds only nearer, where the model does not run,
and beyond LONGEST, where a run would take long; a call of more than MOST_NUMBERS has no more than
four times the example's.

Both sides draw the same random numbers, so that a train mode is compared too; a graph that draws
others, or in another order, does not agree. The gate is relative to each output's largest value:
that of fp32 for all, since both sides run the same kernels, and where it is exceeded four times
what rounding does to the graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.compare import CEILING, EPSILON, ORT_TOL, Gate, Outputs, Parity, compare_fairly, grow
from lora_fx.dtypes import Array
from lora_fx.fx.capture.call import Signature, leaves_of, sample_call, without_cache
from lora_fx.fx.graph.nodes import OverTensors, dtype_name, random_ops, value
from lora_fx.fx.graph.rounding import Wide, nearby
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.inputs import BATCH, LARGEST_CUT, Inputs, Named

TIMES = (4, 3, 2)
"""A drawn size in those of the example; the first that the graph and the model take."""
LONGEST = 1024
"""No free size is drawn larger than this, or than the example's."""
MOST_NUMBERS = 2**22
"""Of one input of a drawn call that has more than four times the example's."""
SMALL = 3
"""A free size where the batch is large."""
LARGE = 16.0
"""By what floats are multiplied there: a clip of values shows at large ones only."""
SEEDS = 3
"""Times that the weights are moved to tell a graph's rounding."""
aten = torch.ops.aten
_COMPARES = {
    *(getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne", "rsub")),
    *(getattr(aten, name).Scalar for name in ("remainder", "fmod", "floor_divide")),
    *(getattr(aten, name).default for name in ("clamp", "clamp_min", "clamp_max", "clip")),
    *(getattr(aten, name).default for name in ("hardtanh", "threshold", "tril", "triu")),
    *(aten.floor_divide.default, aten.div.Tensor_mode, aten.sub.Tensor),
    *(aten.full.default, aten.full_like.default),  # for a minimum of two tensors
}


@dataclass(frozen=True)
class Agreement:
    """A graph beside its model.

    Attributes:
        model: The user's own.
        signature: That of its forward.
        graph: Whose placeholders are the leaves of a call and whose outputs are flat.
        tensors: What the graph reads, by name.
        alone: Gives a block in which the model draws the same numbers, and is as it was after it.
        of: What is compared, for a report.
        digests: Sizes → a digest of what this graph gave there in another mode: it is run once.
    """

    model: nn.Module
    signature: Signature
    graph: fx.Graph
    tensors: Mapping[str, Any]
    alone: Callable[[], AbstractContextManager[object]]
    of: str = ""
    digests: dict[str, bytes] = field(default_factory=dict)

    def at(self, named: Named) -> Parity | None:
        """Both on one call; None where the model does not run on it."""
        try:
            expected = self._run(partial(self.signature.call, self.model), named)
        except Exception:  # it need not be an input that the model takes
            return None
        sizes = sizes_of(named)
        differs = Parity(sizes, math.inf, math.inf, ORT_TOL, "", self.of)
        same = Parity(sizes, 0.0, 0.0, ORT_TOL, "", self.of)
        if self.digests.get(str(sizes)) == _digest(expected):
            return same
        try:
            outputs = self._run(partial(self._of_graph, OverTensors), named)
        except Exception:  # a graph that is not the model's may not run
            return differs
        if len(outputs) != len(expected):
            return differs
        self.digests[str(sizes)] = _digest(outputs)
        pairs = [
            (a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(b, torch.Tensor)
        ]
        if not all(isinstance(a, torch.Tensor) and a.shape == b.shape for a, b in pairs):
            return differs
        if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
            return same
        ours = _arrays(a for a, _ in pairs)
        theirs = _arrays(b for _, b in pairs)
        for name, numbers in theirs.items():  # where both are no number, they agree
            both = np.isnan(numbers) & np.isnan(ours[name])
            numbers[both] = ours[name][both] = 0.0
        gate = Gate(ORT_TOL, max(CEILING, 8 * self._epsilon()))
        own = partial(self._rounding, named, ours)
        return compare_fairly(ours, theirs, sizes, dict.fromkeys(theirs, gate), own, of=self.of)

    def _run(self, function: Callable[[Named], Any], named: Named) -> list[Any]:
        apart = tree_map_only(torch.Tensor, torch.clone, dict(named))
        with self.alone(), torch.no_grad():
            torch.manual_seed(0)
            return tree_leaves(without_cache(function(apart)))

    def _of_graph(self, kind: Callable[..., OverTensors], named: Named) -> Any:
        run = kind(self.tensors, self.graph)
        leaves = tree_leaves(dict(named))
        if isinstance(run, Wide):
            leaves = [run.read(x) for x in leaves]
        return run.run(*leaves, enable_io_processing=False)

    def _epsilon(self) -> float:
        """The widest epsilon of the narrow dtypes that the graph computes in; else 0."""
        made = (value(n) for n in self.graph.nodes)
        dtypes = {dtype_name(v.dtype) for v in made if isinstance(v, torch.Tensor)}
        return max((EPSILON.get(name, 0.0) for name in dtypes), default=0.0)

    def _rounding(self, named: Named, outputs: Outputs) -> Iterator[Mapping[str, float]]:
        """How far rounding moves the graph's outputs: fp64, then weights moved by lot."""
        kinds: list[Callable[..., OverTensors]] = [partial(_Moved, seed) for seed in range(SEEDS)]
        if not random_ops(self.graph):  # fp64 draws other numbers
            kinds.insert(0, _WideOver)
        exact, worst = outputs, dict[str, float]()
        for kind in kinds:
            try:
                made = self._run(partial(self._of_graph, kind), named)
            except (RuntimeError, TypeError, ValueError):
                continue
            moved = _arrays(x for x in made if isinstance(x, torch.Tensor))
            if kind is _WideOver:
                exact = moved
            yield grow(worst, outputs if kind is _WideOver else moved, exact)


def _digest(outputs: Iterable[object]) -> bytes:
    """Of the tensors among some outputs, bit for bit."""
    found = hashlib.sha256()
    for x in outputs:
        if isinstance(x, torch.Tensor):
            found.update(str((x.dtype, x.shape)).encode())
            found.update(np.ascontiguousarray(to_numpy(x)).view(np.uint8).data)
    return found.digest()


def sizes_of(named: Named) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's tensors, by the names of the leaves."""
    return {n: tuple(x.shape) for n, x in leaves_of(named) if isinstance(x, torch.Tensor)}


class _WideOver(Wide, OverTensors):
    """A graph over tensors by name, in fp64."""


class _Moved(OverTensors):
    """A graph whose weights are moved by up to a unit of their last place."""

    def __init__(self, seed: int, tensors: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__(tensors, graph)
        self.generator = torch.Generator().manual_seed(seed)

    def fetch_attr(self, target: str) -> Any:
        """What the graph reads by this name, moved."""
        return nearby(super().fetch_attr(target), self.generator)


def _arrays(outputs: Iterable[torch.Tensor]) -> dict[str, Array]:
    """Outputs by their number, a complex one as pairs of numbers."""
    real = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in outputs)
    return {str(i): to_numpy(x).astype(np.float64) for i, x in enumerate(real)}


def drawn_calls(
    inputs: Inputs, named: Named, graph: fx.Graph, device: torch.device
) -> list[Iterator[Named]]:
    """Calls beyond the example's sizes: for each of two, what to try one after the other.

    Args:
        inputs: The signature, with the limits and the free sizes of the graph.
        named: The example.
        graph: Whose numbers tell which sizes may matter.
        device: Of the example's tensors.
    """
    example = _example_sizes(inputs)
    most = _most(inputs, example)
    others = {s: n for s, n in example.items() if s != BATCH}
    batch = {s: n for s, n in example.items() if s == BATCH}
    beyond = max((2 * n + 1 for n in _numbers(graph)), default=0)

    def times(sizes: Mapping[str, int], least: int = 0) -> list[dict[str, int]]:
        wanted = ({s: max(k * n, least) for s, n in sizes.items()} for k in TIMES)
        return [{s: min(n, most[s]) for s, n in w.items()} for w in wanted]

    long, wide = times(others, beyond), times(batch)
    if others and batch:
        few = {BATCH: min(batch[BATCH], 2)}
        small = {s: min(n, SMALL) for s, n in others.items()}
        long = [few | sizes for sizes in long]
        wide = [sizes | lengths for lengths in (small, others) for sizes in wide]
    elif example:
        long = long if others else wide
        wide = [{s: n + 1 for s, n in example.items()}]
    seen = {tuple(s.shape for s in inputs.specs)}
    rows = [[sizes for sizes in tried if _is_other(inputs, sizes, seen)] for tried in (long, wide)]
    factors = ((1.0,), (LARGE, 1.0))

    def drawn(seed: int) -> Iterator[Named]:
        for factor in factors[seed]:
            for sizes in rows[seed]:
                yield _scaled(sample_call(inputs, named, sizes, seed, device=device), factor)

    return [drawn(i) for i, row in enumerate(rows) if row]


def _example_sizes(inputs: Inputs) -> dict[str, int]:
    """What the symbols of free sizes are in the example."""
    found: dict[str, int] = {}
    for spec in inputs.specs:
        for d, symbol in spec.dims.items():
            if "+" not in symbol:
                found[symbol] = max(found.get(symbol, 0), spec.shape[d])
    return found


def _most(inputs: Inputs, example: Mapping[str, int]) -> dict[str, int]:
    """The largest value of every symbol."""
    most = {s: max(n, LONGEST) for s, n in example.items()}
    for condition in inputs.conditions:
        _, high = condition.bounds()
        symbol = inputs.symbol(*condition.sizes[0][1:])
        if high is not None and symbol in most:
            most[symbol] = min(most[symbol], high)
    return most


def _numbers(graph: fx.Graph) -> list[int]:
    """Whole numbers that positions may be compared with: windows, clips of distances."""
    operands = (a for n in graph.nodes if n.target in _COMPARES for a in n.args[1:])
    whole = [abs(int(a)) for a in operands if isinstance(a, (int, float)) and a == a // 1]
    return [n for n in whole if 2 * n < LARGEST_CUT]


def _is_other(
    inputs: Inputs, sizes: Mapping[str, int], seen: set[tuple[tuple[int, ...], ...]]
) -> bool:
    """Whether the nearest sizes that the graph takes are new, and not too large to run."""
    found = inputs.sizes(sizes)
    shapes = tuple(found[s.name] for s in inputs.specs)
    numbers = [(math.prod(found[s.name]), math.prod(s.shape)) for s in inputs.specs]
    if shapes in seen or any(n > max(MOST_NUMBERS, TIMES[0] * m) for n, m in numbers):
        return False
    seen.add(shapes)
    return True


def _scaled(named: Named, factor: float) -> Named:
    def times(x: torch.Tensor) -> torch.Tensor:
        return x * factor if x.is_floating_point() else x

    return dict(tree_map_only(torch.Tensor, times, dict(named)))
