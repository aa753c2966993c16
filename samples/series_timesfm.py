"""Adapt a time series model (TimesFM) to a season that it has not seen.

`python samples/series_timesfm.py` needs `pip install 'lora-fx[domains]'`. The architecture is
TimesFM's own, from transformers, at a small size and with random weights: no package has trained
ones.
"""

from __future__ import annotations

import math

import torch
from domains import Batch, adapt, prove, train
from torch import nn
from transformers import TimesFmConfig, TimesFmModelForPrediction

PAST, FUTURE = 128, 32
torch.manual_seed(0)


def batch(size: int = 8) -> Batch:
    """Series with a period of 24 steps, a phase of their own and some noise."""
    phase = 24 * torch.rand(size, 1)
    time = torch.arange(PAST + FUTURE)
    series = torch.sin(2 * math.pi * (time + phase) / 24) + 0.1 * torch.randn(size, PAST + FUTURE)
    return {"past_values": series[:, :PAST], "future_values": series[:, PAST:]}


base = TimesFmModelForPrediction(
    TimesFmConfig(
        patch_length=16, context_length=PAST, horizon_length=FUTURE, num_hidden_layers=3,
        hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4,
    )
).eval()  # fmt: skip
print("TimesFM, 3 layers, random weights")

batches = [batch() for _ in range(4)]
inputs = {"past_values": batches[0]["past_values"]}
adapted = adapt(base, inputs)


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean square error of the forecast."""
    forecast = module(past_values=batch["past_values"]).mean_predictions
    return (forecast - batch["future_values"]).square().mean()


train(adapted, batches, loss)
prove(base, adapted, inputs)
