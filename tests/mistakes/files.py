"""The files of somebody who works with a model of two layers, and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank

FACTORIES = """
def bare():
    net = Net()
    net.fc1, net.fc2 = nn.Linear(8, 12, bias=False), nn.Linear(12, 5, bias=False)
    return net.eval(), (torch.randn(3, 8),), {}
def one():
    net = Net()
    net.fc2 = nn.Linear(12, 1)
    return net.eval(), (torch.randn(3, 8),), {}
"""
"""The factories of a model whose weights are base.safetensors, and of one with one output."""
SHAPES = {"fc1.weight": (12, 8), "fc2.weight": (5, 12)}


def onnx_file(path: Path, base: dict[str, Any], output: str = "output") -> None:
    """relu(x @ W1ᵀ) @ W2ᵀ."""
    names = ("fc1.weight", "fc2.weight")
    held = [numpy_helper.from_array(np.ascontiguousarray(base[n]), n) for n in names]
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc2.weight"], [output], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "m", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def int8_base(folder: Path, base: dict[str, Any]) -> None:
    """The base in codes, as bitsandbytes saves them: weight = codes · SCB / 127."""
    tensors: dict[str, Any] = {}
    for name, weight in base.items():
        largest = np.abs(weight).max(axis=1)
        tensors[name] = np.rint(weight / largest[:, None] * 127).astype("i1")
        tensors[name.replace("weight", "SCB")] = largest
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (folder / "config.json").write_text(json.dumps(config))


def updates(rng: np.random.Generator, shapes: dict[str, tuple[int, int]]) -> Adapter:
    entries = {}
    for key, (rows, columns) in shapes.items():
        a, b = rng.standard_normal((2, columns)), rng.standard_normal((rows, 2))
        entries[key] = LowRank(a.astype("f"), b.astype("f"), alpha=6.0)
    return Adapter(entries)


def damaged_adapters(start: Path, odd: Path) -> None:
    """Copies of the adapter in start, each with one thing wrong, as folders in odd."""
    configs: dict[str, dict[str, Any]] = {
        "worded": {"r": "two"},
        "unscaled": {"lora_alpha": None},
        "rank3": {"r": 3},
        "alora": {"alora_invocation_tokens": [5, 7]},
    }
    names = ["bare", "hollow", "cut", "gaps", "half", "whole_numbers", "comma", "pickled", "a b"]
    for name in [*configs, *names, "typed"]:
        shutil.copytree(start, odd / name)
    for name, changes in {**configs, "typed": {"peft_type": "LORRA"}}.items():
        config = json.loads((start / "adapter_config.json").read_text())
        (odd / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(start / "adapter_model.safetensors")
    first = min(tensors)
    (odd / "bare/adapter_config.json").unlink()
    (odd / "hollow/adapter_model.safetensors").unlink()
    (odd / "comma/adapter_config.json").write_text('{"r": 2,}')
    cut = odd / "cut/adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    gaps = {**tensors, first: np.full_like(tensors[first], np.nan)}
    save_file(gaps, odd / "gaps/adapter_model.safetensors")
    half = {key: tensor for key, tensor in tensors.items() if key != first}
    save_file(half, odd / "half/adapter_model.safetensors")
    whole = {key: tensor.astype("i4") for key, tensor in tensors.items()}
    save_file(whole, odd / "whole_numbers/adapter_model.safetensors")
    (odd / "pickled/adapter_model.safetensors").unlink()
    state = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    torch.save(state, odd / "pickled/adapter_model.bin")


def unusual_data(odd: Path, x: np.ndarray, labels: np.ndarray) -> None:
    """Data files that cannot be trained on, in odd."""
    np.savez(odd / "empty.npz", x=x[:0], labels=labels[:0])
    np.savez(odd / "uneven.npz", x=x, labels=labels[:30])
    np.savez(odd / "high.npz", x=x, labels=labels + 1)
    np.savez(odd / "negative.npz", x=x, labels=labels - 1)
    np.savez(odd / "fractions.npz", x=x, labels=labels + 0.5)
    with_nan = x.copy()
    with_nan[6, 2] = np.nan
    np.savez(odd / "nan.npz", x=with_nan, labels=labels)
    np.savez(odd / "ids.npz", x=x[:3], adapter_ids=np.array([0, 1, 9]))
    np.savez(odd / "ids_in_range.npz", x=x[:3], adapter_ids=np.array([0, 1, 1]))
    table = [",".join(f"{value:.3f}" for value in row) + ",1" for row in x]
    table[6] = table[6].replace(table[6].split(",")[2], "")
    (odd / "gap.csv").write_text("a,b,c,d,e,f,g,h,label\n" + "\n".join(table) + "\n")
    np.savez(odd / "renamed.npz", features=x, labels=labels)
    np.savez(odd / "objects.npz", x=x, labels=np.array(["a"] * 40, dtype=object))
    row = json.dumps({"x": x[0].tolist(), "labels": 0}) + "\n"
    (odd / "cut.jsonl").write_text(9 * row + row[:20] + "\n")
