"""The optimizers of torch by the names that transformers uses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_fx.text import Json

OptimizerRow = tuple[Callable[..., torch.optim.Optimizer], Json, tuple[str, ...]]
"""A torch class, its arguments, and its states for a tensor, of which `step` is a number."""


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_torch": (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq", "step")),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}, ("exp_avg", "exp_avg_sq", "step")),
    "sgd": (torch.optim.SGD, {}, ()),
    "rmsprop": (torch.optim.RMSprop, {}, ("square_avg", "step")),
    "adagrad": (torch.optim.Adagrad, {}, ("sum", "step")),
}
"""The optimizers by transformers' names, with the settings of its Trainer."""
