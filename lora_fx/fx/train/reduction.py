"""The kind of mean that a model's own loss is, found by running it on two rows of 16 tokens.

    loss = Σ w[row, token] · CE(scores[row, token], label[row, token])

The answers differ in w, which says how the parts of a batch count. In the question one row has a
label at every token and the others have few, so no two answers have the same w. The loss has to
have the value of an answer, and its gradient by the scores: where all scores are equal, as those
of an untrained head are, every mean has the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lora_fx.data import Table
from lora_fx.dtypes import Array
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of, from_numpy
from lora_fx.fx.train.loss import IGNORED, class_axis, field_of, scores_of

ROWS = 2
"""The number of rows for the runs that find out a loss, whatever a batch has."""
TOKENS = 16
"""The number of tokens per row in these runs."""
VALUE_GATE = 1e-3
"""The largest relative error of an equal loss, since models in bfloat16 round that much."""
GRADIENT_GATE = 2e-2
"""The same for the gradient, relative to its largest; two answers differ by 10 % or more."""


def inputs_of(model: AdaptedModule, batch: Table, own: str = "") -> dict[str, Tensor]:
    """Return a batch as the model's arguments, on its device; labels only if `own` is given."""
    device = device_of(model)
    return {
        name: from_numpy(column).to(device)
        for name, column in batch.columns.items()
        if name != batch.label or own
    }


def question_rows(model: AdaptedModule, table: Table, rows: int) -> Table:
    """Return two rows of a table, with free token dimensions cut to 16 tokens.

    Args:
        model: The model.
        table: The data.
        rows: How many rows run at a time in training: as many are taken where the model's graph
            holds for one number of rows only, which is then that of training.
    """
    captured = execution_of(model).captured
    door = captured.traced(False, captured.named).door
    free = door.free(captured.requested)
    arguments = [name for name in table.columns if name in door.names]
    rows_are_fixed = any(0 not in free.get(name, {}) for name in arguments)
    count = min(rows if rows_are_fixed else ROWS, len(table))
    batch = table.rows(np.arange(count)).trimmed()
    if rows_are_fixed:
        return batch

    free_axes = {name: tuple(axis for axis in axes if axis) for name, axes in free.items()}
    lengths = _lengths(batch, free_axes)
    start = _start(batch.columns.get("attention_mask"))
    columns = {}
    for name, column in batch.columns.items():
        axes = free_axes.get(name, tuple(range(1, column.ndim)))
        columns[name] = _cut(column, axes, lengths, start)
    return Table(columns, batch.label, batch.words)


def _cut(column: Array, axes: Iterable[int], lengths: set[int], start: int) -> Array:
    """Cut a column to 16 tokens from `start` on, in axes whose size counts tokens."""
    for axis in axes:
        size = column.shape[axis] if axis < column.ndim else 0
        if size in lengths and size > TOKENS:
            first = min(start, size - TOKENS)
            column = column.take(range(first, first + TOKENS), axis=axis)
    return column


