"""The estimate of an export's memory: its sums, and beside the peaks of real exports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.passes.verbs import export_memory
from lora_fx.passes.verbs.export_memory import WRITER, memory_of_export
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.options import CaptureOptions
from lora_fx.peak_memory import refusing

UP = 4 * (6 * 5 + 6)
DOWN = 4 * (7 * 6 + 7)
X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7)).eval()


def options(adapters: Adapter | None = None, mode: str = "merged") -> ExportOptions:
    return ExportOptions(
        target=Path("m.onnx"), adapters=adapters, mode=mode, include=None, exclude=None, rank=None,
        scales=False, names=None, inputs=None, provider="cpu", opset=None, external_over=1 << 20,
        capture=CaptureOptions(), force=False, optimise=False, precision=None, places=(),
    )  # fmt: skip


def parts(module: nn.Module, asked: ExportOptions) -> tuple[int, ...]:
    return tuple(part.expected for part in memory_of_export(module, asked).parts)


def test_sums() -> None:
    adapter = lora_fx.insert(model(), (X,), rank=2).adapter()
    file = UP + DOWN
    writing = WRITER + 4 * 7 * 6
    assert parts(model(), options()) == (0, 2 * file, 0, writing)
    assert parts(model(), options(adapter)) == (4 * (30 + 42), 2 * file, 0, writing)
    # a data file's pages are no memory of the process
    external = replace(options(), external_over=0)
    assert parts(model(), external) == (0, 0, 0, writing)
    assert parts(model(), replace(external, mode="batch")) == (0, 0, 0, writing)
    assert parts(model(), replace(external, mode="train")) == (0, 3 * file // 2, 0, writing)
    assert parts(model(), replace(external, optimise=True)) == (0, 0, 3 * file // 2, writing)


def test_a_file_of_a_model_in_bfloat16_is_twice_as_large() -> None:
    half = model().to(torch.bfloat16)
    estimate = memory_of_export(half, options())
    assert (estimate.loaded, estimate.parts[1].expected) == ((UP + DOWN) // 2, 2 * (UP + DOWN))
    kept = memory_of_export(half, replace(options(), precision="bfloat16"))
    assert kept.parts[1].expected == UP + DOWN


def test_what_is_certain() -> None:
    adapter = lora_fx.insert(model(), (X,), rank=2).adapter()
    assert memory_of_export(model(), options(adapter)).least == 4 * (30 + 42) + UP + DOWN
    assert memory_of_export(model(), replace(options(), external_over=0)).least == 0


def test_an_export_that_cannot_fit_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_memory, "free_memory", lambda: FreeMemory(100))
    path = tmp_path / "m.onnx"
    with refusing(), pytest.raises(LoraFxError, match=r"export needs at least 340 B .* 100 B"):
        lora_fx.export(model(), path, (X,))
    assert list(tmp_path.iterdir()) == []
    with refusing(False):
        lora_fx.export(model(), path, (X,), provider="cpu")
    assert path.exists()


PEAK = """
import gc, json, sys, torch
from dataclasses import replace
import lora_fx
from lora_fx.passes.verbs import export_memory
from tests.anonymous_memory import give_back, watched
from tests.passes.verbs.test_export_memory import Language

torch.set_num_threads(1)
estimates = []

def kept(peak, free, ways_out):
    estimates.append(peak.expected)

export_memory.check_memory = kept

def export(name, sizes, **options):
    torch.manual_seed(0)
    model = Language(*sizes).eval()
    ids = torch.randint(0, sizes[1], (2, 5))
    module = lora_fx.insert(model, (ids,), rank=2)
    adapter = module.adapter()
    for update in adapter.lowrank.values():
        update.b[:] = .05
    del module
    gc.collect()
    give_back()
    adapters = {"one": adapter} if options.get("mode") == "batch" else adapter
    path = f"{sys.argv[1]}/{name}.onnx"
    with watched() as grown:
        lora_fx.export(model, path, (ids,), adapters=adapters, provider="cpu", **options)
    return grown.peak

export("small", (8, 16, 1))
estimates.clear()
print(export("large", (1024, 8000, 6), **json.loads(sys.argv[2])) / estimates[0])
"""
EXPORTS: dict[str, dict[str, Any]] = {
    "merged": {"external_over": 0},
    "inside": {"external_over": 1 << 30},
    "batch": {"external_over": 0, "mode": "batch"},
    "train": {"mode": "train"},
    "optimise": {"external_over": 0, "optimise": True},
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_measured_beside_estimated(name: str, tmp_path: Path) -> None:
    """Anonymous bytes beyond those of the model and the process, beside the estimate."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path), json.dumps(EXPORTS[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio = float(done.stdout)
    print(f"\n{name}: measured {ratio:.2f} of the estimate")
    assert 0.6 < ratio < 1.2
