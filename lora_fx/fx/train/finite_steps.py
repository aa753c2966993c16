"""A step whose loss or gradient is not finite: the error names it, before any weight moves."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.insertion import insertion_of


def check_step(model: AdaptedModule, loss: float, norm: float, step: int) -> None:
    """Stop before the optimizer moves anything.

    Args:
        model: The model after backward.
        loss: The loss of this step.
        norm: The norm of all gradients together.
        step: Counted from 1.

    Raises:
        LoraFxError: With exit code 1; names the first tensor, in the order of the targets, whose
            gradient is not finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    grads = list(_gradients(model))
    bad = [what for what, grad in grads if not bool(grad.isfinite().all())]
    if bad:
        where = f"first not finite: the gradient of {bad[0]} ({len(bad)} of {len(grads)} are not)"
    else:
        where = "every gradient is finite, their norm or the loss is not"
    what, value = ("loss", loss) if not math.isfinite(loss) else ("norm of the gradients", norm)
    raise not_finite(step, what, value, where)


def _gradients(model: AdaptedModule) -> Iterator[tuple[str, torch.Tensor]]:
    """(what it is called, gradient): A and B of every target, then tensors trained whole."""
    seen: set[int] = set()
    for key, pair in insertion_of(model).slots().items():
        for side, p in zip("AB", pair, strict=True):
            seen.add(id(p))
            if p.grad is not None:
                yield f"{side} of {key!r}", p.grad
    for name, p in model.named_parameters():
        if p.grad is not None and id(p) not in seen:
            yield repr(name), p.grad


def not_finite(step: int, what: str, value: float, where: str) -> LoraFxError:
    """The error of a run that was stopped."""
    return LoraFxError(
        f"step {step}: the {what} is {value}; {where}",
        "a lower --lr, or look at the data",
        exit_code=1,
    )
