"""Branches on whether numbers are finite, in a graph that holds for those that are.

Detectors of transformers (RT-DETR, D-FINE, DETR …) clamp hidden states in train mode
`if not torch.isfinite(hidden_states).all()`, a rescue of float16. No export follows a branch on
values, and a recorded run would fix all sizes to the example's. Numbers that are not finite pass
through such a graph as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FINITE = (torch.isfinite, torch.Tensor.isfinite)
_NOT_FINITE = (torch.isinf, torch.Tensor.isinf, torch.isnan, torch.Tensor.isnan)
NOTE = "a branch on whether all numbers are finite is captured as finite numbers take it"


class FiniteNumbers(TorchFunctionMode):
    """A block in which a branch on whether numbers are finite takes the side of finite ones.

    Such a branch reads `torch.isfinite(x).all()`, `torch.isinf(x).any()` or `torch.isnan(x).any()`.

    Args:
        notes: Gets a note where there is one.
    """

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes
        self._checks: list[tuple[torch.Tensor, bool]] = []
        """A check of each number, and its answer for a finite one."""
        self._answers: list[tuple[torch.Tensor, bool]] = []
        """A check of all numbers, and its answer if all are finite."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; the truth of a check of all numbers is that of finite ones."""
        if func is torch.Tensor.__bool__:
            for tensor, answer in self._answers:
                if args[0] is tensor:
                    if NOTE not in self.notes:
                        self.notes.append(NOTE)
                    return answer

        result = func(*args, **(kwargs or {}))
        if func in _FINITE:
            self._checks.append((result, True))
        elif func in _NOT_FINITE:
            self._checks.append((result, False))
        elif func in (torch.all, torch.Tensor.all, torch.any, torch.Tensor.any):
            of_all = func in (torch.all, torch.Tensor.all)
            for tensor, finite in self._checks:
                if args[0] is tensor and finite is of_all:
                    self._answers.append((result, finite))
        return result
