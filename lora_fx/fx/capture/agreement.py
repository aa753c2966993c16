"""Agreement: a graph gives its model's numbers, on a call.

Both sides draw the same random numbers, so that a train mode is compared too; a graph that draws
others, or in another order, does not agree. The gate is relative to each output's largest value:
that of fp32 for all, since both sides run the same kernels, and where it is exceeded four times
what rounding does to the graph. Which calls are compared, see drawn_calls.py.
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
from lora_fx.fx.capture.call import Signature, copied, leaves_of, without_cache
from lora_fx.fx.graph.nodes import OverTensors, dtype_name, random_ops, value
from lora_fx.fx.graph.rounding import Wide, nearby
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named

SEEDS = 3
"""How often the weights are moved to measure a graph's rounding."""


@dataclass(frozen=True)
class Agreement:
    """The comparison of a graph with its model.

    Attributes:
        model: The user's own.
        signature: That of its forward.
        graph: Its placeholders are the leaves of a call, and its outputs are flat.
        tensors: The tensors and bodies that the graph reads, by name.
        alone: Gives a block in which the model draws the same numbers, and is as it was after it.
        of: The name of the comparison, for a report.
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
        """Compare the graph with its model on one call; None if the model does not run on it.

        The first of these that applies decides:
        1. what this graph gave in another mode, to the bit: it agrees, and is not run again;
        2. it does not run, or gives other numbers of outputs or other shapes: infinitely far;
        3. it gives the same to the bit: it agrees;
        4. the gate.
        """
        try:
            expected = self._run(partial(self.signature.call, self.model), named)
        except Exception:  # it need not be an input that the model takes
            return None
        sizes = sizes_of(named)
        differs = Parity(sizes, math.inf, math.inf, ORT_TOL, "", self.of)
        agrees = Parity(sizes, 0.0, 0.0, ORT_TOL, "", self.of)
        if self.digests.get(str(sizes)) == _digest(expected):
            return agrees

        try:
            outputs = self._run(partial(self._of_graph, OverTensors), named)
        except Exception:  # a graph that is not the model's may not run
            return differs
        if len(outputs) != len(expected):
            return differs
        self.digests[str(sizes)] = _digest(outputs)

        our_tensors: list[torch.Tensor] = []
        their_tensors: list[torch.Tensor] = []
        for output, expected_output in zip(outputs, expected, strict=True):
            if not isinstance(expected_output, torch.Tensor):
                continue
            if not isinstance(output, torch.Tensor) or output.shape != expected_output.shape:
                return differs
            our_tensors.append(output)
            their_tensors.append(expected_output)
        if all(map(_equal_to_the_bit, our_tensors, their_tensors)):
            return agrees
        return self._by_the_gate(named, _arrays(our_tensors), _arrays(their_tensors))

    def _by_the_gate(
        self, named: Named, ours: dict[str, Array], theirs: dict[str, Array]
    ) -> Parity:
        for name, numbers in theirs.items():  # where both are no number, they agree
            both_nan = np.isnan(numbers) & np.isnan(ours[name])
            numbers[both_nan] = 0.0
            ours[name][both_nan] = 0.0
        gate = Gate(ORT_TOL, max(CEILING, 8 * self._epsilon()))
        gates = dict.fromkeys(theirs, gate)
        rounding = partial(self._rounding, named, ours)
        return compare_fairly(ours, theirs, sizes_of(named), gates, rounding, of=self.of)

    def _run(self, function: Callable[[Named], Any], named: Named) -> list[Any]:
        call = copied(named)
        with self.alone(), torch.no_grad():
            torch.manual_seed(0)
            return tree_leaves(without_cache(function(call)))

    def _of_graph(self, kind: Callable[..., OverTensors], named: Named) -> Any:
        interpreter = kind(self.tensors, self.graph)
        leaves = tree_leaves(dict(named))
        if isinstance(interpreter, Wide):
            leaves = [interpreter.read(leaf) for leaf in leaves]
        return interpreter.run(*leaves, enable_io_processing=False)

    def _epsilon(self) -> float:
        """The widest epsilon of the narrow dtypes that the graph computes in; else 0."""
        values = (value(node) for node in self.graph.nodes)
        dtypes = {dtype_name(v.dtype) for v in values if isinstance(v, torch.Tensor)}
        return max((EPSILON.get(name, 0.0) for name in dtypes), default=0.0)

    def _rounding(self, named: Named, outputs: Outputs) -> Iterator[Mapping[str, float]]:
        """Measure how far rounding moves the outputs: in fp64, then with randomly moved weights."""
        kinds: list[Callable[..., OverTensors]] = [partial(_Moved, seed) for seed in range(SEEDS)]
        if not random_ops(self.graph):  # fp64 draws other numbers
            kinds.insert(0, _WideOver)
        exact_outputs = outputs
        worst: dict[str, float] = {}
        for kind in kinds:
            try:
                leaves = self._run(partial(self._of_graph, kind), named)
            except (RuntimeError, TypeError, ValueError):
                continue
            moved_outputs = _arrays(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
            if kind is _WideOver:
                exact_outputs = moved_outputs
                yield grow(worst, outputs, exact_outputs)
            else:
                yield grow(worst, moved_outputs, exact_outputs)


def _equal_to_the_bit(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def _digest(outputs: Iterable[object]) -> bytes:
    """A digest of the tensors among some outputs, bit for bit."""
    digest = hashlib.sha256()
    for output in outputs:
        if isinstance(output, torch.Tensor):
            digest.update(str((output.dtype, output.shape)).encode())
            digest.update(np.ascontiguousarray(to_numpy(output)).view(np.uint8).data)
    return digest.digest()


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
        """The tensor that the graph reads by this name, moved."""
        return nearby(super().fetch_attr(target), self.generator)


def _arrays(outputs: Iterable[torch.Tensor]) -> dict[str, Array]:
    """Outputs by their number, a complex one as pairs of numbers."""
    arrays: dict[str, Array] = {}
    for i, output in enumerate(outputs):
        if output.is_complex():
            output = torch.view_as_real(output.resolve_conj())
        arrays[str(i)] = to_numpy(output).astype(np.float64)
    return arrays
