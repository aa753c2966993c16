"""The optimizer of a run, with its learning rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.train.learning_rate import factor
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.torch_optimizers import OPTIMIZERS


class Optimizer:
    """The optimizer of a run.

    Args:
        model: From insert; what requires grad is trained.
        settings: Learning rate, weight decay, warm-up, schedule.
        steps: The steps of the whole run.
    """

    def __init__(self, model: AdaptedModule, settings: Settings, steps: int) -> None:
        self.named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        optimizer_class, options, self.fields = OPTIMIZERS[settings.optimizer]
        groups = model.parameter_groups(settings.lr, settings.weight_decay)
        self._inner = optimizer_class(groups, lr=settings.lr, **options)
        self._peaks = [group["lr"] for group in self._inner.param_groups]
        self.steps = steps
        self.settings = settings

    @property
    def trained(self) -> list[nn.Parameter]:
        """The tensors that the optimizer updates."""
        return list(self.named.values())

    @property
    def moments_of_each(self) -> int:
        """How many tensors of its own size the optimizer keeps for each trained tensor."""
        return len(set(self.fields) - {"step"})

    def clear(self) -> None:
        """Set the gradients to None."""
        self._inner.zero_grad()

    def take(self, step: int) -> None:
        """Take a step, counted from 1, with the present gradients."""
        share = factor(step - 1, self.steps, self.settings.warmup, self.settings.schedule)
        for group, peak in zip(self._inner.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self._inner.step()

    @property
    def moved(self) -> list[str]:
        """The names of the tensors with moments, which are all that ever had a gradient."""
        return [name for name, p in self.named.items() if self._inner.state.get(p)]

    def moments(self) -> dict[str, torch.Tensor]:
        """Return the moments of all tensors that have some, as `NAME/exp_avg` and so on."""
        moments: dict[str, torch.Tensor] = {}
        for name in self.moved:
            state = self._inner.state[self.named[name]]
            for field in self.fields:
                moments[f"{name}/{field}"] = state[field]
        return moments

    def like(self, name: str) -> dict[str, torch.Tensor]:
        """Return, for each moment of a tensor, a tensor with its shape, dtype and device."""
        parameter = self.named[name]
        is_fused = self._inner.defaults.get("fused")
        step = torch.zeros((), device=parameter.device if is_fused else "cpu")
        return {field: step if field == "step" else parameter for field in self.fields}

    def put(self, name: str, moments: dict[str, torch.Tensor]) -> None:
        """Set the moments of one tensor, by field."""
        self._inner.state[self.named[name]] = dict(moments)
