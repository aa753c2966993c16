"""What the tests of training loops share: rows, the plain loop, Trainer, PEFT."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.graph import loss_head
from lora_fx.fx.loss_in_chunks import ChunkedLoss
from tests.zoo.shared import zoo

STEPS, ROWS = 20, 3


@pytest.fixture
def fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the precision of the last Trainer for the whole process.

    A Trainer looks for garbage several times, half a second each among the objects of a suite.
    """
    memory = pytest.importorskip("accelerate.utils.memory")
    monkeypatch.setattr(memory, "gc", types.SimpleNamespace(collect=int))
    _reset()
    yield
    _reset()


def _reset() -> None:
    accelerate = sys.modules.get("accelerate")
    if accelerate is not None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Rows(torch.utils.data.Dataset[Any]):
    """STEPS batches of ROWS rows, the first four again and again."""

    def __init__(self, labels: int) -> None:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 60, (4 * ROWS, 7), generator=g)
        wanted = torch.randint(0, labels, (len(ids),), generator=g) if labels else ids
        ids, wanted = (torch.cat([t] * (STEPS // 4)) for t in (ids, wanted))
        self.columns = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": wanted,
            "junk": ids,
        }

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {k: v[i] for k, v in self.columns.items()}

    def batch(self, step: int) -> dict[str, Any]:
        rows = slice(step * ROWS, (step + 1) * ROWS)
        return {k: v[rows] for k, v in self.columns.items() if k != "junk"}


@functools.cache
def tied() -> tuple[Any, Any]:
    """gpt2, whose head is its embedding, and what insert makes of it; to be copied."""
    model, _, kwargs = zoo("hf_gpt2/1")
    example = {**kwargs, "labels": kwargs["input_ids"]}
    return model, lora_fx.insert(still(model), (), example, rank=4, exclude="lm_head")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def by_trainer(model: nn.Module, data: Rows, folder: Path, **options: Any) -> list[float]:
    """Losses of every step under Hugging Face's Trainer, rows in their order."""
    return trained(model, data, folder, **options).losses


def trained(
    model: nn.Module,
    data: Rows,
    folder: Path,
    *,
    mixed: tuple[type[Any], ...] = (),
    resume: Path | None = None,
    **options: Any,
) -> Any:
    """A Trainer after its training; `losses` are those of every step."""
    from transformers import Trainer, TrainingArguments

    class InOrder(*mixed, Trainer):  # type: ignore[misc]
        losses: list[float]

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    optimizer = optimizer_of(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            optimizers=(optimizer, constant),
        )
        trainer.losses = []
        trainer.model_accepts_loss_kwargs = False
        trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def by_hand(model: nn.Module, data: Rows) -> list[float]:
    optimizer, losses = optimizer_of(model.train()), []
    for step in range(STEPS):
        loss = model(**data.batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def still(model: nn.Module) -> nn.Module:
    """Without dropout, so that losses do not depend on how often random numbers are drawn."""
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if hasattr(m, "attention_dropout") and isinstance(m.attention_dropout, float):
            m.attention_dropout = 0.0
    return model


def worst(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def peft_of(model: nn.Module, path: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(path), is_trainable=True)


@contextlib.contextmanager
def loss_of_chunks() -> Iterator[None]:
    """Compute losses three rows at a time, of few classes too, and check that this is done."""
    chunks: list[int] = []
    in_chunks = ChunkedLoss.in_chunks

    def counted(
        loss: ChunkedLoss, rows: Any, operands: Any, labels: torch.Tensor, needs: Any
    ) -> Any:
        chunks.append(-(-len(labels) // loss.rows_of_chunk))
        return in_chunks(loss, rows, operands, labels, needs)

    with (
        patch.object(loss_head, "LEAST_CLASSES", 8),
        patch.object(ChunkedLoss, "rows_of_chunk", 3),
        patch.object(ChunkedLoss, "in_chunks", counted),
    ):
        yield
    assert chunks and min(chunks) > 1
