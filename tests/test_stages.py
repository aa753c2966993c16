"""The stages that each verb reports: whatever takes long has a line of its own.

A clock that never waits: every stage is told at once, however short it is on these models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.data import Table
from lora_fx.fx.train.loop import Settings, fit
from lora_fx.progress import telling


class AtOnce:
    """A timer whose time is over when it starts."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self.start = function
        self.cancel = lambda: None
        self.daemon = False


class Small(nn.Module):
    """Two layers, of which the second is narrow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.down(torch.relu(self.up(x)))
        return scores


X = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


def adapter_of(seed: int = 0) -> lora_fx.Adapter:
    """An adapter with an effect."""
    adapter = lora_fx.insert(Small().eval(), (X,), rank=2, seed=seed).adapter()
    for update in adapter.lowrank.values():
        update.b[:] = 0.1
    return adapter


def export(mode: Any, folder: Path, **options: Any) -> None:
    if mode in ("merged", "load", "train"):
        adapters: Any = None
    else:
        adapters = {"one": adapter_of()}
    lora_fx.export(
        Small().eval(), folder / "m.onnx", (X,), mode=mode, adapters=adapters, provider="cpu",
        **options,
    )  # fmt: skip


def train(folder: Path) -> None:
    generator = np.random.default_rng(0)
    columns = {
        "x": generator.standard_normal((12, 32)).astype(np.float32),
        "y": generator.integers(0, 3, 12),
    }
    table = Table(columns, "y")
    module = lora_fx.insert(Small().eval(), (X,), rank=2)
    fit(
        module, table.rows(range(8)), table.rows(range(8, 12)), settings=Settings(steps=2, checks=1)
    )


def bench(folder: Path) -> None:
    from lora_fx.onnx.bench import bench

    export("merged", folder)
    bench([folder / "m.onnx"], rounds=1)


def merge_onnx(folder: Path) -> None:
    export("merged", folder)
    lora_fx.merge(folder / "m.onnx", adapter_of(), folder / "n.onnx")


def program(folder: Path) -> None:
    from lora_fx.passes.verbs.program import save_program

    module = lora_fx.insert(Small().eval(), (X,), rank=2)
    save_program(module, folder / "m.pt2")
    lora_fx.capture(folder / "m.pt2")


class Deep(nn.Module):
    """Blocks that are equal, of which a capture traces one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.blocks = nn.ModuleList(copy.deepcopy(nn.Sequential(*make)) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


INSERT = ["inserting branches", "proving that every target takes effect"]
FILE = [
    "preparing the graph for ONNX",
    "translating to ONNX",
    "writing the file",
    "loading the file in ONNX Runtime",
]
CODED = ["coding weights", "running the model with floats, and with codes"]
VERBS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "capture": (
        lambda folder: lora_fx.capture(Deep().eval(), (X,)),
        ["capturing, eval mode", "comparing the graph with the model"],
    ),
    "insert": (
        lambda folder: lora_fx.insert(Small().eval(), (X,), rank=2),
        ["capturing, eval mode", *INSERT],
    ),
    "start from data": (
        lambda folder: lora_fx.insert(Small().eval(), (X,), rank=2, init="eva", data=[{"x": X}]),
        ["running the data through the model"],
    ),
    "quantise": (
        lambda folder: lora_fx.insert(Small().eval(), (X,), rank=2, quantise="int4"),
        ["coding weights"],
    ),
    "train": (
        train,
        [
            "finding what the loss is a mean of",
            "estimating the memory of a step",
            "running the first step",
            "validating before any weight changes",
            "validating",
        ],
    ),
    "attach": (
        lambda folder: lora_fx.attach(Small().eval(), (X,), rank=2),
        [
            "attaching branches",
            "capturing, eval mode",
            "comparing the live model with the graph",
            "proving that every target trains",
        ],
    ),
    "fold": (
        lambda folder: lora_fx.fold(Small().eval(), (X,), adapter=adapter_of()),
        ["folding the adapter into the weights"],
    ),
    "merged": (lambda folder: export("merged", folder), [*FILE, "running the model"]),
    "int4": (lambda folder: export("merged", folder, quantise="int4"), [*CODED, *FILE]),
    "int8": (lambda folder: export("merged", folder, precision="int8"), ["converting to int8"]),
    "optimise": (
        lambda folder: export("merged", folder, optimise=True),
        ["optimising: dead nodes"],
    ),
    "switch": (lambda folder: export("switch", folder), FILE),
    "batch": (lambda folder: export("batch", folder), FILE),
    "training step": (
        lambda folder: export("train", folder),
        [*FILE, "deriving the training step", "writing the step", "comparing a step"],
    ),
    "bench": (bench, ["timing"]),
    "merge": (merge_onnx, ["writing the file", "checking the merged tensors"]),
    "program": (program, ["writing and checking the program", "loading the model"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_stages(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, expected = VERBS[verb]
    lines: list[str] = []
    with telling(lines.append), monkeypatch.context() as patch:
        patch.setattr("threading.Timer", AtOnce)
        run(tmp_path)
    begun = [line.removesuffix(" …") for line in lines if line.endswith(" …")]
    stages = [name.partition(" at ")[0] for name in begun]
    missing = [name for name in expected if name not in stages]
    assert not missing, stages
    # each of them has an end, with its seconds
    ended = [line.rpartition(": ")[0] for line in lines if not line.endswith(" …")]
    assert sorted(begun) == sorted(ended)
