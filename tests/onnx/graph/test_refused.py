"""What an ONNX graph refuses, and what it can still do beside a quantised weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from tests.onnx.graph.test_rows import run

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)
HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> m (float[N,8] x'


def model(weights: dict[str, np.ndarray[Any, Any]], body: str) -> ir.Model:
    kinds = {"int8": "int8", "uint8": "uint8", "float32": "float"}
    given = (
        f"{kinds[w.dtype.name]}[{','.join(map(str, w.shape))}] {n}" for n, w in weights.items()
    )
    made = ir.from_onnx_text(f"{', '.join((HEAD, *given))}) => (float[N,6] y) {{ {body} }}")
    for value in list(made.graph.inputs)[1:]:
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
        made.graph.initializers[str(value.name)] = value
    return made


def dequantised() -> tuple[ir.Model, np.ndarray[Any, Any]]:
    codes = RNG.integers(-127, 128, (8, 6)).astype(np.int8)
    scale = np.float32(0.01).reshape(())
    weights = {"w": codes, "s": scale}
    return model(weights, "d = DequantizeLinear(w, s) y = MatMul(x, d)"), codes * np.float32(0.01)


def blocks() -> tuple[ir.Model, np.ndarray[Any, Any]]:
    """MatMulNBits: two codes of four bits a byte, zero point 8, one block of 16 a row."""
    codes = RNG.integers(0, 16, (6, 16)).astype(np.uint8)
    scales = (RNG.random(6) * 0.1 + 0.1).astype(np.float32)
    wide = (codes[:, :8].astype(np.float32) - 8) * scales[:, None]
    codes[:, 8:] = 8
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(6, 1, 8)
    body = "y = com.microsoft.MatMulNBits<K = 8, N = 6, bits = 4, block_size = 16>(x, w, s)"
    return model({"w": packed, "s": scales}, body), wide.T


@pytest.mark.parametrize("made", [dequantised, blocks])
def test_beside_a_quantised_weight_but_not_into_it(made: Any) -> None:
    whole, wide = made()
    base = run(whole, X)
    assert rel(base, X @ wide) < 1e-2  # the runtime quantises x as well
    graph = OnnxGraph(whole)
    found = find(graph)
    assert "quantised" in found.refusals[0].reason
    assert found.refusals[0].verbs == ("fold", "merge", "load")
    (target,) = found.targets
    assert target.default and found.reached_share == 1.0 and not found.optional
    assert (target.layout.in_size, target.layout.out_size) == (8, 6)
    a = RNG.standard_normal((2, 8)).astype(np.float32)
    b = RNG.standard_normal((6, 2)).astype(np.float32)
    update = {"w": LowRank(a, b, 1.0, target.layout)}
    with pytest.raises(LoraFxError, match=r"'w': the weight is quantised \(.*round") as error:
        Fold(update)(graph)
    assert "--mode switch" in error.value.hint
    assert Insert(update)(graph).modified
    assert rel(run(whole, X), base + 0.5 * X @ (b @ a).T) < 1e-6


INTEGERS = {
    "no scale of the weight": (
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast<to = 1>(i) "
        "y = Mul(f, s)", "its scale is not applied"),
    "a sum before the scale": (
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast<to = 1>(i) "
        "g = Add(f, b) t = Mul(s, k) y = Mul(g, t)", "its scale is not applied"),
    "codes of a known range": (
        "q = QuantizeLinear(x, k, o) i = MatMulInteger(q, w) f = Cast<to = 1>(i) y = Mul(f, k)",
        "do not come from a DynamicQuantizeLinear"),
    "QLinearMatMul": (
        "q = QuantizeLinear(x, k, o) i = QLinearMatMul(q, k, o, w, k, p, k, o) "
        "y = DequantizeLinear(i, k, o)", "no float to add a branch to"),
    "QMoE": (
        "r = Identity(x) y = com.microsoft.QMoE(x, r, w, k, , w, k)", "leaves no place"),
    "codes without a scale": ("f = Cast<to = 1>(w) y = MatMul(x, f)", "its scale is not applied"),
}  # fmt: skip


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_that_leave_no_place_for_a_branch(case: str) -> None:
    body, why = INTEGERS[case]
    weights = {
        "w": RNG.integers(-9, 9, (8, 6)).astype(np.int8),
        "k": np.float32(0.1).reshape(()),
        "b": np.ones(6, np.float32),
        "o": np.array(9, np.uint8),
        "p": np.array(0, np.int8),
    }
    found = find(OnnxGraph(model(weights, body)))
    assert not found.targets and not found.optional
    assert found.refusals[0].key == "w" and why in found.refusals[0].reason
    assert "insert" in found.refusals[0].verbs and found.reached_share == 0.0


def test_codes_that_no_op_of_the_table_reads_are_unreached() -> None:
    weights = {"w": RNG.integers(-9, 9, (8, 6)).astype(np.int8)}
    body = "i = BitwiseNot(w) f = Cast<to = 1>(i) y = MatMul(x, f)"
    found = find(OnnxGraph(model(weights, body)))
    assert [r.reason for r in found.refusals] == ["the weight is computed by BitwiseNot from w"]
    assert found.reached_share == 0.0
    weights["c"] = RNG.standard_normal((8, 6)).astype(np.float32)
    found = find(OnnxGraph(model(weights, "y = MatMul(x, c) i = Neg(w)")))
    assert [u.key for u in found.unreached] == ["w"]


def test_functions_are_inlined_and_said() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20, "local": 1]>
    m (float[N,8] x, float[8,6] w) => (float[N,6] y) { y = local.Layer(x, w) }
    <opset_import: ["": 20], domain: "local">
    Layer (a, b) => (c) { d = MatMul(a, b) c = Tanh(d) }
    """
    made = ir.from_onnx_text(text)
    value = made.graph.inputs.pop()
    value.const_value = ir.tensor(RNG.standard_normal((8, 6)).astype(np.float32), name="w")
    made.graph.initializers["w"] = value
    graph = OnnxGraph(made)
    assert graph.notes == ["1 model functions were inlined"]
    assert [t.key for t in find(graph).targets] == ["w"]


