"""What a file is made for: a word of export that stands in the file, and rewrites for devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx.made_for import PROPERTY

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7)).eval()


def exported(folder: Path, name: str, **options: Any) -> Path:
    path = folder / name
    lora_fx.export(model(), path, (X,), provider="cpu", **options)
    return path


def written_target(path: Path) -> str | None:
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return properties.get(PROPERTY)


@pytest.mark.parametrize("mode", ["merged", "switch", "load"])
@pytest.mark.parametrize("target", ["cuda", "webgpu"])
def test_the_target_stands_in_the_file(tmp_path: Path, mode: Any, target: Any) -> None:
    assert written_target(exported(tmp_path, "m.onnx", mode=mode, target=target)) == target


def test_a_file_for_the_cpu_is_what_it_was(tmp_path: Path) -> None:
    by_default = exported(tmp_path, "default.onnx")
    for_cpu = exported(tmp_path, "cpu.onnx", target="cpu")
    assert by_default.read_bytes() == for_cpu.read_bytes()
    assert written_target(for_cpu) is None


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="unknown target 'gpu'"):
        exported(tmp_path, "m.onnx", target="gpu")
    assert not (tmp_path / "m.onnx").exists()


def test_a_merge_that_runs_nothing_changes_no_form(tmp_path: Path) -> None:
    base = exported(tmp_path, "base.onnx")
    adapter = lora_fx.insert(model(), (X,), rank=2).adapter()
    with pytest.raises(LoraFxError, match="target has no effect when an adapter is merged"):
        lora_fx.export(base, tmp_path / "m.onnx", adapters=adapter, target="cuda", provider="cpu")
    assert not (tmp_path / "m.onnx").exists()
