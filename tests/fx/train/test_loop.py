"""The training loop and its data: what it learns, what it keeps, what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.data import Table, read_table, table_of
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.objective import Objective
from lora_fx.fx.train.settings import Settings
from lora_fx.held_out import split
from tests.zoo.shared import captured


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = self.fc2(torch.tanh(self.fc1(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def table(n: int = 200, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 8)).astype(np.float32)
    return Table({"x": x, "labels": (x[:, :3] * [1, -2, 3]).argmax(1)}, "labels")


def adapted(**options: Any) -> Any:
    cap, *_ = captured("loop net", lambda: (Net().eval(), (torch.randn(4, 8),)))
    return lora_fx.insert(cap, rank=2, **options)


def test_it_learns_and_keeps_the_best() -> None:
    model = adapted()
    training, validation = split(table(), 0.2, 0)
    labels = torch.from_numpy(validation.columns["labels"])
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(validation.columns["x"]))["logits"]
    untrained = nn.functional.cross_entropy(logits, labels).item()
    report = fit(model, training, validation, settings=Settings(steps=120, lr=3e-2, checks=12))
    assert report.before == pytest.approx(untrained, abs=1e-5)
    assert report.losses[-1] < 0.6 * report.losses[0]
    assert report.best_step == min(report.validation, key=lambda k: report.validation[k])
    assert not model.training and not report.warnings
    held = {"x": torch.from_numpy(validation.columns["x"])}
    logits = model(**held)["logits"]
    again = nn.functional.cross_entropy(logits, torch.from_numpy(validation.columns["labels"]))
    assert again.item() == pytest.approx(report.validation[report.best_step], abs=1e-5)


def test_the_first_loss_is_told_before_any_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user sees what a step takes; held-out examples may take as long as many steps."""
    told: list[object] = []
    mean = Objective.mean

    def counted(self: Objective, *args: Any) -> float:
        told.append("validation")
        return mean(self, *args)

    monkeypatch.setattr(Objective, "mean", counted)
    training, validation = split(table(), 0.2, 0)
    settings = Settings(steps=3, checks=1)
    fit(adapted(), training, validation, settings=settings, progress=lambda *row: told.append(row))
    steps = [row[0] if isinstance(row, tuple) else row for row in told]
    assert steps == [1, "validation", 2, 3, "validation"]


def test_an_adapter_that_makes_the_model_no_better_is_said() -> None:
    training, validation = split(table(), 0.2, 0)
    wrong = Table(
        {"x": training.columns["x"], "labels": (training.columns["labels"] + 1) % 3}, "labels"
    )
    report = fit(adapted(), wrong, validation, settings=Settings(steps=40, lr=3e-2, checks=2))
    assert report.before is not None and min(report.validation.values()) >= report.before
    (said,) = [w for w in report.warnings if "does not improve the model" in w]
    assert f"before training it was {report.before:.4f}" in said


def test_the_best_is_restored_after_overfitting() -> None:
    model = adapted()
    rng = np.random.default_rng(0)
    noise = Table(
        {"x": rng.standard_normal((24, 8)).astype(np.float32), "labels": rng.integers(0, 3, 24)},
        "labels",
    )
    report = fit(model, noise, table(60), settings=Settings(steps=80, lr=0.1, checks=8))
    assert report.best_step < 80
    with torch.no_grad():
        logits = model(x=torch.from_numpy(table(60).columns["x"]))["logits"]
    value = float(
        nn.functional.cross_entropy(logits, torch.from_numpy(table(60).columns["labels"]))
    )
    assert value == pytest.approx(report.validation[report.best_step], abs=1e-5)


