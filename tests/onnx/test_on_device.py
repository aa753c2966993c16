"""What commands say of a file on a device: the provider's answer, or that of a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.onnx import on_device
from lora_fx.onnx.cuda_obstacles import Obstacle
from lora_fx.onnx.device_placement import Placement, placement_of
from tests.providers import GPU, ON_GPU

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
FREE = "cuda, by the list of lora-fx: no copies; its graph can be captured"
GRAPHS = {
    "a product": ("float[n, 3] x", "float[n, 3] y", "y = Mul(x, x)"),
    "no kernel": (
        "float[n] x", "float[m] y", "d = Mul(x, x)  u = Unique(d)  y = Mul(u, u)",
    ),
    "control flow": (
        "bool c, float[n, 3] x", "float[n, 3] y",
        "d = Not(c)  y = If(d) <then_branch = a () => (float[n, 3] u) { u = Add(x, x) },"
        " else_branch = b () => (float[n, 3] v) { v = Mul(x, x) }>",
    ),
}  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7)).eval()


def exported(folder: Path, name: str, **options: Any) -> lora_fx.Report:
    return lora_fx.export(model(), folder / name, (X,), provider="cpu", **options)


def test_a_report_says_what_a_file_for_a_device_does_there(tmp_path: Path) -> None:
    report = exported(tmp_path, "m.onnx", target="cuda")
    assert report.details["on_device"] == FREE
    assert f"  on_device: {FREE}" in str(report).splitlines()

    report = exported(tmp_path, "w.onnx", target="webgpu")
    assert report.details["on_device"] == "webgpu: not asked; pass --provider webgpu"
    assert "on_device" not in exported(tmp_path, "c.onnx").details


def test_verify_says_it_of_every_file(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    exported(tmp_path, "a.onnx", target="cuda")
    exported(tmp_path, "b.onnx")
    of_list = {"capturable": True, "obstacles": []}

    report = lora_fx.verify(*paths, provider="cpu")
    assert report.details == {
        "cuda": dict.fromkeys(paths, of_list),
        "on_device": [f"{paths[0]}: {FREE}"],
    }
    report = lora_fx.verify(paths[1], lora_fx.capture(model(), (X,)), provider="cpu")
    assert report.details == {"cuda": {paths[1]: of_list}}


def test_the_line_names_obstacles() -> None:
    obstacles = [Obstacle("Unique", name, "has no CUDA kernel") for name in "abcd"]
    line = on_device.of_obstacles("m.onnx", obstacles, "cpu", "cuda")["on_device"]
    assert line == (
        "cuda, by the list of lora-fx: 4 obstacles (Unique 'a' has no CUDA kernel, Unique 'b' has "
        "no CUDA kernel, Unique 'c' has no CUDA kernel, …); its graph cannot be captured"
    )


@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_the_answer_of_a_provider_stands_before_the_list(
    monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    copies = ["Where → to host → Unique"]
    placement = Placement({provider: {"Mul": 3}, "cpu": {"Unique": 1}}, copies, "of its nodes")
    monkeypatch.setattr(on_device, "placement_of", lambda path, asked: placement)
    fields = on_device.of_obstacles("m.onnx", [], provider, "cpu")
    assert fields[provider]["capturable"] is False
    assert fields[provider]["copies"] == copies
    assert fields[provider]["nodes"] == {provider: {"Mul": 3}, "cpu": {"Unique": 1}}
    assert fields["on_device"] == (
        f"{provider}: 3 nodes there, 1 on the CPU; 1 copy (Where → to host → Unique); its graph "
        "cannot be captured: of its nodes"
    )


@pytest.mark.parametrize("graph", [pytest.param(graph, marks=ON_GPU) for graph in GRAPHS])
def test_the_provider_of_this_machine_is_asked(tmp_path: Path, graph: str) -> None:
    inputs, outputs, nodes = GRAPHS[graph]
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {nodes} }}'
    path = tmp_path / "g.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)), path)
    placement = placement_of(path, GPU)
    assert placement.nodes[GPU]["Mul"] >= 1
    is_free = graph == "a product"
    assert bool(placement.copies) is not is_free
    assert (not placement.uncapturable) is is_free