def test_an_old_opset_is_refused() -> None:
    made = ir.from_onnx_text(
        '<ir_version: 4, opset_import: ["": 9]> m (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    with pytest.raises(LoraFxError, match="opset 9; expected 11 or later") as error:
        OnnxGraph(made)
    assert "version_converter" in error.value.hint


def test_products_of_stored_tensors_and_of_activations_are_no_targets() -> None:
    weights = {
        "w": RNG.standard_normal((8, 6)).astype(np.float32),
        "c": RNG.standard_normal((8, 8)).astype(np.float32),
    }
    body = (
        "p = MatMul(c, w) t = Transpose<perm = [1, 0]>(x) g = MatMul(t, x) h = MatMul(x, g) "
        "y = MatMul(h, p)"
    )
    found = find(OnnxGraph(model(weights, body)))
    assert not found.targets
    assert [r.reason for r in found.refusals] == ["the weight is computed by MatMul from c and w"]
    assert not found.unreached
    assert found.data_flops > 0


def test_a_region_is_folded_in_place_where_the_rest_reads_other_parts() -> None:
    w = RNG.standard_normal((8, 12)).astype(np.float32)
    body = (
        "n = Constant<value = int64[2] {6, 6}>() a, b = Split<axis = 1>(w, n) "
        "u = MatMul(x, a) v = MatMul(x, b) t = Tanh(u) y = Mul(t, v)"
    )
    graph = OnnxGraph(model({"w": w}, body))
    layout = find(graph)["w[:, 6:12]"].layout
    a = RNG.standard_normal((2, 8)).astype(np.float32)
    b = RNG.standard_normal((6, 2)).astype(np.float32)
    fold = Fold({"w[:, 6:12]": LowRank(a, b, 1.0, layout)})
    fold(graph)
    assert [(f.stored_as, f.grew) for f in fold.report] == [("w", 0)]
    want = np.tanh(X @ w[:, :6]) * (X @ (w[:, 6:] + 0.5 * (b @ a).T))
    assert rel(run(graph.model, X), want) < 2e-6
