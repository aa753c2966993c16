"""How much of the data runs before the first step, and what is found out from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.data import Buckets, Table
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.objective import UNKNOWN, objective
from lora_fx.fx.train.reduction import ROWS, TOKENS
from lora_fx.fx.train.settings import Settings

LONG, CLASSES = 96, 11
Reduce = Callable[[Tensor, Tensor], Tensor]


def by_token(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def shifted(scores: Tensor, labels: Tensor) -> Tensor:
    return by_token(scores[:, :-1], labels[:, 1:])


def by_row(scores: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
    return (each.sum(1) / (labels != -100).sum(1)).mean()


def by_row_shifted(scores: Tensor, labels: Tensor) -> Tensor:
    return by_row(scores[:, :-1], labels[:, 1:])


def total(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")


def smoothed(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def weighted(scores: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(1.0, CLASSES + 1)
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight)


def with_more(scores: Tensor, labels: Tensor) -> Tensor:
    return by_token(scores, labels) + 0.01 * scores.square().mean()


def over_all_tokens(scores: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
    return each.mean()


class Text(nn.Module):
    """A language model of two blocks alike, or a tagger: its loss says which."""

    def __init__(self, reduce: Reduce, *, trained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reduce = reduce
        self.embed = nn.Embedding(CLASSES, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)
        if not trained:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        h = self.embed(input_ids)
        if attention_mask is not None:
            h = h * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.reduce(logits, labels), "logits": logits}


class Pooled(Text):
    """A classifier of texts, with a loss of its own or without one."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = super().forward(input_ids, attention_mask)["logits"].mean(1)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Pixels(nn.Module):
    """A classifier of pixels, whose labels stand for the second axis of its scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(torch.relu(self.first(pixel_values)))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Chunked(Text):
    """Takes texts of whole chunks of 48 tokens only."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        rows, length = input_ids.shape
        chunks = input_ids.view(rows, length // 48, 48)
        return super().forward(chunks.view(rows, length), attention_mask, labels)


def texts(kind: str = "right", rows: int = 12) -> Table:
    """Rows of 3 to 96 tokens, padded on the right or the left, or whole."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CLASSES, (rows, LONG))
    lengths = rng.integers(3, LONG, rows)
    lengths[:3] = LONG  # trimming leaves all of them
    mask = np.arange(LONG) < lengths[:, None]
    mask = mask[:, ::-1].copy() if kind == "left" else mask
    mask = np.ones_like(mask) if kind == "whole" else mask
    labels = np.where(mask, ids, -100)
    if kind == "prompt":  # of a chat: the first tokens are not trained on
        mask[:, :60] = True
        labels = np.where(mask, ids, -100)
        labels[:, :40] = -100
    columns = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
    return Table(columns, "labels")


def adapted(net: nn.Module, **shape: Any) -> Any:
    ids = torch.zeros(3, shape.get("length", 8), dtype=torch.long)
    args = (ids, torch.ones_like(ids))
    return lora_fx.insert(net.eval(), args, rank=2, include="layers.*", dead="keep")


class Counted(TorchDispatchMode):
    """Counts the tokens that tables are read for, in every program and in the live model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and type(args[1]) is Tensor:
            self.tokens += args[1].numel()
        return func(*args, **(kwargs or {}))


@dataclass
class Seen:
    """The calls of a model until its first step, by a forward hook: rows and tokens of each."""

    calls: list[tuple[int, ...]]
    tokens: int
    warnings: list[str]


def before_the_first_step(model: Any, data: Table | Buckets, **settings: Any) -> Seen:
    calls: list[tuple[int, ...]] = []
    counter = Counted()
    counts: list[int] = []

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            counts.append(counter.tokens)
            return
        first = next(iter({**dict(enumerate(args)), **kwargs}.values()))
        calls.append((first.shape[0], *first.shape[1:][-1:]))

    with model.register_forward_pre_hook(watch, with_kwargs=True), counter:
        report = fit(model, data, settings=Settings(steps=1, **settings))
    return Seen(calls, counts[0], report.warnings)


QUESTIONS: dict[str, tuple[Reduce, str]] = {
    "mean over tokens": (by_token, "labels"),
    "mean over tokens, shifted": (shifted, "next"),
    "mean over rows": (by_row, "examples"),
    "mean over rows, shifted": (by_row_shifted, "examples"),
    "sum": (total, ""),
    "label smoothing": (smoothed, ""),
    "weights by class": (weighted, ""),
    "and a penalty": (with_more, ""),
    "mean over ignored tokens too": (over_all_tokens, ""),
}


EQUAL_SCORES = ["mean over tokens", "mean over tokens, shifted", "mean over rows", "sum"]
"""Those that an untrained head is asked too, whose scores are all equal."""


@pytest.mark.parametrize(
    ("name", "trained"), [*((n, True) for n in QUESTIONS), *((n, False) for n in EQUAL_SCORES)]
)
def test_two_rows_of_16_tokens_are_asked(name: str, trained: bool) -> None:
    reduce, counts = QUESTIONS[name]
    model, data = adapted(Text(reduce, trained=trained)), texts()
    seen = before_the_first_step(model, data, batch_size=4, accumulate=2)
    assert seen.calls == [(ROWS, TOKENS)] == [(2, 16)]
    # the same labels once more where blocks that repeat are compared with the model
    assert seen.tokens <= 3 * 2 * 16
    made, warnings = objective(model, data, "ce", False)
    assert made.counts == (counts or "examples")
    assert (UNKNOWN in seen.warnings) == (UNKNOWN in warnings) == (not counts)


@pytest.mark.parametrize(
    ("kind", "reduce"),
    [("left", shifted), ("whole", shifted), ("prompt", shifted), ("prompt", by_row)],
)
def test_where_the_labels_stand_is_no_matter(kind: str, reduce: Reduce) -> None:
    model, data = adapted(Text(reduce)), texts(kind)
    seen = before_the_first_step(model, data, batch_size=4, accumulate=2)
    assert seen.calls == [(2, 16)]
    assert UNKNOWN not in seen.warnings


@pytest.mark.parametrize("reduce", [by_token, shifted, by_row])
def test_a_step_in_parts_is_the_whole_step(reduce: Reduce) -> None:
    data = texts()
    whole = fit(adapted(Text(reduce)), data, settings=Settings(steps=4, batch_size=6))
    parts = Settings(steps=4, batch_size=6, accumulate=3)
    report = fit(adapted(Text(reduce)), data, settings=parts)
    assert report.losses == pytest.approx(whole.losses, abs=1e-6)


def test_few_rows_and_short_ones() -> None:
    for data, want in (
        (texts().rows([5]), 1),
        (texts().rows([0]), 1),
        (Buckets([texts().rows([4, 5]), texts().rows([0, 1, 2])]), 2),
    ):
        seen = before_the_first_step(adapted(Text(shifted)), data, batch_size=1)
        assert [rows for rows, _ in seen.calls] == [want]
        assert all(tokens <= 16 for _, tokens in seen.calls)


def test_a_classifier_of_texts_is_asked_for_its_classes_alone() -> None:
    data = texts()
    labels = np.arange(len(data)) % CLASSES
    data = Table({**data.columns, "labels": labels}, "labels")
    seen = before_the_first_step(adapted(Pooled(by_token)), data, batch_size=1)
    assert seen.calls == [(2, 16)]
    assert seen.tokens <= 3 * 2 * 16


def test_images_are_whole() -> None:
    """16 tokens mean nothing there, and two rows do."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((9, 3, 20, 24)).astype(np.float32)
    labels = rng.integers(0, 5, (9, 20, 24))
    labels[:, :3] = -100
    data = Table({"pixel_values": images, "labels": labels}, "labels")
    model = lora_fx.insert(Pixels().eval(), (torch.randn(2, 3, 20, 24),), rank=2)
    seen = before_the_first_step(model, data, batch_size=4, accumulate=2)
    assert seen.calls == [(2, 24)]
    made, warnings = objective(model, data, "ce", False)
    assert (made.counts, warnings) == ("labels", [])


def test_a_model_that_takes_no_16_tokens_is_asked_whole_rows() -> None:
    model = adapted(Chunked(shifted), length=96)
    seen = before_the_first_step(model, texts(), batch_size=4, accumulate=2)
    assert seen.calls[-1] == (2, 96)
    assert UNKNOWN not in seen.warnings


def test_a_graph_of_one_number_of_rows_is_asked_as_it_is_trained() -> None:
    ids = torch.zeros(4, 8, dtype=torch.long)
    fixed = ["input_ids:0", "attention_mask:0"]
    cap = lora_fx.capture(Text(shifted).eval(), (ids, torch.ones_like(ids)), static=fixed)
    model = lora_fx.insert(cap, rank=2, include="layers.*")
    seen = before_the_first_step(model, texts(rows=12), batch_size=4)
    assert [rows for rows, _ in seen.calls] == [4]


@pytest.mark.parametrize("parts", [1, 4])
def test_validation_runs_as_many_rows_as_a_part_of_a_step(parts: int) -> None:
    """A user who cuts a batch up has no memory for all of it, before training either."""
    model, rows = adapted(Text(shifted)), list[int]()

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"]))

    data = texts()
    settings = Settings(steps=2, batch_size=8, accumulate=parts)
    with model.register_forward_pre_hook(watch, with_kwargs=True):
        report = fit(model, data, data, settings=settings)
    assert max(rows) == 8 // parts
    whole = fit(adapted(Text(shifted)), data, data, settings=Settings(steps=2, batch_size=8))
    assert report.before == pytest.approx(whole.before, abs=1e-6)
    assert report.validation == pytest.approx(whole.validation, abs=1e-6)
