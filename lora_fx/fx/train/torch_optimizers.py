"""Optimizers of torch by transformers' names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_fx.text import Json

OptimizerRow = tuple[Callable[..., torch.optim.Optimizer], Json, tuple[str, ...]]
"""A class of torch, its arguments, and what it holds of a tensor; `step` is a number."""


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_torch": (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq", "step")),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}, ("exp_avg", "exp_avg_sq", "step")),
    "sgd": (torch.optim.SGD, {}, ()),
    "rmsprop": (torch.optim.RMSprop, {}, ("square_avg", "step")),
    "adagrad": (torch.optim.Adagrad, {}, ("sum", "step")),
}
"""Optimizers by transformers' names, with the values that its Trainer gives them."""
