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
from lora_fx.fx.capture.call import Signature, leaves_of, without_cache
from lora_fx.fx.graph.nodes import OverTensors, dtype_name, random_ops, value
from lora_fx.fx.graph.rounding import Wide, nearby
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.inputs import Named

SEEDS = 3
"""Times that the weights are moved to tell a graph's rounding."""


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
