"""DDP, FSDP2 by block and torch.distributed.checkpoint: the numbers of one process.

tests/fx/train/loops_worker.py runs in two processes; here is the plain loop over the same rows.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

import lora_fx
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.attach.attached import adapter_gap
from tests.fx.train import loops_worker as worker
from tests.fx.train import quantised_worker
from tests.fx.train.test_processes import free_ports
from tests.test_samples import SAMPLES

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(folder: Path, *command: str) -> str:
    """Run in two processes, from the top of the repository; returns what they print."""
    done = subprocess.run(
        [*TORCHRUN, *command],
        capture_output=True,
        text=True,
        cwd=SAMPLES.parent,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def two_processes(folder: Path, *command: str, stdout: IO[str] | None = None) -> None:
    """Run in two processes without torchrun, which is a third one that imports torch."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=SAMPLES.parent,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        said = [p.communicate(timeout=280)[1] for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)[-6000:]


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hf_gpt2", "hf_llama"))]
)
def test_the_losses_and_adapters_of_one_process(name: str, tmp_path: Path) -> None:
    two_processes(tmp_path, "-m", worker.__name__, name, str(tmp_path))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert list(losses) == list(worker.WAYS)
    start = worker.made(name)
    plain = copy.deepcopy(start)
    want = worker.train(plain, range(worker.STEPS))
    assert want[0] - want[2] > 0.05 and want[1] - want[3] > 0.05, "something is learnt"
    base = plain.adapter().metadata["base"]
    for way in worker.WAYS:
        if way == "ddp_codes":
            alike = worker.train(quantised_worker.made(name), range(worker.STEPS))
            assert alike[0] - alike[2] > 0.05 and worst(alike, losses[way]) < 1e-5, way
            continue
        got = lora_fx.load_adapter(tmp_path / way).bind(insertion_of(start).found)
        if way == "fsdp_bf16":
            rough = worker.made(name, torch.bfloat16)
            alike = worker.train(rough, range(worker.STEPS))
            assert worst(alike, losses[way]) < 0.02 * want[0], way
            assert any(u.b.any() for u in got.lowrank.values())
            continue
        assert worst(want, losses[way]) < 1e-5, way
        assert adapter_gap(got, by_order(plain.adapter(), got)) < 1e-5, way
        assert got.metadata["base"] == base, "the fingerprint of the base, sharded or not"

    # a checkpoint of two processes, read by one
    trained = {n for n, p in start.named_parameters() if p.requires_grad}
    resumed = copy.deepcopy(start)
    optimizer = worker.optimizer_of(resumed)
    state = worker.state_of(resumed, optimizer)
    assert set(state["model"]) == trained
    stored = FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    assert {k.removeprefix("model.") for k in stored if k.startswith("model.")} == trained
    with pytest.warns(UserWarning, match="in a single process"):
        load(state, checkpoint_id=tmp_path / "state")
    worker.take(state, resumed, optimizer)
    rest = worker.train(resumed, range(2, worker.STEPS), optimizer=optimizer)
    assert worst(rest, want[2:]) < 1e-5


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def by_order(adapter: lora_fx.Adapter, like: lora_fx.Adapter) -> lora_fx.Adapter:
    assert set(adapter.entries) == set(like.entries)
    return lora_fx.Adapter({k: adapter.entries[k] for k in like.entries})


def test_parts_that_another_tool_keeps_are_no_adapter() -> None:
    """Some tools leave tensors of size 0 behind, which would be saved as an adapter."""
    model = worker.made("tied")
    held = model.blocks[1][3].lora_B.weight
    kept = held.data
    held.data = torch.empty(0)
    said = r"blocks.1.3.lora_B.weight has the shape \[0\] here, not \[12, 3\]: another tool keeps"
    with pytest.raises(lora_fx.LoraFxError, match=said):
        model.adapter()
    with pytest.raises(lora_fx.LoraFxError, match="another tool keeps"):
        model.load_adapter(worker.made("tied").adapter())
    held.data = kept
    assert adapter_gap(model.adapter(), worker.made("tied").adapter()) == 0.0
    model.out.bias.data = torch.empty(0)
    with pytest.raises(lora_fx.LoraFxError, match=r"out.bias has the shape \[0\]"):
        model.adapter()


@pytest.mark.slow
def test_the_sample(tmp_path: Path) -> None:
    plain, sharded = (
        torchrun(tmp_path, str(SAMPLES / "torchrun_loop.py"), *way) for way in (["ddp"], ["fsdp"])
    )
    assert plain.startswith("ddp trained in 2 processes: loss 0.")
    assert sharded.startswith(plain.strip().replace("ddp", "fsdp")), "the same loss"
    assert "the resumed run gives the same adapter: True" in sharded
