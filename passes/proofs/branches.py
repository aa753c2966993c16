"""The comparison of each branch with its module's forward on the weight W + s·b·a.

    branch   y' = y + s·b(a x)
    own      y' = forward(x), while the parameter of the module holds W + s·b·a

x is what the module gets when the model runs, and forward is that of its class: no graph has a part
in it. One weight is changed at a time and put back at once, so that no more memory is taken than
for the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from lora_fx.compare import (
    EPSILON,
    ORT_TOL,
    Gate,
    Parity,
    compare_fairly,
    grow,
    narrow_gate,
    wide_gate,
)
from lora_fx.dtypes import Array
from lora_fx.fx.attach.attachment import Attachment
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.graph.rounding import nearby
from lora_fx.fx.tensors import to_numpy
from lora_fx.passes.proofs.live_model import parameters_as
from lora_fx.passes.proofs.reference import SEEDS

TOLERANCE = {"float32": 1e-5, **{name: 8 * eps for name, eps in EPSILON.items()}}
"""The first gates beside W + s·b·a that was computed and rounded in a weight's dtype."""


class Branches:
    """A watcher of an attached model that compares each branch once, at its first useful call.

    Args:
        state: The attached model.

    Attributes:
        ran: Paths of the modules whose branch ran.
    """

    def __init__(self, state: Attachment) -> None:
        self.state = state
        self.ran: set[str] = set()
        self._results: dict[str, Parity] = {}
        self._paths = {id(state.model.get_submodule(path)): path for path in state.forms}

    def __call__(
        self,
        module: nn.Module,
        forward: Callable[[], torch.Tensor],
        y: torch.Tensor,
        branched: torch.Tensor,
    ) -> None:
        """Compare a branch.

        Args:
            module: The module.
            forward: Its own forward, on the input of this call.
            y: What that gave.
            branched: The same with the branch.
        """
        path = self._paths[id(module)]
        self.ran.add(path)
        if not self.state.switch.on or path in self._results:
            return
        parity = self._compared(path, module, forward, to_numpy(y), to_numpy(branched))
        if parity is not None and not parity.blank:
            self._results[path] = parity

    def wrong(self) -> Parity | None:
        """Return the comparison of a branch that exceeds its gate; None if there is none."""
        return next((parity for parity in self._results.values() if not parity.ok), None)

    def _compared(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[[], torch.Tensor],
        y: Array,
        branched: Array,
    ) -> Parity | None:
        """Compare one call; return None if no parameter can hold W + s·b·a."""
        merged = self.state.merged(module)
        if merged is None:
            return None
        leaf, program = merged
        weight = module._parameters[leaf]
        assert weight is not None

        def with_weight(changed: torch.Tensor) -> dict[str, Array]:
            with parameters_as({leaf: weight}, {leaf: changed}):
                return {path: to_numpy(forward())}

        changed = program(weight)
        assert isinstance(changed, torch.Tensor)
        expected = with_weight(changed)

        def rounding() -> Iterator[Mapping[str, float]]:
            largest_errors: dict[str, float] = {}
            for seed in SEEDS:
                generator = torch.Generator().manual_seed(seed)
                yield grow(largest_errors, with_weight(nearby(changed, generator)), expected)

        gate = _gate(dtype_name(weight.dtype), y, expected[path])
        sizes = {path: branched.shape}
        return compare_fairly({path: branched}, expected, sizes, {path: gate}, rounding)


def _gate(dtype: str, y: Array, expected: Array) -> Gate:
    """Return the gate of a module's result; see narrow_gate.

    Args:
        dtype: That of the weight.
        y: The result without an update.
        expected: The result with it.
    """
    eps = max(EPSILON.get(name, 0.0) for name in (dtype, expected.dtype.name))
    if eps:
        return narrow_gate(ORT_TOL, eps, y, expected)
    return wide_gate(TOLERANCE.get(expected.dtype.name, 1e-9), expected, lambda: y)