def test_two_runs_with_one_seed_are_equal() -> None:
    runs = [
        fit(adapted(dropout=0.2), table(), settings=Settings(steps=15)).losses for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert fit(adapted(dropout=0.2), table(), settings=Settings(steps=15, seed=1)).losses != runs[0]


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "steps"),
    [(33, 32, 3.0, 6), (5, 4, 10.0, 20), (12, 4, 2.0, 6), (9, 4, 0.5, 2), (3, 32, 3.0, 3)],
)
def test_an_epoch_is_a_pass_over_all_examples(
    rows: int, size: int, epochs: float, steps: int
) -> None:
    """The last batch of a pass may be small, and counts as a step, as in transformers' Trainer."""
    model, data = adapted(), table(rows)
    seen: list[int] = []

    def loss(out: Any, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        seen.append(len(labels))
        return nn.functional.cross_entropy(out["logits"], labels)

    settings = Settings(epochs=epochs, batch_size=size)
    report = fit(model, data, loss=loss, settings=settings)
    assert len(report.losses) == len(seen) == steps
    if epochs == int(epochs):
        assert sum(seen) == rows * epochs


@pytest.mark.parametrize("variant", ["lora", "lora+", "lora-fa"])
def test_it_is_the_loop_that_a_hand_writes(variant: str) -> None:
    s = Settings(steps=100, lr=2e-2, weight_decay=0.1, batch_size=16, warmup=0.1, clip=0.5)
    report = fit(adapted(variant=variant), table(), settings=s)
    model = adapted(variant=variant).train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fast = [p for n, p in named.items() if variant == "lora+" and "lora_B" in n]
    slow = [p for n, p in named.items() if not any(p is q for q in fast)]
    assert len(fast) == 2 * (variant == "lora+") and all(
        ("lora_A" in n) <= (variant != "lora-fa") for n in named
    )
    optimizer = torch.optim.AdamW([{"params": slow}, {"params": fast}], weight_decay=0.1)
    data, differences = table(), []
    for step in range(100):
        epoch, at = divmod(step, 13)  # 200 examples make 13 batches
        order = np.arange(200)
        np.random.default_rng(epoch).shuffle(order)
        rows = order[16 * at : 16 * at + 16]
        x, y = (torch.from_numpy(data.columns[n][rows]) for n in ("x", "labels"))
        share = (step + 1) / 10 if step < 10 else (1 + np.cos(np.pi * (step - 10) / 90)) / 2
        for group, ratio in zip(optimizer.param_groups, (1, 16), strict=True):
            group["lr"] = 2e-2 * ratio * share
        value = nn.functional.cross_entropy(model(x)["logits"], y)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
        differences.append(abs(value.item() - report.losses[step]))
    assert report.losses[-1] < report.losses[0] and max(differences) < 1e-6


def test_losses() -> None:
    without = Table({"x": table().columns["x"], "y": table().columns["labels"]}, "y")
    assert fit(adapted(), without, settings=Settings(steps=3)).losses == pytest.approx(
        fit(adapted(), table(), settings=Settings(steps=3)).losses, abs=1e-6
    )
    values = Table({"x": table().columns["x"], "y": table().columns["x"][:, :3]}, "y")
    fit(adapted(), values, loss="mse", settings=Settings(steps=3))
    called = fit(
        adapted(),
        values,
        loss=lambda out, y: (out["logits"] - y).abs().mean(),
        settings=Settings(steps=3),
    )
    assert len(called.losses) == 3


def test_mse_is_never_the_models_own_loss() -> None:
    """Net's own, of labels, is a cross entropy."""
    with pytest.raises(LoraFxError, match=r"the model gives \[16, 3\], but the labels are \[16\]"):
        fit(adapted(), table(), loss="mse", settings=Settings(steps=1, batch_size=16))


@pytest.mark.parametrize(
    ("steps", "checks", "wanted"),
    [(19, 10, 10), (20, 10, 10), (21, 10, 10), (7, 10, 7), (5, 1, 1), (11, 3, 3)],
)
def test_validations_are_as_many_as_asked_and_spread(steps: int, checks: int, wanted: int) -> None:
    settings = Settings(steps=steps, checks=checks, batch_size=8)
    report = fit(adapted(), table(), table(8, 1), settings=settings)
    at = sorted(report.validation)
    assert len(at) == wanted and at[-1] == steps
    assert {b - a for a, b in itertools.pairwise([0, *at])} <= {
        steps // wanted,
        -(-steps // wanted),
    }


def test_what_it_says() -> None:
    report = fit(adapted(), table(), settings=Settings(steps=2))
    assert report.warnings == [
        "no validation data: overfitting would not be seen, and the last adapter is kept, "
        "not the best"
    ]
    with pytest.raises(LoraFxError, match="has no argument 'z'"):
        fit(adapted(), Table({"z": np.zeros((4, 8), np.float32)}, ""))
    high = Table({"x": table().columns["x"], "y": np.full(200, 7)}, "y")
    with pytest.raises(LoraFxError, match="label 7, but the model scores 3 classes"):
        fit(adapted(), high)
    with pytest.raises(LoraFxError, match="unknown loss 'odd'"):
        fit(adapted(), table(), loss="odd")
    with pytest.raises(LoraFxError, match="no label column"):
        fit(adapted(), Table({"x": table().columns["x"]}, ""))
    broken = table()
    broken.columns["x"][3] = np.nan
    with pytest.raises(LoraFxError, match=r"step 1: the loss is nan"):
        fit(adapted(), broken, settings=Settings(batch_size=200))


def test_split_keeps_every_label_and_no_row_twice() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2])
    t = Table({"i": np.arange(61), "labels": labels}, "labels")
    training, validation = split(t, 0.1, 3)
    rows = np.concatenate([training.columns["i"], validation.columns["i"]])
    assert sorted(rows) == list(range(61))
    assert np.bincount(validation.columns["labels"]).tolist() == [5, 1]
    assert len(split(t, 0.0, 3)[1]) == 0
    np.testing.assert_array_equal(split(t, 0.1, 3)[1].columns["i"], validation.columns["i"])


