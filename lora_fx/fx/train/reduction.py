"""Which mean a model's own loss is, found out by asking it two rows of 16 tokens.

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
TOKENS = 16
"""What a question about a model takes of the data: so much of it, whatever a batch has."""
VALUE_GATE = 1e-3
"""How far a loss may be from an answer's, relative; models in bfloat16 round it so far."""
GRADIENT_GATE = 2e-2
"""How far its gradient may be, relative to the largest; two answers differ by 10 % or more."""


def inputs_of(model: AdaptedModule, batch: Table, own: str = "") -> dict[str, object]:
    """A batch as the model's arguments, on its device; its labels only where the model has them."""
    device = device_of(model)
    columns = {k: v for k, v in batch.columns.items() if k != batch.label or own}
    return {k: from_numpy(v).to(device) for k, v in columns.items()}


def few(model: AdaptedModule, table: Table, rows: int) -> Table:
    """The first two rows of a table, cut to 16 tokens in the dimensions that the model has free.

    Args:
        model: The model.
        table: The data.
        rows: How many rows run at a time in training: as many are taken where the model's graph
            holds for one number of rows only, which is then that of training.
    """
    captured = execution_of(model).captured
    door = captured.traced(False, captured.named).door
    free = door.free(captured.requested)
    fixed = any(0 not in free.get(n, {}) for n in table.columns if n in door.names)
    batch = table.rows(np.arange(min(rows if fixed else ROWS, len(table)))).trimmed()
    if fixed:
        return batch
    known = {n: tuple(d for d in dims if d) for n, dims in free.items()}
    lengths = _lengths(batch, known)
    start = _start(batch.columns.get("attention_mask"))

    def cut(name: str, column: Array) -> Array:
        for d in known.get(name, tuple(range(1, column.ndim))):
            size = column.shape[d] if d < column.ndim else 0
            if size in lengths and size > TOKENS:
                first = min(start, size - TOKENS)
                column = column.take(range(first, first + TOKENS), axis=d)
        return column

    return Table({n: cut(n, c) for n, c in batch.columns.items()}, batch.label, batch.words)


def _lengths(batch: Table, free: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The sizes that count tokens: those of free second dimensions, and of labels of their own."""
    lengths = {c.shape[1] for n, c in batch.columns.items() if c.ndim > 1 and 1 in free.get(n, ())}
    labels = batch.columns.get(batch.label)
    if labels is not None and labels.ndim == 2 and batch.label not in free:
        inputs = (c for n, c in batch.columns.items() if n != batch.label)
        if all(labels.shape[1] not in c.shape[1:] for c in inputs):  # not the height of an image
            lengths.add(labels.shape[1])
    return lengths


def _start(mask: Array | None) -> int:
    """The first token that every row attends to, where rows are padded on the left."""
    if mask is None or mask.ndim != 2 or mask.dtype.kind not in "iub":
        return 0
    return int((mask != 0).argmax(1).max(initial=0))


@dataclass(frozen=True)
class Answer:
    """One mean that a loss may be.

    Attributes:
        counts: labels, next (labels but an example's first) or examples.
        shift: How many tokens lie between the scores and the label that they predict.
        by_row: Whether it is a mean over each row, and then over the rows.
    """

    counts: str
    shift: int
    by_row: bool

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Such a mean, of scores [rows, tokens, classes] and labels [rows, tokens]."""
        labels = labels[:, self.shift :]
        scores = scores[:, : labels.shape[1]]
        counted = (labels != IGNORED).float()
        each = nn.functional.cross_entropy(
            scores.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        if self.by_row:
            return ((each * counted).sum(1) / counted.sum(1)).mean()
        return (each * counted).sum() / counted.sum()


ANSWERS = (
    Answer("next", 1, by_row=False),
    Answer("labels", 0, by_row=False),
    Answer("examples", 1, by_row=True),
    Answer("examples", 0, by_row=True),
)


def reduction(model: AdaptedModule, table: Table, own: str, rows: int) -> str:
    """What the model's own loss of labels [rows, …] is a mean over; empty where it is no such mean.

    Args:
        model: The model.
        table: The data.
        own: The argument that carries the labels into the model.
        rows: As in few.
    """
    model.eval()
    question = few(model, table, rows)
    try:
        return _answer(model, question, own)
    except Exception:  # a model need not run at so few tokens; at all of them it has to
        whole = table.rows(np.arange(len(question))).trimmed()
        return _answer(model, whole, own)


def _answer(model: AdaptedModule, batch: Table, own: str) -> str:
    """The answer that fits the loss of these examples under labels of our own."""
    asked = _unlike(np.asarray(batch.columns[batch.label]))
    with torch.enable_grad():
        inputs = inputs_of(model, Table({**batch.columns, batch.label: asked}, batch.label), own)
        out = model(**inputs)
        loss = field_of(out, "loss")
        if not isinstance(loss, Tensor):
            return "labels"  # the loop's cross entropy is used
        scores = scores_of(out)
        gradient = _gradient(loss, [scores])
    labels = from_numpy(asked).to(scores.device).long()
    axis = class_axis(scores, labels)
    if axis is None:
        return ""

    def by_token(t: Tensor) -> Tensor:
        return t.detach().movedim(axis, -1).flatten(1, -2).float()

    leaf = by_token(scores).requires_grad_()
    slope = None if gradient is None else by_token(gradient)
    answers = [a for a in ANSWERS if not a.shift or labels.dim() == 2]
    fitting = (a for a in answers if _fits(a, leaf, labels.flatten(1), loss.detach(), slope))
    return next((a.counts for a in fitting), "")


def _unlike(labels: Array) -> Array:
    """Labels for every token of the first row and for few of the others.

    What is ignored gets a class that the data has.
    """
    classes = labels[labels != IGNORED]
    filled = np.where(labels == IGNORED, classes.min(initial=None) if classes.size else 0, labels)
    flat = filled.reshape(len(labels), -1)
    flat[1:, max(2, flat.shape[1] // 4) :] = IGNORED
    return flat.reshape(labels.shape)


def _gradient(loss: Tensor, scores: Iterable[Tensor]) -> Tensor | None:
    """∂loss/∂scores; None where the loss is not made of these scores."""
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss, tuple(scores), allow_unused=True)[0]


def _fits(
    answer: Answer, scores: Tensor, labels: Tensor, loss: Tensor, gradient: Tensor | None
) -> bool:
    """Whether a loss has the value and the gradient of an answer."""
    with torch.enable_grad():
        value = answer.loss(scores, labels)
        expected = _gradient(value, [scores])
    if not torch.allclose(value.detach(), loss.float(), rtol=VALUE_GATE, atol=0):
        return False
    if gradient is None or expected is None:
        return True
    return bool((gradient - expected).abs().max() <= GRADIENT_GATE * expected.abs().max())
