"""Training over codes: Trainer, two processes, compile and recomputed blocks as the plain loop."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.fx.quantised_parameters import forms
from tests.fx.train import quantised_worker as worker
from tests.fx.train.loops import Rows, by_hand, by_trainer, fresh_accelerator, still, worst
from tests.fx.train.loops_worker import train
from tests.fx.train.test_loops_torchrun import torchrun
from tests.zoo.shared import zoo

pytestmark = pytest.mark.usefixtures(fresh_accelerator.__name__)


def llama() -> Any:
    model, _, kwargs = zoo("hf_llama/1")
    example = {**kwargs, "labels": kwargs["input_ids"]}
    return lora_fx.insert(still(model), (), example, rank=4, exclude="lm_head", quantise="nf4")


def vit() -> Any:
    model, _, kwargs = zoo("hf_vit")
    labels = torch.zeros(len(kwargs["pixel_values"]), dtype=torch.long)
    return lora_fx.insert(still(model), (), {**kwargs, "labels": labels}, rank=4, quantise="nf4")


class Pictures(Rows):
    """Rows of pictures, of ten classes."""

    def __init__(self) -> None:
        super().__init__(labels=10)
        labels = self.columns["labels"]
        noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        pixels = torch.stack([noise[int(i) % 4] + 0.1 * float(i) for i in labels])
        self.columns = {"pixel_values": pixels, "labels": labels, "junk": labels}


MODELS = {"llama": (llama, lambda: Rows(labels=0)), "vit": (vit, Pictures)}


@pytest.mark.parametrize("name", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_every_way_to_train_has_the_losses_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    make, rows = MODELS[name]
    start, data = make(), rows()
    codes = {n: p.clone() for n, p in start.named_parameters() if n in forms(start)}
    assert len(codes) > 4 and {p.dtype for p in codes.values()} == {torch.uint8}
    plain = copy.deepcopy(start)
    want = by_hand(plain, data)
    assert want[0] - want[-1] > 0.02, "something is learnt"
    assert worst(want, by_trainer(copy.deepcopy(start), data, tmp_path)) < 1e-5
    again = copy.deepcopy(start)
    again.activation_checkpointing_enable()
    assert worst(want, by_hand(again, data)) < 1e-5
    compiled = torch.compile(copy.deepcopy(start), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's, of the cache of a condition on sizes
        assert worst(want, by_hand(compiled, data)) < 1e-5
    held = dict(plain.named_parameters())
    assert all(torch.equal(held[n], c) for n, c in codes.items()), "the base keeps its bytes"


@pytest.mark.parametrize("name", ["tied", pytest.param("hf_llama", marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(name: str, tmp_path: Path) -> None:
    said = torchrun(tmp_path, "-m", worker.__name__, name)
    losses = json.loads(said.strip().splitlines()[-1])
    want = train(worker.made(name), range(worker.STEPS))
    assert want[0] - want[-1] > 0.05
    assert max(abs(a - b) for a, b in zip(want, losses, strict=True)) < 1e-5
