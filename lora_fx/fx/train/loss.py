"""The losses of the training loop: the model's own, cross entropy, squared error, a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, expect_name
from lora_fx.fx.tensors import has_values
from lora_fx.fx.trees import tree_leaves

UNLABELLED = (
    "name it labels; lora-fx train and plan take another name with --label; language models take "
    "text, prompt and completion, or messages"
)
IGNORED = -100
"""The label that torch's cross entropy ignores."""
Loss = Callable[[Any, torch.Tensor | None], torch.Tensor]


def loss_function(name: str | Loss, label: str, accepts: Callable[[str], bool]) -> tuple[Loss, str]:
    """Return the loss, and the model's argument for labels; empty if the loss takes the labels.

    `ce` is the model's own loss where it takes the label column as an argument and returns one.
    """
    if callable(name):
        return name, ""
    expect_name(name, ("ce", "mse"), "unknown loss", "use ce, mse or module:function")
    labels_argument = label if label and accepts(label) else ""

    def loss(out: object, labels: torch.Tensor | None) -> torch.Tensor:
        model_loss = field_of(out, "loss")
        if labels_argument and name == "ce" and isinstance(model_loss, torch.Tensor):
            return model_loss
        scores = scores_of(out)
        if labels is None:
            raise LoraFxError("the data has no label column", UNLABELLED)
        if name == "mse":
            return _squared_error(scores, labels)
        return _cross_entropy(scores, labels)

    return loss, labels_argument


def _squared_error(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if scores.squeeze(-1).shape != labels.squeeze(-1).shape:
        raise LoraFxError(
            f"the model gives {list(scores.shape)}, but the labels are {list(labels.shape)}",
            "pass a label for every output, as mse needs",
        )
    return nn.functional.mse_loss(scores.squeeze(-1).float(), labels.squeeze(-1).float())


def _cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    check_whole(labels)
    scores = classes_last(scores, labels)
    check_labels(labels, scores.shape[-1])
    return nn.functional.cross_entropy(scores.flatten(0, -2).float(), labels.flatten().long())


def class_axis(scores: torch.Tensor, labels: torch.Tensor) -> int | None:
    """Return the axis of classes in scores, the last or the second; None if unclear.

    Tokens have [rows, tokens, classes] for [rows, tokens]; pixels and the like have
    [rows, classes, height, width] for [rows, height, width], or for [rows, 1, height, width].
    """
    spots = tuple(labels.shape)
    if scores.dim() == len(spots) > 3 and spots[1] == 1:
        spots = (spots[0], *spots[2:])
    has_pixels = scores.dim() > 3
    last_fits = tuple(scores.shape[:-1]) == spots
    if last_fits and not (has_pixels and has_values(labels)):
        return -1
    second_fits = scores.dim() > 2 and (scores.shape[0], *scores.shape[2:]) == spots
    if last_fits and second_fits:
        return None
    if last_fits:
        return -1
    if second_fits:
        return 1
    # one label for every row of scores, however they are laid out
    if not has_pixels and scores.shape[:-1].numel() == labels.numel():
        return -1
    return None


def classes_last(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the scores with the classes in the last axis.

    Raises:
        LoraFxError: There is no score for every label, or the shapes fit both ways.
    """
    axis = class_axis(scores, labels)
    if axis is None:
        raise LoraFxError(
            f"the model gives {list(scores.shape)}, the labels are {list(labels.shape)}: the axis "
            "of the classes is unknown",
            "for ce pass labels [rows] for [rows, classes], [rows, tokens] for [rows, tokens, "
            "classes], [rows, height, width] for [rows, classes, height, width]; or use a loss "
            "function of your own",
        )
    return scores.movedim(axis, -1)


def scores_of(out: object) -> torch.Tensor:
    """Return the output's `.logits`, else its first tensor.

    Raises:
        LoraFxError: That is a single number, as of (loss, logits).
    """
    scores = field_of(out, "logits")
    if not isinstance(scores, torch.Tensor):
        scores = next(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
    if not scores.dim():
        raise LoraFxError(
            "the model's first output is a single number, not scores",
            "let forward return {'loss': …, 'logits': …}",
        )
    return scores


def field_of(out: object, name: str) -> object:
    """Return a field of an output, a mapping or an object; None if there is no such field."""
    if isinstance(out, Mapping):
        return out.get(name)
    return getattr(out, name, None)


def check_whole(labels: torch.Tensor) -> None:
    """Raise for labels that are fractions, since classes are integers."""
    if labels.is_floating_point() and has_values(labels):
        raise LoraFxError(
            f"the labels are fractions such as {float(labels.flatten()[0]):g}; ce needs classes",
            "use --loss mse to fit numbers",
        )


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise for labels that are not classes of the model; -100 means "ignore"."""
    if not has_values(labels):
        return
    check_whole(labels)
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != IGNORED))]
    if wrong.numel():
        label = int(wrong.max())
        way = "build the model with as many labels as the data has"
        if label < 0:
            way = "number the classes from 0"
        raise LoraFxError(
            f"label {label}, but the model scores {classes} classes, 0 to {classes - 1}",
            f"{way}; {IGNORED} means no label",
        )
