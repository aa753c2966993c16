"""What the rewrites of an exported graph take and leave, one small graph a row."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx import precision
from lora_fx.onnx.bfloat16 import unround, widen
from lora_fx.onnx.candidate_error import open_model
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.split_skip_norm import SplitSkipNorm

RNG = np.random.default_rng(0)
WEIGHTS = {
    "flat": np.array([-1, 6]),
    "rows": np.array([4, -1]),
    "deep": np.array([2, 2, 5]),
    "same": np.array([0, 5]),
    "w": RNG.standard_normal((6, 5)).astype(np.float32),
    "turned": RNG.standard_normal((5, 6)).astype(np.float32),
    "c": RNG.standard_normal(5).astype(np.float32),
    "by_row": RNG.standard_normal((4, 5)).astype(np.float32),
    "a": RNG.standard_normal((6, 2)).astype(np.float32),
    "b": RNG.standard_normal((2, 5)).astype(np.float32),
}


def model_of(body: str, x: str = "float[2, 2, 6] x", y: str = "float[2, 2, 5] y") -> ir.Model:
    """A model whose shapes were inferred, with those of WEIGHTS that its nodes read."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> m ({x}) => ({y}) {{ {body} }}'
    )
    read = {name for node in proto.graph.node for name in node.input}
    for name in WEIGHTS.keys() & read:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def outputs(model: ir.Model) -> dict[str, Array]:
    shape = [int(size) for size in model.graph.inputs[0].shape or ()]
    feed = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return open_model(model.clone(), "cpu").run({"x": feed})


FLAT = "f = Reshape(x, flat)"
DEEP = "y = Reshape(p, deep)"
GEMMS = {
    "bias": (f"{FLAT} p = Gemm(f, w, c) {DEEP}", True),
    "no bias": (f"{FLAT} p = Gemm(f, w) {DEEP}", True),
    "a transposed weight": (f"{FLAT} p = Gemm<transB=1>(f, turned, c) {DEEP}", True),
    "another reshape after it": (f"{FLAT} p = Gemm(f, w) q = Reshape(p, deep) y = Relu(q)", True),
    "alpha": (f"{FLAT} p = Gemm<alpha=0.5>(f, w, c) {DEEP}", False),
    "beta": (f"{FLAT} p = Gemm<beta=0.5>(f, w, c) {DEEP}", False),
    "a bias by rows": (f"{FLAT} p = Gemm(f, w, by_row) {DEEP}", False),
    "another reshape before it": (f"f = Reshape(x, rows) p = Gemm(f, w) {DEEP}", False),
    "no reshape before it": (f"n = Neg(x) f = Flatten<axis=2>(n) p = Gemm(f, w) {DEEP}", False),
    "read by another node": (f"{FLAT} p = Gemm(f, w) n = Neg(p) y = Reshape(n, deep)", False),
    "a size that is copied": (
        f"{FLAT} p = Gemm(f, w) q = Reshape(p, same) y = Reshape(q, deep)", False
    ),
    "a product that nothing reads": (f"{FLAT} p = Gemm(f, w) m = MatMul(f, w) y = Reshape(m, deep)",
                                     False),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMS)
def test_gemms_of_flattened_rows(name: str) -> None:
    body, changes = GEMMS[name]
    model = model_of(body)
    before = outputs(model)
    assert GemmToMatMul()(model).modified is changes
    assert any(node.op_type == "Gemm" for node in model.graph) is not changes
    assert rel(outputs(model)["y"], before["y"]) < 1e-6


@pytest.mark.parametrize(
    ("x", "changes"),
    [
        ("float[2, 2, 2, 3] x", True),  # heads
        ("float[2, 1, 2, 2, 3] x", False),
        ("float[2, 2, 3, 2] x", True),
        ("float[2, 4, 3] x", False),
        ("float[4, 6] x", False),
    ],
)
def test_what_was_flattened(x: str, changes: bool) -> None:
    model = model_of(f"{FLAT} p = Gemm(f, w, c) {DEEP}", x)
    before = outputs(model)
    assert GemmToMatMul()(model).modified is changes
    assert rel(outputs(model)["y"], before["y"]) < 1e-6


def test_a_gemm_whose_columns_are_not_known() -> None:
    model = model_of(f"{FLAT} p = Gemm(f, w) {DEEP}")
    for node in model.graph:
        if node.op_type == "Gemm":
            node.outputs[0].shape = None
    assert not GemmToMatMul()(model).modified


DELTAS = {
    "a branch": ("d = MatMul(x, a) e = MatMul(d, b)", True),
    "one product": ("e = MatMul(x, w)", False),
    "a residual": ("n = Neg(x) d = MatMul(n, a) e = MatMul(d, b)", False),
}


@pytest.mark.parametrize("name", DELTAS)
def test_a_branch_goes_before_the_bias(name: str) -> None:
    body, changes = DELTAS[name]
    model = model_of(f"{body} p = MatMul(x, w) q = Add(p, c) y = Add(q, e)")
    before = outputs(model)
    assert DeltaBeforeBias()(model).modified is changes
    assert rel(outputs(model)["y"], before["y"]) < 1e-6


def test_a_sum_of_two_shapes_stays() -> None:
    model = model_of(
        "n = ReduceMean(x) s = Add(x, n) y = LayerNormalization<axis=-1>(s, g)",
        "float[2, 2, 6] x, float[6] g",
        "float[2, 2, 6] y",
    )
    assert not SplitSkipNorm()(model).modified


def test_a_precision_that_there_is_none_of() -> None:
    model = model_of("y = MatMul(x, w)")
    with pytest.raises(LoraFxError, match="cannot be converted to 'int4'"):
        precision.narrow(model, "int4", [], "cpu")


def test_a_model_too_large_for_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LARGEST", 100)
    with pytest.raises(LoraFxError, match="120 bytes of weights; expected less than 2 GB for int8"):
        precision.narrow(model_of("y = MatMul(x, w)"), "int8", [], "cpu")


def test_bfloat16_in_attributes() -> None:
    model = model_of("h = Cast<to=16>(x) k = Mul(h, h) y = Cast<to=1>(k)", y="float[2, 2, 6] y")
    constant = ir.node("Constant", [], {"value": ir.tensor(np.ones(6, ml_dtypes.bfloat16))})
    model.graph[0].prepend(constant)
    assert widen(model) and not widen(model)
    assert constant.attributes["value"].as_tensor().dtype is ir.DataType.FLOAT
    assert [n.attributes["to"].as_int() for n in model.graph if n.op_type == "Cast"] == [1, 1]


def rounded(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize(
    ("stored", "replaced"),
    [
        (rounded, True),
        (lambda exact: rounded(exact).T, True),
        (lambda exact: exact, False),
        (lambda exact: rounded(exact)[:, 1:], False),
    ],
)
def test_weights_that_were_rounded(stored: Callable[[Array], Array], replaced: bool) -> None:
    exact = WEIGHTS["w"]
    model = model_of("y = MatMul(x, w)")
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.ascontiguousarray(stored(exact)), name="w")
    before = weight.const_value.numpy()
    names = unround(model, {"w": lambda: exact, "v": lambda: exact}, {})
    assert names == ({"w"} if replaced else set())
    after = weight.const_value.numpy()
    assert (rel(after, before) > 0) is replaced and after.shape == before.shape
