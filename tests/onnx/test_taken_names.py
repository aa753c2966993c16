"""Rewrites give new values names that no value of the model has.

In each case the model has values of the names that the rewrite would choose: it computes the same
as before, and every name is that of one value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.shape_inference import infer_shapes
from lora_fx.onnx.graph.values import values_of
from lora_fx.onnx.masked_scores import mask_by_infinity
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.split_skip_norm import SplitSkipNorm
from lora_fx.onnx.rewrites.to_half import ToHalf
from lora_fx.onnx.tensor_copies import join_copies


@dataclass(frozen=True)
class Case:
    """A model as text, what rewrites it, and the operators that show that it did.

    Attributes:
        text: The graph; initialisers that it names without a value are drawn.
        rewrite: Edits a model.
        operators: They are in the rewritten model.
        taken: The names that the rewrite would give.
        weights: Names of initialisers → their sizes, beside those in the text.
        tol: The largest difference, in relation to the largest output.
    """

    text: str
    rewrite: Callable[[ir.Model], object]
    operators: tuple[str, ...]
    taken: tuple[str, ...]
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tol: float = 1e-6


def joins(model: ir.Model) -> None:
    """As an export does for a copy that it stored transposed."""
    copy = model.graph.initializers["w_copy"]
    copy.name = "w@op:MatMul"
    join_copies(model, ["w@op:MatMul"])


CASES = {
    "gemm to matmul": Case(
        """g (float[b, s, 4] x) => (float[b, s, 3] y, float[b, s, 4] z)
        <int64[2] flat = {-1, 4}, int64[3] back = {2, 5, 3},
         float[4] p_MatMul, float[4] p_Add, float[4] p_Transpose> {
            rows = Reshape(x, flat)
            p = Gemm<transB = 1>(rows, w, bias)
            r = Reshape(p, back)
            y = Tanh(r)
            p_MatMul = Neg(c)
            p_Add = Neg(p_MatMul)
            p_Transpose = Abs(p_Add)
            z1 = Add(x, p_Add)
            z2 = Add(z1, p_Transpose)
            z = Add(z2, p_MatMul)
        }""",
        GemmToMatMul(), ("MatMul",), ("p_MatMul", "p_Add", "p_Transpose"),
        {"w": (3, 4), "bias": (3,), "c": (4,)},
    ),
    "gemm of heads": Case(
        """g (float[b, s, 2, 2] x) => (float[b, s, 3] y, float[b, s, 2, 2] z)
        <int64[2] flat = {-1, 4}, int64[3] back = {2, 5, 3}, float[2] p_Reshape> {
            rows = Reshape(x, flat)
            p = Gemm(rows, w)
            r = Reshape(p, back)
            y = Tanh(r)
            p_Reshape = Neg(p_rows)
            z = Add(x, p_Reshape)
        }""",
        GemmToMatMul(), ("MatMul",), ("p_rows", "p_Reshape"), {"w": (4, 3), "p_rows": (2,)},
    ),
    "to half": Case(
        """g (float[b, s, 4] x) => (float[b, s, 3] y, float[b, s, 4] z) <float[b, s, 4] x_half> {
            y = MatMul(x, w)
            x_half = Mul(x, w_half)
            z = Add(x_half, y_half)
        }""",
        ToHalf(), ("Cast",), ("x_half", "w_half", "y_half"),
        {"w": (4, 3), "w_half": (4,), "y_half": (4,)}, 5e-3,
    ),
    "masked scores": Case(
        """g (float[b, s, 4] x) => (float[b, s, 4] y, float[b, s, 4] z)
        <float[1] low = {-1e38}, float[1] zero = {0.0}, float[1] nil = {0.0},
         float[b, s, 4] mask, float[b, s, 4] scores, float[b, s, 4] weights> {
            positive = Greater(x, nil)
            mask = Where(positive, zero, low)
            scores = Add(x, mask)
            weights = Softmax<axis = -1>(scores)
            lost = IsNaN(weights)
            y = Where(lost, zero, weights)
            z = Add(x, mask_left_out)
        }""",
        mask_by_infinity, ("IsNaN",), ("mask_left_out",), {"mask_left_out": (4,)},
    ),
    "sum and norm": Case(
        """g (float[b, s, 4] x) => (float[b, s, 4] y, float[b, s, 4] z) <float[b, s, 4] n_sum> {
            n = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(x, x, gamma)
            n_sum = Neg(x)
            y = Tanh(n)
            z = Tanh(n_sum)
        }""",
        SplitSkipNorm(), ("Sum",), ("n_sum",), {"gamma": (4,)},
    ),
    "a bias behind its branch": Case(
        """g (float[b, s, 4] x) => (float[b, s, 3] y, float[b, s, 4] z)
        <float[b, s, 3] p, float[b, s, 3] biased, float[b, s, 4] p_delta> {
            p = MatMul(x, w)
            biased = Add(p, bias)
            low = MatMul(x, a)
            high = MatMul(low, b_factor)
            y = Add(biased, high)
            p_delta = Neg(x)
            z = Tanh(p_delta)
        }""",
        DeltaBeforeBias(), ("Add",), ("p_delta",),
        {"w": (4, 3), "bias": (3,), "a": (4, 2), "b_factor": (2, 3)},
    ),
    "a transposed copy": Case(
        """g (float[b, s, 4] x) => (float[b, s, 3] y, float[b, s, 4] z) <float[b, s, 4] w_turned> {
            y = MatMul(x, w)
            t = Transpose<perm = [1, 0]>(w_copy)
            t2 = Transpose<perm = [1, 0]>(t)
            w_turned = MatMul(y, t2)
            z = Tanh(w_turned)
        }""",
        joins, ("Transpose",), ("w_turned",), {"w": (4, 3), "w_copy": (3, 4)},
    ),
}  # fmt: skip


def model_of(case: Case) -> ir.Model:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n' + case.text,
        initializers=[ir.tensor(array, name=name) for name, array in weights_of(case).items()],
    )
    infer_shapes(model)
    for value in values_of(model):
        if value.dtype is None and value.const_value is not None:
            value.dtype = value.const_value.dtype
    return model


def weights_of(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(sizes).astype(np.float32) for name, sizes in case.weights.items()
    }
    if "w_copy" in weights:
        weights["w_copy"] = np.ascontiguousarray(weights["w"].T)
    return weights


def outputs(model: ir.Model) -> Any:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=False)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(proto.SerializeToString(), options, providers)
    width = session.get_inputs()[0].shape[2:]
    x = np.random.default_rng(1).standard_normal((2, 5, *width)).astype(np.float32)
    x[..., 0] = 1  # no row of a mask leaves everything out
    return session.run(None, {"x": x})


@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_takes_no_name_of_the_model(name: str) -> None:
    case = CASES[name]
    model = model_of(case)
    before = [str(value.name) for value in values_of(model)]
    assert set(case.taken) <= set(before)
    expected = outputs(model)

    case.rewrite(model)
    assert {*case.operators} <= {node.op_type for node in model.graph.all_nodes()}
    names = [str(value.name) for value in values_of(model)]
    assert len(set(names)) == len(names)
    assert set(names) - set(before), "nothing was rewritten"
    for y, wanted in zip(outputs(model), expected, strict=True):
        assert rel(y, wanted) <= case.tol


def test_a_graph_s_fresh_names_are_those_of_no_initialiser() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]>'
        " g (float[n] x, float[n] branch_2) => (float[n] y) <float[1] branch_1 = {1.0}>"
        " { s = Add(x, branch_1) y = Add(s, branch_2) }"
    )
    graph = OnnxGraph(model)
    assert graph.fresh("branch") == "branch_3"
