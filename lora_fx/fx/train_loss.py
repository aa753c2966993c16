"""Losses of the training loop: the model's own, cross entropy, squared error, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.errors import LoraFxError

IGNORED = -100
"""A label that torch's cross entropy leaves out."""
Loss = Callable[[Any, torch.Tensor | None], torch.Tensor]


def loss_function(name: str | Loss, label: str, accepts: Callable[[str], bool]) -> tuple[Loss, str]:
    """(loss, argument that carries the labels into the model; empty where the loss takes them).

    `ce` and `mse` use the model's own loss where it takes the label column as an argument and
    returns one.
    """
    if callable(name):
        return name, ""
    if name not in ("ce", "mse"):
        raise LoraFxError(f"no loss {name!r}", "ce, mse or module:function")
    own = label if label and accepts(label) else ""

    def loss(out: Any, labels: torch.Tensor | None) -> torch.Tensor:
        found = field_of(out, "loss")
        if own and isinstance(found, torch.Tensor):
            return found
        scores = scores_of(out)
        if labels is None:
            raise LoraFxError("the data has no label column", "name it with --label")
        if name == "mse" and scores.squeeze(-1).shape != labels.squeeze(-1).shape:
            raise LoraFxError(
                f"the model gives {list(scores.shape)}, the labels are {list(labels.shape)}",
                "mse needs a label for every output",
            )
        if name == "mse":
            return nn.functional.mse_loss(scores.squeeze(-1).float(), labels.squeeze(-1).float())
        return _cross_entropy(scores, labels)

    return loss, own


def scores_of(out: Any) -> torch.Tensor:
    """`.logits`, else the first tensor that comes out."""
    scores = field_of(out, "logits")
    if isinstance(scores, torch.Tensor):
        return scores
    return next(t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))


def field_of(out: Any, name: str) -> Any:
    """An output's field, of a mapping or an object; None where it has none."""
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def _cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    check_labels(labels, scores.shape[-1])
    return nn.functional.cross_entropy(scores.flatten(0, -2).float(), labels.flatten().long())


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels that are no class of the model; -100 stands for "ignore"."""
    if labels.is_floating_point():
        raise LoraFxError(
            f"the labels are fractions such as {float(labels.flatten()[0]):g}; ce needs classes",
            "--loss mse fits numbers",
        )
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != IGNORED))]
    if wrong.numel():
        raise LoraFxError(
            f"label {int(wrong.max())}, but the model scores {classes} classes, 0 to {classes - 1}",
            "build the model with as many labels as the data has",
        )
