"""Lightning Fabric around the module that insert returns: the numbers of the plain loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fx.attach.attached import adapter_gap
from tests.fx.train.loops import ROWS, Rows, optimizer_of, tied

fabrics = pytest.importorskip("lightning_fabric")

STEPS, NORM = 8, 0.5


def by_hand(model: nn.Module, data: Rows, dtype: torch.dtype | None) -> list[float]:
    optimizer, losses = optimizer_of(model.train()), []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**data.batch(step)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], NORM)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def setup(precision: Any, model: nn.Module) -> tuple[Any, Any, Any]:
    fabric = fabrics.Fabric(accelerator="cpu", devices=1, precision=precision)
    return fabric, *fabric.setup(model.train(), optimizer_of(model))


def steps(fabric: Any, model: Any, optimizer: Any, which: range) -> list[float]:
    data, losses = Rows(labels=0), []
    data.columns.pop("junk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have more workers
        loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=ROWS))
    for step, batch in enumerate(loader):
        if step not in which:
            continue
        loss = model(**batch).loss
        fabric.backward(loss)
        losses.append(float(loss.detach()))
        fabric.clip_gradients(model, optimizer, max_norm=NORM)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_losses_of_the_plain_loop(precision: str) -> None:
    hand, model = copy.deepcopy(tied()[1]), copy.deepcopy(tied()[1])
    model.activation_checkpointing_enable()
    want = by_hand(hand, Rows(labels=0), torch.bfloat16 if precision == "bf16-mixed" else None)
    fabric, wrapped, optimizer = setup(precision, model)
    got = steps(fabric, wrapped, optimizer, range(STEPS))
    assert max(abs(a - b) for a, b in zip(want, got, strict=True)) < 1e-5
    assert want[0] - want[4] > 0.01, "batch 4 is batch 0 again"
    assert adapter_gap(model.adapter(), hand.adapter()) < 1e-6
    start = dict(tied()[1].named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, start[name]) != p.requires_grad, name


def test_bf16_true_casts_the_masters() -> None:
    """What docs/loops.md warns of: a whole cast after insert takes A and B along."""
    model = copy.deepcopy(tied()[1])
    setup("bf16-true", model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_of_what_is_trained(tmp_path: Path) -> None:
    model, resumed = copy.deepcopy(tied()[1]), copy.deepcopy(tied()[1])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    fabric, wrapped, optimizer = setup("32-true", model)
    steps(fabric, wrapped, optimizer, range(4))
    only = {"model": lambda name, _: name in trained}
    fabric.save(tmp_path / "a.ckpt", {"model": wrapped, "optimizer": optimizer}, filter=only)
    want = steps(fabric, wrapped, optimizer, range(4, STEPS))
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]
    assert set(held) == trained
    fabric, wrapped, optimizer = setup("32-true", resumed)
    fabric.load(tmp_path / "a.ckpt", {"model": wrapped, "optimizer": optimizer}, strict=False)
    assert steps(fabric, wrapped, optimizer, range(4, STEPS)) == want
    assert adapter_gap(resumed.adapter(), model.adapter()) == 0.0
