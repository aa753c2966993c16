"""The check that a step's loss and gradients are finite, before any weight changes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.insertion import insertion_of

IN_DATA = "remove these rows from the data, or fill them"
"""The hint for examples that have NaN."""


def check_step(
    model: AdaptedModule, loss: float, norm: float, step: int, place_of_nan: str = ""
) -> None:
    """Raise if a step's loss or gradients are not finite, before the optimizer changes anything.

    Args:
        model: The model after backward.
        loss: The loss of this step.
        norm: The norm of all gradients together.
        step: Counted from 1.
        place_of_nan: Where the examples have NaN; see Table.

    Raises:
        LoraFxError: With exit code 1; names the first tensor, in the order of the targets, whose
            gradient is not finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    if place_of_nan and (math.isnan(loss) or math.isnan(norm)):
        raise not_finite(step, "loss", math.nan, place_of_nan, IN_DATA)
    gradients = list(_gradients(model))
    infinite = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
    where = "every gradient is finite, but their norm or the loss is not"
    if infinite:
        count = f"{len(infinite)} of {len(gradients)}"
        where = (
            f"the first one that is not finite is the gradient of {infinite[0]} ({count} are not)"
        )
    if not math.isfinite(loss):
        raise not_finite(step, "loss", loss, where)
    raise not_finite(step, "norm of the gradients", norm, where)


def _gradients(model: AdaptedModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name as text, gradient): A and B of every target, then tensors trained whole."""
    factors: set[int] = set()
    for key, pair in insertion_of(model).slots().items():
        for side, parameter in zip("AB", pair, strict=True):
            factors.add(id(parameter))
            if parameter.grad is not None:
                yield f"{side} of {key!r}", parameter.grad
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in factors:
            yield repr(name), parameter.grad


def not_finite(
    step: int, what: str, value: float, where: str, hint: str = "lower --lr, or check the data"
) -> LoraFxError:
    """Return the error of a run that is stopped because of a value that is not finite."""
    return LoraFxError(f"step {step}: the {what} is {value}; {where}", hint, exit_code=1)
