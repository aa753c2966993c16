"""Training steps of the .pt2 tests; imports no model's source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def loss_of(out: Any) -> torch.Tensor:
    """The model's own loss, or one that moves every output."""
    if not isinstance(out, torch.Tensor):
        loss: torch.Tensor = out["loss"]
        return loss
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return (out * weights).mean() + 0.01 * out.square().mean()


def steps(model: Any, kwargs: Mapping[str, Any], count: int) -> list[float]:
    """Losses of plain gradient steps on one batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    model.train()
    losses = []
    for _ in range(count):
        loss = loss_of(model(**kwargs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
