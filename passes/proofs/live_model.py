"""The user's own module, as it runs for a proof: in eval mode, or with other numbers in it."""

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
    """Other numbers in the parameters themselves, so that every way of reading them sees them."""
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
    """Eval mode without gradients, with the same random numbers; the model is put back after it."""
    with alike(model, training=False), torch.no_grad():
        yield
