"""Transforms of torch.func that are active: the facade of torch's functorch.

Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import torch


def transforms_are_active() -> bool:
    """Whether a transform of torch.func is active: grad, vmap, jvp or functionalize."""
    return bool(torch._C._are_functorch_transforms_active())
