"""The cross entropy of a wide head, computed a few rows at a time to save memory.

    L = w Σᵢ CE(f(xᵢ), yᵢ)        f = what lies between the last hidden state and the scores

Whole, the scores of n rows and what autograd keeps of them are several times [n, classes]: at
49,152 classes more than all else that a step keeps. So each chunk of rows has its scores, its loss
and its gradients made in forward, as Liger's kernel and TRL's have it, and nothing of the scores is
kept: the products are those of the whole loss, and none is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.fx.train_regions import autocast_state, in_autocast, traced

Scores = Callable[..., Tensor]
"""(rows of every input, operands) → scores [rows, classes], each row's from that row alone."""
CHUNK = 2**24
"""Scores of a chunk: 64 MiB in float32, where the head's product is as fast as of all rows."""


@dataclass(frozen=True)
class ChunkedLoss:
    """A cross entropy in chunks, as the function of a program.

    Attributes:
        scores: What makes scores of rows.
        classes: How many scores a row has.
        mean: Whether it is a mean over the labels that count, and not their sum.
        ignored: The label that does not count.
        smoothing: The share of every label that all classes have alike.
    """

    scores: Scores
    classes: int
    mean: bool = True
    ignored: int = -100
    smoothing: float = 0.0

    def of(self, inputs: Sequence[Tensor], operands: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss; the scores of many rows are computed in chunks.

        Args:
            inputs: What each row is made of, [..., n] each.
            operands: What is the same for all rows: the head's weight, factors of its branch.
            labels: [rows].
        """
        rows = [x.flatten(0, -2) for x in inputs]
        if len(labels) <= self.rows_of_chunk or traced():
            return self.whole(rows, operands, labels)
        if not torch.is_grad_enabled():
            total, _ = self.in_chunks(rows, operands, labels, ())
            return total
        result: Tensor = _Chunked.apply(self, len(rows), labels, *rows, *operands)  # type: ignore[no-untyped-call]
        return result

    @property
    def rows_of_chunk(self) -> int:
        """The number of rows in one chunk."""
        return max(1, CHUNK // self.classes)

    def whole(self, rows: Sequence[Tensor], operands: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of all rows, computed at once."""
        scores = self.scores(*rows, *operands)
        return self._loss_of(scores, labels, "mean" if self.mean else "sum")

    def _loss_of(self, scores: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            scores,
            labels,
            reduction=reduction,
            ignore_index=self.ignored,
            label_smoothing=self.smoothing,
        )

    def in_chunks(
        self,
        rows: Sequence[Tensor],
        operands: Sequence[Tensor],
        labels: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and its gradients by the rows and operands that need one.

        Gradients of rows are put together, those of operands summed, in float32 at least.
        """
        needed = list(needs) or [False] * (len(rows) + len(operands))
        leaves = [
            value.detach().requires_grad_() if need else value
            for value, need in zip(operands, needed[len(rows) :], strict=True)
        ]
        of_rows = [
            torch.empty_like(x) if need else None
            for x, need in zip(rows, needed[: len(rows)], strict=True)
        ]
        of_operands: list[Tensor | None] = [None] * len(operands)
        divisor = (labels != self.ignored).sum() if self.mean else 1
        total = torch.zeros((), device=labels.device)
        dtype = total.dtype

        for place in self._places(len(labels)):
            chunk = [
                x[place].detach().requires_grad_(need)
                for x, need in zip(rows, needed[: len(rows)], strict=True)
            ]
            with torch.set_grad_enabled(any(needed)):
                loss = self._loss_of(self.scores(*chunk, *leaves), labels[place], "sum") / divisor
            dtype = loss.dtype
            total = total + loss.detach()
            wanted = [v for v, need in zip([*chunk, *leaves], needed, strict=True) if need]
            if not wanted:
                continue
            found = iter(torch.autograd.grad(loss, wanted))
            for whole, need in zip(of_rows, needed[: len(rows)], strict=True):
                if need and whole is not None:
                    whole[place] = next(found)
            for i, need in enumerate(needed[len(rows) :]):
                if need:
                    of_operands[i] = _added(of_operands[i], next(found))
            del loss, found

        summed = [
            d if d is None else d.to(value.dtype)
            for d, value in zip(of_operands, operands, strict=True)
        ]
        return total.to(dtype), [*of_rows, *summed]

    def _places(self, count: int) -> Iterator[slice]:
        """Yield the rows of each chunk; all chunks have about the same size."""
        chunks = -(-count // self.rows_of_chunk)
        for i in range(chunks):
            yield slice(i * count // chunks, (i + 1) * count // chunks)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum of an operand's gradients so far, in float32 or wider."""
    if total is None:
        return part.float() if part.dtype.itemsize < 4 else part
    return total.add_(part)


class _Chunked(torch.autograd.Function):
    """A loss that computes its gradients in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, loss: ChunkedLoss, count: int, labels: Tensor, *values: Any) -> Tensor:
        rows = values[:count]
        operands = values[count:]
        needs = ctx.needs_input_grad[3:]
        total, gradients = loss.in_chunks(rows, operands, labels, needs)
        kept = [d for d in gradients if d is not None]
        ctx.save_for_backward(labels, *values, *kept)
        ctx.loss = loss
        ctx.count = count
        ctx.has_gradient = [d is not None for d in gradients]
        ctx.autocast = autocast_state(total.device.type)
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        labels, *saved = ctx.saved_tensors
        has_gradient = ctx.has_gradient
        values = saved[: len(has_gradient)]
        if not torch.is_grad_enabled():
            kept = iter(saved[len(has_gradient) :])
            scaled = [next(kept) * d_loss if has else None for has in has_gradient]
            return (None, None, None, *scaled)

        # a graph of the gradients is asked for, which the loss has that is made whole
        with in_autocast(ctx.autocast):
            total = ctx.loss.whole(values[: ctx.count], values[ctx.count :], labels)
        wanted = [value for value, has in zip(values, has_gradient, strict=True) if has]
        made = iter(torch.autograd.grad(total, wanted, d_loss, create_graph=True))
        return (None, None, None, *(next(made) if has else None for has in has_gradient))


def loss_in_chunks(loss: ChunkedLoss) -> Callable[..., Tensor]:
    """Return the loss as a function of (inputs, operands, labels) for a program."""

    def chunked_loss(
        inputs: Sequence[Tensor], operands: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        return loss.of(inputs, operands, labels)

    return chunked_loss
