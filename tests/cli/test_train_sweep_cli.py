"""lora-fx train --sweep and --seeds: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lora_fx.fx.train.together import fit_together
from tests.cli.test_cli import run
from tests.cli.test_train_cli import RIGHT, data, home

__all__ = ["home"]
TRAIN = ("train", "model.py:build", "d.npz", "-o", "best", "--steps", "4", "--probe", "none")


@pytest.fixture
def ready(home: Path) -> Path:
    data(RIGHT)
    return home


def test_the_best_is_written_and_every_run_is_that_of_its_own_command(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("--sweep", "rank=1,2", "--sweep", "lr=0.01,0.05", "--seeds", "2")
    code, out, err = run(
        capsys, *TRAIN, *sweep, "--save-runs", "runs", "--json", "--report", "page.html"
    )
    assert code == 0, err
    whole = json.loads(out)
    runs = whole["runs"]
    assert [row["options"] for row in runs[:3]] == [
        {"rank": 1, "lr": 0.01, "seed": 0},
        {"rank": 1, "lr": 0.01, "seed": 1},
        {"rank": 1, "lr": 0.05, "seed": 0},
    ]
    assert len(runs) == 8 and all(len(row["losses"]) == 4 for row in runs)
    lowest = [min(row["validation"].values()) for row in runs]
    best = whole["best"]
    assert lowest[best - 1] == min(lowest) and whole["losses"] == runs[best - 1]["losses"]
    tensors = Path(runs[best - 1]["adapter"], "adapter_model.safetensors").read_bytes()
    assert Path("best/adapter_model.safetensors").read_bytes() == tensors
    assert {"command", "version", "ok", "inputs", "outputs", "warnings"} <= whole.keys()
    assert whole["outputs"] == ["best", "runs"]
    page = Path("page.html").read_text()
    assert "Training and validation losses of 8 runs" in page and f"run {best}" in page

    own = ("--rank", "2", "--lr", "0.05", "--seed", "1", "--split-seed", "0")
    code, out, _ = run(capsys, *TRAIN, *own, "--force", "--json")
    assert code == 0 and json.loads(out)["losses"] == runs[7]["losses"]
    alone = Path("best/adapter_model.safetensors").read_bytes()
    assert Path(runs[7]["adapter"], "adapter_model.safetensors").read_bytes() == alone


def test_first_values_of_data(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (*TRAIN, "--init", "eva", "--rank", "2")
    code, out, err = run(capsys, *command, "--seeds", "2", "--together", "2", "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    own = ("--seed", "1", "--split-seed", "0", "--force", "--json")
    code, out, _ = run(capsys, *command, *own)
    assert code == 0 and json.loads(out)["losses"] == runs[1]["losses"]


def test_the_table(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("--sweep", "weight-decay=0,0.5", "--sweep", "variant=lora,rslora", "--seeds", "2")
    code, out, err = run(capsys, *TRAIN, *sweep, "--together", "4")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == [
        *("run", "weight-decay", "variant", "seed", "kept", "step", "validation", "loss")
    ]
    assert lines[1].split()[:4] == ["1", "0", "lora", "0"]
    assert sum(line.endswith(" best") for line in lines) == 2  # its row, and wrote best
    assert "by setting, over its seeds:" in lines
    assert sum(line.startswith("  weight-decay=") for line in lines) == 4
    assert lines[-1] == "wrote best" and err.count("run ") >= 8
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "rank"], "--sweep rank: there is no '='"),
        (["--sweep", "rank="], "--sweep rank=: there is no value"),
        (["--sweep", "rank=4,4"], "--sweep rank=4,4: 4 is there twice"),
        (["--sweep", "lr=1e-3,0.001"], "0.001 is there twice"),
        (["--sweep", "rank=two"], "'two' is not a valid integer"),
        (["--sweep", "lr=0"], "lr=0"),
        (["--sweep", "rnak=1,2"], "--sweep cannot vary 'rnak'"),
        (["--sweep", "device=cpu,cuda"], "--sweep cannot vary 'device'"),
        (["--sweep", "rank=1", "--sweep", "rank=2"], "--sweep rank is given twice"),
        (["--sweep", "rank=1,2", "--rank", "3"], "--rank has no effect with --sweep rank"),
        (["--sweep", "seed=1,2", "--seeds", "2"], "--seeds has no effect with --sweep seed"),
        (["--sweep", "variant=lora,lara"], "lara"),
        (["--sweep", "schedule=cosine,sine"], "unknown schedule 'sine'"),
        (["--sweep", "schedule=constant", "--warmup", "0.1"], "--warmup has no effect"),
        (["--seeds", "0"], "0 is not in the range"),
        (["--seeds", "2", "--resume", "state"], "--resume has no effect with --sweep or --seeds"),
        (["--seeds", "2", "--save-state", "state"], "--save-state has no effect"),
        (["--seeds", "2", "--curve", "c.csv"], "--curve has no effect"),
        (["--seeds", "2", "--validation", "0"], "and --validation is 0"),
        (["--together", "2"], "--together has no effect without --sweep or --seeds"),
        (["--save-runs", "runs"], "--save-runs has no effect without --sweep or --seeds"),
        (["--seeds", "2", "--save-runs", "d.npz"], "d.npz already exists"),
        (["--seeds", "2", "--save-runs", "best"], "--save-runs best is also --output"),
        (["--seeds", "2", "--save-runs", "no/runs"], "the folder no does not exist"),
        (["--sweep", "lr=nan,nan"], "--sweep lr=nan,nan: nan is not a finite number"),
        (["--sweep", "init=foo"], "Hint: use kaiming, gaussian, orthogonal, pissa, olora, eva"),
        (["--sweep", "lr=-1"], "Hint: pass --sweep lr=1e-4,3e-4, for example"),
        (["--sweep", "batch-size="], "Hint: pass --sweep batch-size=16,32, for example"),
        (["--variant", "vera", "--alpha", "8"], "--alpha has no effect with variant vera, whose"),
        (
            ["--variant", "vera", "--sweep", "alpha=4,8"],
            "--sweep alpha has no effect with variant vera, whose scale is 1",
        ),
        (["--sweep", "variant=lora,vera", "--alpha", "8"], "--alpha has no effect with variant"),
        (["--eval-data", "d.npz", "--split-seed", "1"], "--split-seed has no effect"),
    ],
)  # fmt: skip
def test_refused_before_any_work(
    ready: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, out, err = run(capsys, *TRAIN[:5], *options)
    assert code == 2 and not out
    assert message in err and "train …" not in err
    assert not Path("best").exists()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_rank_that_does_not_fit_is_refused_before_the_first_run(
    ready: Path, capsys: pytest.CaptureFixture[str], init: str
) -> None:
    code, out, err = run(capsys, *TRAIN, "--sweep", "rank=1,1000", "--init", init)
    assert code == 2 and not out
    assert "rank 1000 is larger than" in err and "run 1 of 2" not in err and "step " not in err


@pytest.mark.parametrize("value", ["foo=1", "rank=two", "variant=lara", "init=foo"])
def test_refused_before_torch_is_imported(ready: Path, value: str) -> None:
    code = (
        "import sys\nfrom lora_fx.cli import main\n"
        f"try: main([*{TRAIN!r}, '--sweep', {value!r}])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "2 False\n", found.stderr
    first, second = found.stderr.splitlines()
    assert first.startswith("Error: ") and second.startswith("Hint: ")


def test_values_that_are_near_have_names_of_their_own(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ("--sweep", "lr=0.01,0.010000001", "--save-runs", "runs")
    code, out, err = run(capsys, *TRAIN, *values, "--json")
    assert code == 0, err
    folders = [row["adapter"] for row in json.loads(out)["runs"]]
    assert folders == ["runs/lr=0.01", "runs/lr=0.010000001"]
    assert all(Path(folder, "adapter_model.safetensors").is_file() for folder in folders)


WIDE = """
import torch
from pathlib import Path
from torch import nn
def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2048), nn.ReLU(), nn.Linear(2048, 5)).eval()
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with torch.no_grad():
        model[0].weight[900:1100] *= float(Path("factor").read_text())
    return model, (torch.randn(3, 8),), {}
