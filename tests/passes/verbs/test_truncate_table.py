"""truncate --table: losses of explicit W + ΔW, cut by numpy's SVD."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LowRank
from lora_fx.adapter.truncate import truncation
from lora_fx.cli import main
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.held_out_loss import held_out
from lora_fx.passes.verbs.open import capture

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)), (torch.zeros(2, 12),), {}
"""
SHAPES = {"0.weight": (20, 12), "2.weight": (5, 20)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))


def adapter() -> Adapter:
    """Rank 6 and rank 5, σ falling."""
    rng = np.random.default_rng(3)
    entries = {}
    for key, (out, in_) in SHAPES.items():
        rank = min(6, out)
        fall = 0.7 ** np.arange(rank)
        a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank)) * fall
        size = 0.4 if key == "0.weight" else 0.1
        entries[key] = LowRank(a.astype(np.float32), size * b.astype(np.float32), 2.0 * rank)
    return Adapter(entries)


def data() -> Table:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((150, 12)).astype(np.float32)
    return Table({"input": x, "labels": rng.integers(0, 5, 150)}, "labels")


def explicit(ranks: dict[str, int]) -> float:
    """Cross entropy at W + the best part of ΔW of these ranks, in fp64."""
    model, table = net().double(), data()
    for key, low in adapter().lowrank.items():
        u, s, vt = np.linalg.svd(low.matrix())
        k = ranks.get(key, 0)
        with torch.no_grad():
            model.get_parameter(key).add_(torch.from_numpy((u[:, :k] * s[:k]) @ vt[:k]))
    x, y = (torch.from_numpy(table.columns[c]) for c in ("input", "labels"))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x.double()), y))


def test_losses_are_those_of_explicit_weights() -> None:
    result = held_out(capture(net(), (torch.zeros(2, 12),)), adapter(), data())
    assert [row.rank for row in result.rows] == [0, 1, 2, 4, 6] and result.examples == 150
    for row in result.rows:
        want = explicit({k: min(row.rank, min(s)) for k, s in SHAPES.items()})
        assert row.loss == pytest.approx(want, rel=1e-5)
        if not row.rank:
            assert row.error == row.spread_error == 1.0
            continue
        spread = truncation(adapter(), params=row.parameters)
        assert spread.parameters <= row.parameters and row.spread_error <= row.error * (1 + 1e-6)
        assert row.spread_loss == pytest.approx(
            explicit({t.key: t.after for t in spread.rows}), rel=1e-5
        )
    assert len({row.loss for row in result.rows}) == 5
    assert any(row.spread_error < 0.9 * row.error for row in result.rows)
    assert result.rows[-1].error < 1e-6 and "lowest loss on 150 examples" in str(result)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    np.savez("data.npz", **data().columns)
    lora_fx.save_adapter(adapter(), "a")

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["truncate", "a", *more])
        assert isinstance(stop.value.code, int)
        return stop.value.code

    told = ["--table", "data.npz", "--model", "model.py:build"]
    assert run(*told, "--json", "--report", "page.html") == 0
    rows = json.loads(capsys.readouterr().out)["table"]
    want = held_out(capture(net(), (torch.zeros(2, 12),)), adapter(), data())
    assert [r["loss"] for r in rows] == pytest.approx([r.loss for r in want.rows], rel=1e-6)
    assert "Losses at 5 ranks, of 150 examples" in Path("page.html").read_text()
    before = sorted(tmp_path.iterdir())
    for wrong in (["-o", "b"], ["--rank", "2"]):
        assert run(*told, *wrong) == 2
        assert "has no effect with --table" in capsys.readouterr().err
    assert run("--table", "data.npz") == 2 and "--model MODEL" in capsys.readouterr().err
    assert run("--rank", "2") == 2 and "nothing to write to" in capsys.readouterr().err
    assert run("--rank", "2", "-o", "b", "--model", "model.py:build") == 2
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_measured() -> None:
    cap = capture(net(), (torch.zeros(2, 12),))
    with pytest.raises(LoraFxError, match="no example"):
        held_out(cap, adapter(), data().rows(np.arange(0)))
    zero = {k: LowRank(u.a, 0 * u.b, u.alpha) for k, u in adapter().lowrank.items()}
    with pytest.raises(LoraFxError, match="every ΔW of the adapter is zero"):
        held_out(cap, Adapter(zero), data())
