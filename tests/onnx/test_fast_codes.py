"""Products with codes in the form of CUDA's fast kernel: what goes, what stays, what is named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lora_fx
from lora_fx.compare import ORT_TOL, rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.onnx import Session
from lora_fx.onnx.candidate_error import open_model
from lora_fx.onnx.rewrites.fast_codes import FastCodes, said_of_slow_codes
from lora_fx.passes.verbs import export_switch
from tests.zoo.shared import captured

RNG = np.random.default_rng(0)
HALF = TensorProto.FLOAT16
FULL = TensorProto.FLOAT
BYTES = {4: 16, 8: 32}
"""Bits → bytes of a block of 32 codes."""


def product(
    outputs: int,
    inputs: int,
    *,
    bits: int = 4,
    zeros: Array | None = None,
    bias: bool = False,
    dtype: int = HALF,
) -> ir.Model:
    """A model of one MatMulNBits with random codes in blocks of 32."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    blocks = -(-inputs // 32)
    stored = {
        "codes": RNG.integers(0, 256, (outputs, blocks, BYTES[bits])).astype(np.uint8),
        "scales": RNG.standard_normal((outputs, blocks)).astype(numpy_type),
    }
    operands = ["x", "codes", "scales"]
    if zeros is not None:
        stored["zeros"] = zeros
        operands.append("zeros")
    if bias:
        stored["bias"] = RNG.standard_normal(outputs).astype(numpy_type)
        operands += [""] * (5 - len(operands)) + ["bias"]
    node = helper.make_node(
        "MatMulNBits", operands, ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=32,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", dtype, ["rows", inputs])],
        [helper.make_tensor_value_info("y", dtype, ["rows", outputs])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def outputs_of(model: ir.Model, x: Array) -> Array:
    return open_model(model.clone(), "cpu").run({"x": x})["y"]


def middle(rows: int, bytes_of_row: int, value: int = 0x88) -> Array:
    return np.full((rows, bytes_of_row), value, np.uint8)


def last_byte(zeros: Array, value: int) -> Array:
    changed = zeros.copy()
    changed[:, -1] = value
    return changed


ZEROS = {
    "two blocks": (4, 64, middle(6, 1), True),
    "three blocks, the last half is no code": (4, 96, last_byte(middle(6, 2), 0x38), True),
    "three blocks, flat": (4, 96, middle(6, 2).reshape(-1), True),
    "8 bits": (8, 64, middle(6, 2, 0x80), True),
    "another zero": (4, 64, last_byte(middle(6, 1), 0x87), False),
    "another zero in the last block of three": (4, 96, last_byte(middle(6, 2), 0x87), False),
    "the middle of 4 bits for 8": (8, 64, middle(6, 2, 0x88), False),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zero_points_in_the_middle_go(name: str) -> None:
    bits, inputs, zeros, goes = ZEROS[name]
    model = product(6, inputs, bits=bits, zeros=zeros, dtype=FULL)
    x = RNG.standard_normal((3, inputs)).astype(np.float32)
    before = outputs_of(model, x)
    assert FastCodes()(model).modified is goes
    assert ("zeros" in model.graph.initializers) is not goes
    assert np.array_equal(outputs_of(model, x), before)
    assert not FastCodes()(model).modified


def test_zero_points_that_a_caller_gives_stay() -> None:
    model = product(6, 64, zeros=middle(6, 1))
    model.graph.inputs.append(model.graph.initializers["zeros"])
    assert not FastCodes()(model).modified


SLOW: dict[str, tuple[dict[str, Any], str]] = {
    "fast": ({}, ""),
    "8 bits are fast from 32 outputs on": ({"outputs": 32, "bits": 8}, ""),
    "in float32": ({"dtype": FULL}, "computes in float32; pass --precision float16"),
    "an odd number of outputs": ({"outputs": 65}, "65 outputs are no multiple of 64"),
    "a block that is not whole": ({"inputs": 80}, "80 inputs are no multiple of the block 32"),
    "zero points": ({"zeros": middle(64, 1, 0x77)}, "the codes have zero points"),
    "a bias": ({"bias": True}, "the product adds a bias"),
}


@pytest.mark.parametrize("name", SLOW)
def test_products_that_are_slow_are_named(name: str) -> None:
    changed, reason = SLOW[name]
    options: dict[str, Any] = {"outputs": 64, "inputs": 64, **changed}
    model = product(options.pop("outputs"), options.pop("inputs"), **options)
    said = said_of_slow_codes(model)
    if not reason:
        assert said == []
        return
    assert len(said) == 1
    assert said[0].startswith("codes: CUDA's fast kernel for codes is not used: ")
    assert reason in said[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.odd = nn.Linear(64, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.odd(torch.relu(self.up(x)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def test_a_file_of_codes_in_float16_is_for_devices(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    asked: dict[str, Any] = {"quantise": "int4", "precision": "float16", "provider": "cpu"}
    with pytest.raises(LoraFxError, match="both set how weights are stored") as refused:
        lora_fx.export(net(), path, (X,), **asked)
    assert "--target cuda" in str(refused.value.hint)

    report = lora_fx.export(net(), path, (X,), target="cuda", **asked)
    model = ir.load(path)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [len([x for x in node.inputs if x is not None]) for node in products] == [3, 3]
    assert all(node.inputs[0].dtype == ir.DataType.FLOAT16 for node in products)
    assert (
        "odd.weight: CUDA's fast kernel for codes is not used: 33 outputs are no multiple"
        in str(report)
    )
    assert "up.weight: CUDA's" not in str(report)


def test_a_branch_changes_how_products_of_codes_in_float16_are_rounded(tmp_path: Path) -> None:
    """On the CPU the runtime computes them in float32 or in float16, by what stands beside them."""
    model, _, _ = captured("hf_llama")
    base = tmp_path / "base.onnx"
    lora_fx.export(model, base, quantise="int4", precision="float16", target="cuda", provider="cpu")
    report = lora_fx.export(
        base, tmp_path / "switch.onnx", mode="switch", target="cuda", provider="cpu"
    )
    largest = max(row.rel for row in report.parity if row.of == "base")
    assert ORT_TOL < largest < 2.0**-10


@pytest.mark.parametrize("scale", [1.0, 1.005])
def test_one_product_in_float16_hides_no_wrong_weight(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is float32, and is compared so: what the product rounds is a ten-thousandth."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 20, "com.microsoft": 1]>
        m (float[b, 32] x) => (float[b, 16] y) {
            h = MatMul(x, w)
            narrow = Cast<to=10>(x)
            q = com.microsoft.MatMulNBits<K=32, N=16, bits=4, block_size=32>(narrow, c, s)
            wide = Cast<to=1>(q)
            y = Add(h, wide)
        }"""
    )
    stored = {
        "w": RNG.standard_normal((32, 16)).astype(np.float32),
        "c": RNG.integers(0, 255, (16, 1, 16)).astype(np.uint8),
        "s": np.full(16, 1e-5, np.float16),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in stored.items()
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    made = export_switch._made_switchable

    def damaged(graph: Any, switch: Any, copies: Any) -> Any:
        manifest = made(graph, switch, copies)
        weight = graph.model.graph.initializers["w"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(scale), name="w")
        return manifest

    monkeypatch.setattr(export_switch, "_made_switchable", damaged)
    asked: dict[str, Any] = {"mode": "switch", "provider": "cpu", "include": "w"}
    if scale == 1:
        assert lora_fx.export(path, tmp_path / "s.onnx", **asked)
        return
    with pytest.raises(NoEffectError, match=r"differs from the model \(base\)"):
        lora_fx.export(path, tmp_path / "s.onnx", **asked)


def test_its_switch_file_is_proven_and_its_adapter_acts(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    lora_fx.export(
        net(), base, (X,), quantise="int4", precision="float16", target="cuda", provider="cpu"
    )
    module = lora_fx.insert(net(), (X,), rank=3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapter = module.adapter()
    switch = tmp_path / "switch.onnx"
    lora_fx.export(
        base, switch, adapters={"mine": adapter}, mode="switch", target="cuda", provider="cpu"
    )
    operators = Counter(node.op_type for node in onnx.load(switch).graph.node)
    assert operators["MatMulNBits"] == 2
    session = Session(switch, provider="cpu")
    session.load("mine", tmp_path / "mine.onnx_adapter")

    coded = lora_fx.insert(net(), (X,), quantise="int4", adapter=adapter).eval()
    (name,) = session.run({"x": X.numpy()})
    with torch.no_grad():
        expected = coded(X).numpy()
        base_of_torch = lora_fx.insert(net(), (X,), quantise="int4", rank=1).eval()(X).numpy()
    ours = session.run({"x": X.numpy()}, adapter="mine")[name]
    assert rel(ours, expected) < 8 * 2.0**-10
    assert rel(session.run({"x": X.numpy()})[name], base_of_torch) < 8 * 2.0**-10
    assert rel(ours, base_of_torch) > 0.1