def _lengths(batch: Table, free: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Return the sizes that count tokens, of free second dimensions and of separate labels."""
    lengths = {
        column.shape[1]
        for name, column in batch.columns.items()
        if column.ndim > 1 and 1 in free.get(name, ())
    }
    labels = batch.columns.get(batch.label)
    if labels is None or labels.ndim != 2 or batch.label in free:
        return lengths
    inputs = [column for name, column in batch.columns.items() if name != batch.label]
    is_input_size = any(labels.shape[1] in column.shape[1:] for column in inputs)
    if not is_input_size:  # such as the height of an image
        lengths.add(labels.shape[1])
    return lengths


def _start(mask: Array | None) -> int:
    """Return the first token that all rows attend to, if rows are padded on the left."""
    if mask is None or mask.ndim != 2 or mask.dtype.kind not in "iub":
        return 0
    return int((mask != 0).argmax(1).max(initial=0))


@dataclass(frozen=True)
class Answer:
    """A mean that a loss may be.

    Attributes:
        counts: labels, next (labels but an example's first) or examples.
        shift: How many tokens lie between the scores and the label that they predict.
        by_row: Whether it is a mean over each row, and then over the rows.
    """

    counts: str
    shift: int
    by_row: bool

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Compute this mean from scores [rows, tokens, classes] and labels [rows, tokens]."""
        labels = labels[:, self.shift :]
        scores = scores[:, : labels.shape[1]]
        counted = (labels != IGNORED).float()
        losses = nn.functional.cross_entropy(
            scores.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        if self.by_row:
            return ((losses * counted).sum(1) / counted.sum(1)).mean()
        return (losses * counted).sum() / counted.sum()


ANSWERS = (
    Answer("next", 1, by_row=False),
    Answer("labels", 0, by_row=False),
    Answer("examples", 1, by_row=True),
    Answer("examples", 0, by_row=True),
)


def reduction(model: AdaptedModule, table: Table, own: str, rows: int) -> str:
    """Return the items over which the model's own loss is a mean; empty if it is none of these.

    Args:
        model: The model.
        table: The data.
        own: The argument that carries the labels into the model.
        rows: As in question_rows.
    """
    model.eval()
    question = question_rows(model, table, rows)
    try:
        return _answer(model, question, own)
    except Exception:  # a model need not run at so few tokens; at all of them it has to
        uncut = table.rows(np.arange(len(question))).trimmed()
        return _answer(model, uncut, own)


def _answer(model: AdaptedModule, batch: Table, own: str) -> str:
    """Return the items of the answer that fits the model's loss, under labels chosen here."""
    question = _unlike(np.asarray(batch.columns[batch.label]))
    with torch.enable_grad():
        columns = {**batch.columns, batch.label: question}
        out = model(**inputs_of(model, Table(columns, batch.label), own))
        loss = field_of(out, "loss")
        if not isinstance(loss, Tensor):
            return "labels"  # the loop's cross entropy is used
        scores = scores_of(out)
        gradient = _gradient(loss, [scores])
    labels = from_numpy(question).to(scores.device).long()
    axis = class_axis(scores, labels)
    if axis is None:
        return ""

    leaf = _by_token(scores, axis).requires_grad_()
    slope = None if gradient is None else _by_token(gradient, axis)
    for answer in ANSWERS:
        if answer.shift and labels.dim() != 2:
            continue
        if _fits(answer, leaf, labels.flatten(1), loss.detach(), slope):
            return answer.counts
    return ""


def _by_token(scores: Tensor, axis: int) -> Tensor:
    """Return scores, or their gradient, as [rows, tokens, classes] in float32."""
    return scores.detach().movedim(axis, -1).flatten(1, -2).float()


def _unlike(labels: Array) -> Array:
    """Return labels for every token of the first row and for few tokens of the other rows.

    Ignored labels get a class that the data has.
    """
    classes = labels[labels != IGNORED]
    lowest = classes.min(initial=None) if classes.size else 0
    flat = np.where(labels == IGNORED, lowest, labels).reshape(len(labels), -1)
    flat[1:, max(2, flat.shape[1] // 4) :] = IGNORED
    return flat.reshape(labels.shape)


def _gradient(loss: Tensor, scores: Iterable[Tensor]) -> Tensor | None:
    """Return ∂loss/∂scores; None if the loss does not depend on these scores."""
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss, tuple(scores), allow_unused=True)[0]


def _fits(
    answer: Answer, scores: Tensor, labels: Tensor, loss: Tensor, gradient: Tensor | None
) -> bool:
    """Whether a loss has the value and the gradient that an answer predicts."""
    with torch.enable_grad():
        value = answer.loss(scores, labels)
        expected = _gradient(value, [scores])
    if not torch.allclose(value.detach(), loss.float(), rtol=VALUE_GATE, atol=0):
        return False
    if gradient is None or expected is None:
        return True
    return bool((gradient - expected).abs().max() <= GRADIENT_GATE * expected.abs().max())