"""
LOSS = """
from pathlib import Path
import torch
def loss(output, labels):
    smoothing = float(Path("smoothing").read_text())
    return torch.nn.functional.cross_entropy(output, labels, label_smoothing=smoothing)
"""


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("changed", ["factor", "smoothing"])
def test_saved_runs_of_another_base_or_loss(
    ready: Path, capsys: pytest.CaptureFixture[str], changed: str, init: str
) -> None:
    Path("wide.py").write_text(WIDE)
    Path("loss.py").write_text(LOSS)
    Path("factor").write_text("1")  # of weights between the ends that facts have
    Path("smoothing").write_text("0")  # of a value that the source of the loss does not show
    command = ["train", "wide.py:build", *TRAIN[2:], "--loss", "loss.py:loss", "--init", init]
    command += ["--sweep", "rank=2,4", "--save-runs", "runs", "--force", "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    code, again, err = run(capsys, *command)
    assert code == 0 and json.loads(again)["runs"] == json.loads(out)["runs"], err

    Path(changed).write_text("0.5")
    code, out, err = run(capsys, *command)
    assert code == 2
    line = "model or loss: before training it is"
    if (changed, init) == ("factor", "pissa"):  # whose frozen weights change at their ends too
        line = "model: weights: another"
    assert f"runs/rank=2.json is of another run: {line}" in err


def test_epochs_and_steps(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *TRAIN, "--sweep", "epochs=1,2")
    assert code == 2 and "--sweep epochs has no effect with --steps 4" in err
    code, out, _ = run(capsys, *TRAIN[:5], "--sweep", "steps=3,5", "--json")
    assert code == 0 and [len(row["losses"]) for row in json.loads(out)["runs"]] == [3, 5]


def test_an_output_that_exists(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("best").mkdir()
    Path("best/mine").write_text("mine")
    code, _, err = run(capsys, *TRAIN, "--seeds", "2")
    assert code == 2 and "best already exists" in err


def test_runs_that_diverge(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverging = ("--optimizer", "sgd", "--clip", "0", "--schedule", "constant")
    code, out, err = run(capsys, *TRAIN, *diverging, "--sweep", "lr=0.1,1e30")
    assert code == 0, err
    assert "best" in out.splitlines()[1]
    assert "loss is" in out.splitlines()[2] or "gradient" in out.splitlines()[2]
    code, _, err = run(capsys, *TRAIN, *diverging, "--sweep", "lr=1e30,1e31", "--force")
    assert code == 1 and "no run of 2 came to its end" in err
    assert load_file("best/adapter_model.safetensors")


def test_an_interrupted_sweep_leaves_whole_adapters(
    ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(*args: Any, **options: Any) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit_together(*args, **options)

    monkeypatch.setattr("lora_fx.passes.verbs.sweep.fit_together", interrupted)
    command = (*TRAIN, "--seeds", "4", "--save-runs", "runs")
    code, out, err = run(capsys, *command)
    assert code == 130 and not out and not Path("best").exists()
    assert "runs holds 2 of 4 runs: the same command goes on from there" in err
    names = ["seed=0", "seed=0.json", "seed=1", "seed=1.json"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names

    code, out, err = run(capsys, *command, "--json")
    assert code == 0 and len(calls) == 5, err
    resumed = json.loads(out)
    best = Path("best/adapter_model.safetensors").read_bytes()
    code, out, _ = run(capsys, *TRAIN, "--seeds", "4", "--force", "--json")
    assert code == 0
    whole = json.loads(out)
    for row in (*whole["runs"], *resumed["runs"]):
        del row["adapter"]
    assert resumed["runs"] == whole["runs"] and resumed["best"] == whole["best"]
    assert Path("best/adapter_model.safetensors").read_bytes() == best

    code, _, err = run(capsys, *command, "--force", "--weight-decay", "0.3")
    assert code == 2
    assert "runs/seed=0.json is of another run: settings: weight_decay: 0.01 in the state" in err
    Path("runs/mine").touch()
    code, _, err = run(capsys, *command, "--force")
    assert code == 2 and "runs holds mine, which is no run of this sweep" in err
