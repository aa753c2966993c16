"""Interception of every operator that a run calls: the facade of torch's modes and transforms.

`make_fx` writes a run down as a graph. While it does, `get_proxy_mode` gives the mode that writes,
and `get_proxy_slot` the node of a tensor. A `TorchDispatchMode` of our own sees each operator as
torch dispatches it. Tried with torch 2.13.
"""

from __future__ import annotations

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "get_proxy_mode",
    "get_proxy_slot",
    "make_fx",
    "transforms_are_active",
]


def transforms_are_active() -> bool:
    """Whether torch.func transforms what is run now: in grad, vmap, jvp or functionalize."""
    return bool(torch._C._are_functorch_transforms_active())