def tokens(texts: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    return {"input_ids": np.array([[len(t), 1] for t in texts])}


def test_reading(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 2)), labels=np.arange(3))
    t = read_table(str(tmp_path / "d.npz"))
    assert t.label == "labels" and t.columns["x"].dtype == np.float32 and len(t) == 3
    rows = [{"text": "ab", "stars": 1}, {"text": "abc", "stars": 5}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    t = read_table(str(tmp_path / "d.jsonl"), label="stars", tokenizer=tokens)
    assert t.columns["input_ids"].tolist() == [[2, 1], [3, 1]] and t.columns["stars"].tolist() == [
        1,
        5,
    ]
    (tmp_path / "d.csv").write_text("a,b,kind\n1,2.5,cat\n3,4,dog\n5,6,cat\n")
    t = read_table(str(tmp_path / "d.csv"), label="kind")
    assert t.columns["kind"].tolist() == [0, 1, 0] and t.columns["b"].tolist() == [2.5, 4, 6]


@pytest.mark.parametrize(
    ("name", "content", "label", "message"),
    [
        ("d.txt", "x", "", "unknown data format '.txt'"),
        ("d.csv", "a,b\n1,2\n", "c", "there is no column 'c'"),
        ("d.csv", "a,b\n1,2\n1\n", "", "line 3 has 1 fields, the header has 2"),
        ("d.csv", "a,b\n", "", "no rows"),
        ("d.csv", "a,b\nx,2\n", "b", "column 'a' is text"),
        ("d.jsonl", '{"a": 1}\n{"b": 1}\n', "", "line 2 has the keys ['b']"),
        ("d.jsonl", '{"a": [1, 2]}\n{"a": [1]}\n', "", "rows of different lengths"),
        ("d.jsonl", "{", "", "line 1: not valid JSON"),
        ("d.npz", "junk", "", "not a readable .npz"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, content: str, label: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraFxError) as info:
        read_table(str(tmp_path / name), label=label)
    assert message in info.value.message and name in info.value.message
    with pytest.raises(LoraFxError, match="no such file"):
        read_table(str(tmp_path / "gone.csv"))
    with pytest.raises(LoraFxError, match="different lengths"):
        table_of({"a": [1, 2], "b": [1]}, "here")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_cli import MODEL, run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=x[:, :5].argmax(1))
    code, out, err = run(
        capsys,
        "train",
        "model.py:build",
        "d.npz",
        "-o",
        "adapter",
        "-r",
        "2",
        "--steps",
        "30",
        "--lr",
        "0.02",
    )
    assert code == 0 and "wrote adapter" in out and "loss" in err
    code, out, _ = run(
        capsys, "train", "model.py:build", "d.npz", "-o", "a2", "-r", "2", "--epochs", "1", "--json"
    )
    data = json.loads(out)
    assert code == 0 and data["examples"]["validation"] > 0 and data["outputs"] == ["a2"]
    assert run(capsys, "export", "model.py:build", "adapter", "-o", "m.onnx")[0] == 0
    header = ",".join("abcdefgh") + ",kind"
    lines = [",".join(map(str, r)) + f",k{int(r[:3].argmax())}" for r in x]
    (tmp_path / "d.csv").write_text("\n".join([header, *lines]))
    assert (
        run(
            capsys,
            "train",
            "model.py:build",
            "d.csv",
            "--label",
            "kind",
            "-o",
            "a3",
            "-r",
            "2",
            "--steps",
            "3",
        )[0]
        == 0
    )
    (tmp_path / "load.py").write_text(
        "import numpy as np\ndef load():\n"
        "    return {'x': np.ones((20, 8), np.float32), 'y': np.arange(20) % 5}\n"
        "def loss(out, y):\n    return (out.sum(-1) - y).abs().mean()\n"
    )
    assert (
        run(
            capsys,
            "train",
            "model.py:build",
            "load.py:load",
            "--loss",
            "load.py:loss",
            "-o",
            "a4",
            "-r",
            "2",
            "--steps",
            "3",
        )[0]
        == 0
    )
    code, _, err = run(capsys, "train", "model.py:build", "d.npz", "-o", "adapter")
    assert code == 2 and "exists" in err
