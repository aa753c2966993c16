"""Operators as torch dispatches them: a facade of torch's dispatch modes, and of its engine.

A `TorchDispatchMode` of our own sees each operator that runs.
Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "backward_in_modes", "enable_python_dispatcher"]


def backward_in_modes(loss: torch.Tensor) -> None:
    """Run the backward pass of a scalar in the modes that are active.

    `loss.backward()` and torch.autograd.backward leave the modes of torch.overrides first, and
    blocks that are computed again would run others of torch's functions than in forward.
    """
    engine = torch.autograd.Variable._execution_engine
    gradient = torch.ones_like(loss)
    engine.run_backward(
        (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
