"""The commands of docs/loops.md in two processes: one process's losses, half of the frozen bytes.

samples/llama_processes.py prints what is compared here, for a small Llama and for the shape of one
of a billion parameters.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.test_train_cli import MODEL
from tests.fx.train.test_loops_torchrun import two_processes
from tests.fx.train.test_processes import free_ports
from tests.test_docs import DOCS, blocks
from tests.test_samples import SAMPLES

PROGRAM = SAMPLES / "llama_processes.py"
MODULES = {
    "torchrun": ("torch.distributed.run", "--master-port"),
    "accelerate": ("accelerate.commands.accelerate_cli", "--main_process_port"),
}
pytest.importorskip("transformers")
pytest.importorskip("peft")


@dataclass(frozen=True)
class Printed:
    """What the sample prints of one run."""

    losses: list[float]
    frozen: int
    whole: int
    peft_gap: float
    resumed: list[str]


def printed(text: str) -> Printed:
    losses = re.search(r"processes: losses (.+)", text)
    frozen = re.search(r"frozen bytes of a process: ([\d,]+) of ([\d,]+)", text)
    gap = re.search(r"with the adapter: within (\S+) of (\S+)", text)
    assert losses and frozen and gap, text
    here, whole = (int(count.replace(",", "")) for count in frozen.groups())
    resumed = re.findall(r"resumed from the (\w+) state: the same losses: True", text)
    relative = float(gap[1]) / float(gap[2])
    return Printed([float(x) for x in losses[1].split()], here, whole, relative, resumed)


def started(folder: Path, *command: str) -> str:
    """Run a command of one process, or a launcher of two, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=580,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Printed:
    return printed(started(tmp_path_factory.mktemp("alone"), str(PROGRAM), "ddp"))


def check(run: Printed, alone: Printed, dtype: torch.dtype) -> None:
    """Compare with one process, up to the rounding of a mean over rows in another order.

    A loss is a mean of -log p. An error of every score by half a unit in the last place moves it
    by at most that unit times the largest score, which is below the loss itself here.
    """
    gate = torch.finfo(dtype).eps * alone.losses[0]
    worst = max(abs(a - b) for a, b in zip(run.losses, alone.losses, strict=True))
    assert worst <= gate, f"{worst:.1e} above {gate:.1e}"
    assert alone.losses[0] - alone.losses[-1] > 4 * gate, "what is learnt is seen"
    assert run.whole == alone.whole == alone.frozen
    assert run.resumed == alone.resumed == ["sharded", "whole"]
    assert max(run.peft_gap, alone.peft_gap) <= 4 * torch.finfo(dtype).eps


@pytest.mark.slow  # loops_worker.py checks the bytes of smaller models
def test_fsdp_keeps_half_of_the_frozen_bytes(alone: Printed, tmp_path: Path) -> None:
    with open(tmp_path / "printed.txt", "w") as out:
        two_processes(tmp_path, str(PROGRAM), "fsdp", stdout=out)
    run = printed((tmp_path / "printed.txt").read_text())
    check(run, alone, torch.float32)
    assert 2 * run.frozen == alone.frozen


COMMANDS = [
    line
    for block in blocks(DOCS / "loops.md")
    if block.language == "sh"
    for line in block.text.splitlines()
]


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page(line: str, alone: Printed, tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(SAMPLES)
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :5].argmax(1))
    launcher, *words = shlex.split(line)
    module, port = MODULES[launcher]
    pytest.importorskip(module.partition(".")[0])
    place = 1 if launcher == "accelerate" else 0  # behind its own command, launch
    words.insert(place, f"{port}={free_ports(1)[0]}")
    text = started(tmp_path, "-m", module, *words)
    if PROGRAM.name in line:
        run = printed(text)
        check(run, alone, torch.float32)
        assert run.frozen == (alone.frozen // 2 if " fsdp" in line else alone.frozen)
    elif "lora_fx.cli train" in line:
        assert (tmp_path / words[-1] / "adapter_model.safetensors").is_file()
        assert text.count("wrote ") == 1, "one process writes"
    else:
        assert "the resumed run gives the same adapter: True" in text


@pytest.mark.slow
@pytest.mark.parametrize("way", [["ddp"], ["fsdp"], ["fsdp", "--attach"]], ids=" ".join)
def test_the_shape_of_a_billion(way: list[str], tmp_path: Path) -> None:
    """Two layers in bfloat16, and the table of 128,256 rows; two processes, below 8 GB together."""
    options = ["--billion"]
    alone = printed(started(tmp_path, str(PROGRAM), "ddp", *options))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = printed(started(tmp_path, *launch, str(PROGRAM), *way, *options))
    check(run, alone, torch.bfloat16)
    assert run.frozen == (alone.frozen // 2 if "fsdp" in way else alone.frozen)
