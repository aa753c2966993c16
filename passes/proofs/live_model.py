"""The user's own module during a proof: in eval mode, or with other values in its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_fx.fx.capture.unchanged import alike


@contextlib.contextmanager
def parameters_as(
    weights: Mapping[str, nn.Parameter], changed: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Put other values into the parameters while the block runs, so that every reader sees them."""
    original = {name: weights[name].data for name in changed}
    try:
        for name, value in changed.items():
            weights[name].data = value
        yield
    finally:
        for name, value in original.items():
            weights[name].data = value


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients, with fixed random numbers; then restore."""
    with alike(model, training=False), torch.no_grad():
        yield
