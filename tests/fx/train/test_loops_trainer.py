"""Hugging Face's Trainer around the module that insert returns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.train.hf_trainer import AdapterCheckpoints
from tests.fx.attach.attached import adapter_gap, gap
from tests.fx.train import loops_worker as worker
from tests.fx.train.loops import (
    ROWS,
    STEPS,
    Rows,
    by_hand,
    by_trainer,
    fresh_accelerator,
    peft_of,
    still,
    tied,
    trained,
    worst,
)
from tests.zoo.shared import zoo

pytestmark = pytest.mark.usefixtures(fresh_accelerator.__name__)

CLASSES = 10


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any]:
    model, _, kwargs = zoo("hf_bert/1")
    still(model)
    labels = torch.zeros(len(kwargs["input_ids"]), dtype=torch.long)
    return model, lora_fx.insert(model, (), {**kwargs, "labels": labels}, rank=4)


def test_checkpoints_of_a_tied_model(tmp_path: Path) -> None:
    base, inserted = tied()
    data, half = Rows(labels=0), STEPS // 2
    saving: Any = {"save_strategy": "steps", "save_steps": half}
    with pytest.raises(RuntimeError, match="share memory"):  # Trainer's own checkpoints
        by_trainer(copy.deepcopy(inserted), data, tmp_path / "own", **saving)
    saving |= {"mixed": (AdapterCheckpoints,), "eval_strategy": "steps", "eval_steps": half}
    best: Any = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}

    model, hand = copy.deepcopy(inserted), copy.deepcopy(inserted)
    want = by_hand(hand, data)
    whole = trained(model, data, tmp_path / "a", **saving, **best, greater_is_better=True)
    assert worst(want, whole.losses) < 1e-5
    first, last = (tmp_path / "a" / f"checkpoint-{n}" for n in (half, STEPS))
    for folder in (first, last):
        names = {p.name for p in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
        assert not {"model.safetensors", "pytorch_model.bin"} & names
    assert whole.state.best_model_checkpoint == str(first), "the loss falls, so the first is worst"
    assert adapter_gap(by_key(model), by_key(first, inserted)) == 0.0
    ids = {"input_ids": data.batch(0)["input_ids"]}
    theirs = peft_of(copy.deepcopy(base), last).eval()
    assert gap(hand.eval()(**ids).logits, theirs(**ids).logits) < 1e-5

    resumed = copy.deepcopy(inserted)
    rest = trained(resumed, data, tmp_path / "b", **saving, resume=first).losses
    assert len(rest) == half
    assert max(abs(a - b) for a, b in zip(rest, want[half:], strict=True)) < 1e-5
    assert adapter_gap(by_key(resumed), by_key(last, inserted)) < 1e-6
    other = copy.deepcopy(inserted)
    other.load_adapter(lora_fx.truncate(hand.adapter(), max_error=0.5))
    with pytest.raises(lora_fx.LoraFxError, match="holds other targets or ranks than the model"):
        trained(other, data, tmp_path / "c", **saving, resume=first)
    with pytest.raises(lora_fx.LoraFxError, match="GPT2LMHeadModel holds no adapter of lora-fx"):
        trained(copy.deepcopy(base), data, tmp_path / "d", **saving, resume=first)


@pytest.mark.slow
def test_checkpoints_of_an_attached_model(tmp_path: Path) -> None:
    model, _, kwargs = zoo("hf_gpt2")
    lora_fx.attach(still(model), (), kwargs, rank=4, exclude="lm_head")
    again, data, half = copy.deepcopy(model), Rows(labels=0), STEPS // 2
    saving: Any = {"save_strategy": "steps", "save_steps": half, "mixed": (AdapterCheckpoints,)}
    want = trained(model, data, tmp_path / "a", **saving).losses
    first = tmp_path / "a" / f"checkpoint-{half}"
    rest = trained(again, data, tmp_path / "b", **saving, resume=first).losses
    assert max(abs(a - b) for a, b in zip(rest, want[half:], strict=True)) < 1e-5
    assert adapter_gap(by_key(again), by_key(model)) < 1e-6
    assert not (first / "model.safetensors").exists()


def by_key(source: Any, like: Any = None) -> lora_fx.Adapter:
    """The adapter of a model or folder in the order of its keys."""
    folder = isinstance(source, Path)
    if folder:
        adapter = lora_fx.load_adapter(source).bind(insertion_of(like).found)
    else:
        adapter = source.adapter()
    return lora_fx.Adapter(dict(sorted(adapter.entries.items())))


def test_evaluation_labels_and_modes(bert: tuple[Any, Any], tmp_path: Path) -> None:
    _, inserted = bert
    data = Rows(labels=CLASSES)
    model, hand = copy.deepcopy(inserted), copy.deepcopy(inserted)
    want = by_hand(hand, data)
    trainer = trained(model, data, tmp_path, eval_strategy="steps", eval_steps=STEPS // 4)
    assert worst(want, trainer.losses) < 1e-5, "evaluating in between changes nothing"
    hand.eval()
    with torch.no_grad():
        parts = [hand(**data.batch(i)) for i in range(STEPS)]
    mean = float(np.mean([float(p.loss) for p in parts]))
    assert abs(trainer.evaluate()["eval_loss"] - mean) < 1e-5
    said = trainer.predict(data)
    logits = torch.cat([p.logits for p in parts]).numpy()
    assert np.abs(said.predictions - logits).max() < 1e-4 and len(logits) == STEPS * ROWS
    assert np.array_equal(said.label_ids, data.columns["labels"].numpy())
    del data.columns["labels"]  # nothing to compare with
    bare = trainer.predict(data)
    assert bare.label_ids is None and np.abs(bare.predictions - logits).max() < 1e-4


@pytest.mark.parametrize("again", [False, True])
def test_bf16(bert: tuple[Any, Any], tmp_path: Path, again: bool) -> None:
    base, inserted = bert
    data = Rows(labels=CLASSES)
    model, hand = copy.deepcopy(inserted), copy.deepcopy(inserted)
    lora_fx.save_adapter(inserted.adapter(), tmp_path / "start")
    with torch.autocast("cpu", torch.bfloat16):
        want = by_hand(hand, data)
    got = by_trainer(model, data, tmp_path, bf16=True, activation_checkpointing=again)
    assert worst(want, got) < 1e-5
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = dict(inserted.named_parameters())
    assert {p.dtype for p in held.values()} == {torch.float32}
    assert all(not torch.equal(p, start[n]) for n, p in held.items()), "every one has moved"
    if not again:
        theirs = by_trainer(
            peft_of(copy.deepcopy(base), tmp_path / "start"), data, tmp_path, bf16=True
        )
        assert worst(theirs, got) < 0.1 and got[0] - got[-4] > 0.5


def test_unscaling_gradients_of_fp16() -> None:
    """A GradScaler takes fp32 A and B on an fp16 base; cast with the base, it refuses them."""
    example = {"input_ids": worker.batch(0)["input_ids"]}
    for masters in (True, False):
        base = worker.Tied().eval()
        model = lora_fx.insert(base.half() if masters else base, (), example, rank=3)
        model = model.train() if masters else model.train().half()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        scaler.scale(model(**worker.batch(0))["loss"]).backward()
        if not masters:
            with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                scaler.unscale_(optimizer)
            continue
        scaler.unscale_(optimizer)
        scaled = [p.grad.clone() for p in trained]
        optimizer.zero_grad()
        model(**worker.batch(0))["loss"].backward()
        for p, grad in zip(trained, scaled, strict=True):
            assert p.dtype == p.grad.dtype == torch.float32
            torch.testing.assert_close(grad, p.grad, atol=2e-3, rtol=2e-2)
        scaler.step(optimizer)
