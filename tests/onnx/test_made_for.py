"""What a file is made for: a word of export that stands in the file, and rewrites for devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx.made_for import PROPERTY
from lora_fx.onnx.manifest import manifest_of
from tests.onnx.test_batch import adapter

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


@pytest.mark.parametrize(("target", "rank"), [("cpu", 0), ("cuda", 0), ("webgpu", 1)])
def test_a_rank_of_zero_where_it_is_safe(tmp_path: Path, target: Any, rank: int) -> None:
    """Defaults of rank 1 are zeros; an adapter takes their place as it takes that of rank 0."""
    path = exported(tmp_path, "m.onnx", mode="switch", target=target)
    slots = manifest_of(path).slots.values()
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert [tensors[slot.a].shape for slot in slots] == [(5, rank), (6, rank)]
    assert [tensors[slot.b].shape for slot in slots] == [(rank, 6), (rank, 7)]
    assert not any(tensors[name].any() for slot in slots for name in (slot.a, slot.b))

    plain = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (base,) = plain.run(None, {"input": X.numpy()})
    assert rel(base, model()(X).detach().numpy()) <= ORT_TOL

    captured = lora_fx.capture(model(), (X,))
    one = adapter(captured, 1, 3)
    session = Session(path, "cpu")
    session.load("one", one)
    (changed,) = session.run({"input": X.numpy()}, "one").values()
    merged = lora_fx.fold(captured, adapter=one)
    assert rel(changed, merged(X).detach().numpy()) <= ORT_TOL
    assert rel(changed, base) > 0.05


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="unknown target 'gpu'"):
        exported(tmp_path, "m.onnx", target="gpu")
    assert not (tmp_path / "m.onnx").exists()


def test_a_file_takes_the_forms_of_a_device_alone_or_with_an_adapter(tmp_path: Path) -> None:
    base = exported(tmp_path, "base.onnx")
    of_device = tmp_path / "device.onnx"
    assert lora_fx.export(base, of_device, target="cuda", provider="cpu")
    assert written_target(of_device) == "cuda"

    update = adapter(lora_fx.capture(model(), (X,)), 1, 3)
    merged = tmp_path / "merged.onnx"
    assert lora_fx.export(base, merged, adapters=update, target="cuda", provider="cpu")
    assert written_target(merged) == "cuda"


@pytest.mark.parametrize("mode", ["switch", "merged"])
def test_the_target_is_that_of_the_last_export(tmp_path: Path, mode: Any) -> None:
    """Defaults of a file for the CPU have rank 0, with which WebGPU's products end the process."""
    source = exported(tmp_path, "webgpu.onnx", target="webgpu")
    path = tmp_path / "again.onnx"
    options = {"optimise": True} if mode == "merged" else {}
    lora_fx.export(source, path, mode=mode, provider="cpu", **options)
    assert written_target(path) is None


def test_a_merge_keeps_the_target(tmp_path: Path) -> None:
    source = exported(tmp_path, "cuda.onnx", target="cuda")
    update = adapter(lora_fx.capture(model(), (X,)), 1, 3)
    lora_fx.merge(source, update, tmp_path / "merged.onnx")
    assert written_target(tmp_path / "merged.onnx") == "cuda"
