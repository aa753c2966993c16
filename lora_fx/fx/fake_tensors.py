"""Tensors without values: the facade of `torch._subclasses`, `torch._guards` and their kin.

A fake tensor has a shape, a dtype and a device, and belongs to one mode; operators on it give fake
tensors of that mode. Sizes that are symbols are in `symbolic_sizes`.
Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["LOGGER", "FakeTensorMode", "detect_fake_mode", "is_fake", "is_wrapper"]

LOGGER = "torch._subclasses.fake_tensor"
"""The name of the logger for ops that fail on fake tensors."""


def is_fake(tensor: object) -> TypeGuard[FakeTensor]:
    """Whether it is a tensor of a trace, which has no values."""
    return isinstance(tensor, FakeTensor)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor stores its numbers in other tensors, as tensors of torchao do."""
    return bool(is_traceable_wrapper_subclass(tensor))
