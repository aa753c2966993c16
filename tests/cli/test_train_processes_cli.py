"""torchrun … lora-fx train, and accelerate's: one result, one error line, no process that waits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_fx.fx.train import processes as shares
from lora_fx.fx.train.processes import ALONE, Elsewhere, Processes
from tests.cli.test_cli import run
from tests.cli.test_train_cli import MODEL
from tests.fx.train.test_processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "model.py:build", "d.npz", "-r", "2", "--steps", "20", "--lr", "0.01")
LOSS = """
import os
import torch
calls = []
def odd(out, labels):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK") == "1":
        raise ValueError("the third call")
    return torch.nn.functional.cross_entropy(out["logits"], labels)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "odd.py").write_text(LOSS)
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=x[:, :5].argmax(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def launched(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow  # tests/fx/train/test_processes.py starts processes too
def test_torchrun_is_one_process(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *TRAIN, "-o", "one", "--json")
    one = json.loads(out)
    assert code == 0
    done = launched(
        "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_ports(1)[0]}",
        "-m", "lora_fx.cli", *TRAIN, "-o", "two", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one object, of the first process
    assert done.stderr.count("step 20/20") == 1
    assert two["warnings"] == ["2 processes: each takes a share of every batch"]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-6)  # which are rounded to 1e-6
    assert two["validation"] == pytest.approx(one["validation"], abs=2e-6)
    a, b = (load_file(home / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(np.allclose(a[k], b[k], atol=1e-5) for k in a) and set(a) == set(b)


def by_hand(*argv: str, until: Path | None = None) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two processes; SIGTERM for both once a file is there."""
    env: dict[str, Any] = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = free_ports(1)[0]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lora_fx.cli", *argv],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while until is not None and not until.exists() and started[0].poll() is None:
            time.sleep(0.1)
        for p in started if until else ():
            p.terminate()
        outs = [p.communicate(timeout=900) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *out) for p, out in zip(started, outs, strict=True)]


FAILS = (*TRAIN, "-o", "a", "--loss", "odd.py:odd", "--json")
KEEPS = ("--save-state", "state", "--save-every", "1")


def fails_silently(done: tuple[int, str, str]) -> None:
    code, out, err = done
    assert code == 2 and "Error" not in err and out == ""


def fails_in_words(done: tuple[int, str, str], home: Path) -> None:
    code, out, err = done
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    line = LOSS.splitlines().index('        raise ValueError("the third call")') + 1
    said = f"odd.py:odd failed at {home}/odd.py:{line}: ValueError: the third call"
    assert code == 2 and errors == [f"Error: {said}"]
    assert not json.loads(out)["ok"]


def only_a_state_is_left(home: Path, step: int) -> None:
    assert json.loads((home / "state" / "state.json").read_text())["step"] == step
    assert not (home / "a").exists()


@pytest.mark.slow  # both sides are in the next one, and test_processes.py has what passes between
def test_an_error_in_one_process_ends_all(home: Path) -> None:
    first, second = by_hand(*FAILS, *KEEPS)
    fails_silently(first)
    fails_in_words(second, home)
    only_a_state_is_left(home, 2)


@pytest.mark.parametrize("first", [True, False])
def test_an_error_is_said_by_the_process_that_has_it(
    first: bool, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first process, which hears of the error of another and has kept a state; the other."""

    @contextlib.contextmanager
    def joined(cuda: bool = False) -> Iterator[Processes]:
        try:
            yield ALONE
        except Exception as e:
            if first:
                raise Elsewhere(
                    "process 1 failed", "read the error of that process", exit_code=2
                ) from e
            raise

    monkeypatch.setattr(shares, "processes", joined)
    monkeypatch.setenv("RANK", "1")  # of the loss
    done = run(capsys, *FAILS, *(KEEPS if first else ()))
    if first:
        fails_silently(done)
        only_a_state_is_left(home, 1)  # this one validates alone, which is the loss's first call
    else:
        fails_in_words(done, home)
        assert not (home / "a").exists()


@pytest.mark.slow
def test_both_are_stopped(home: Path) -> None:
    (home / "slow.py").write_text(
        "import time, torch\ndef loss(out, labels):\n    time.sleep(0.05)\n"
        "    return torch.nn.functional.cross_entropy(out['logits'], labels)\n"
    )
    argv = (*TRAIN, "-o", "a", "--loss", "slow.py:loss", "--steps", "4000", "--save-state", "state")
    first, second = by_hand(*argv, "--save-every", "2", until=home / "state")
    assert first[0] == second[0] == 143
    assert "terminated; state holds the state of step" in first[2] and second[1:] == ("", "")
    assert {p.name for p in home.iterdir() if p.name[0] == "."} == set()


@pytest.mark.slow
def test_a_mistake_of_all_is_said_once(home: Path) -> None:
    first, second = by_hand(*TRAIN, "-o", "gone/a")
    assert first[0] == second[0] == 2
    assert first[2].count("\nError: ") == 1 and "the folder gone does not exist" in first[2]
    assert second[1] == second[2] == ""


ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--num_processes=2")


@pytest.mark.slow
def test_accelerate_starts_two(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = f"--main_process_port={free_ports(1)[0]}"
    command = ("--multi_gpu", port, "-m", "lora_fx.cli", *TRAIN, "-o", "two", "--json")
    done = launched(*ACCELERATE, *command)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["warnings"] == ["2 processes: each takes a share of every batch"]
    one = json.loads(run(capsys, *TRAIN, "-o", "one", "--json")[1])
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-6)


@pytest.mark.slow
def test_accelerate_starts_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On CPUs, which is said; the precision that it was given is taken."""
    command = ("--cpu", "--mixed_precision=bf16", "-m", "lora_fx.cli", *TRAIN, "-o", "a")
    done = launched(*ACCELERATE, *command)
    assert done.returncode == 0, done.stderr
    assert "accelerate launch --cpu started one process" in done.stderr
    code, out, _ = run(capsys, *TRAIN, "-o", "b", "--mixed-precision", "bf16")
    assert code == 0 and out.replace("wrote b", "wrote a") == done.stdout
    assert run(capsys, *TRAIN, "-o", "c")[0] == 0
    a, b, c = (load_file(home / n / "adapter_model.safetensors") for n in "abc")
    assert all((a[k] == b[k]).all() and (a[k] != c[k]).any() for k in a) and a.keys() == c.keys()


@pytest.mark.parametrize("option", ["--use_fsdp", "--use_deepspeed"])
def test_a_launch_that_splits_the_model_is_refused(
    option: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{option[2:].upper()}", "true")
    code, out, err = run(capsys, *TRAIN, "-o", "a")
    assert code == 2 and out == "" and not (home / "a").exists()
    assert err.count("Error: ") == 1 and f"accelerate launch {option} asks for" in err
