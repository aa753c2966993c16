"""One tiny ONNX model per row of the op table and per way a weight reaches its op.

Bodies are ONNX text; `change` writes ΔW by hand from a [*batch, rank, in] and
b [*batch, out, rank], so that it shares nothing with what it judges. Shapes are rectangular.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """A graph with input x, output y and weights of these shapes.

    `size` is (out, in) of the low-rank update, after the batch sizes.
    """

    name: str
    op: str
    x: str
    body: str
    weights: dict[str, tuple[int, ...]]
    size: tuple[int, ...]
    change: Callable[[Array, Array], Array]
    feed: tuple[int, ...]
    key: str = "w"
    ids: int = 0
    y: str = "float"
    microsoft: bool = False
    include: str = ""
    sites: int = 1
    others: tuple[str, ...] = ()
    """Keys of further targets, which stay as they are."""


def out_in(a: Array, b: Array) -> Array:
    """ΔW as [out, in]."""
    return np.einsum("or,ri->oi", b, a)


def stacked(a: Array, b: Array) -> Array:
    """ΔW as [batch, out, in]."""
    return np.einsum("eor,eri->eoi", b, a)


def in_out(a: Array, b: Array) -> Array:
    """ΔW as [in, out]."""
    return np.einsum("or,ri->io", b, a)


def kernel(*shape: int) -> Callable[[Array, Array], Array]:
    """ΔW of a convolution: [out, in·kernel] as the stored shape, group by group."""

    def change(a: Array, b: Array) -> Array:
        return np.einsum("...or,...ri->...oi", b, a).reshape(shape)

    return change


def spread(*shape: int) -> Callable[[Array, Array], Array]:
    """ΔW of a transposed convolution: [in, out·kernel] as the stored shape, group by group."""

    def change(a: Array, b: Array) -> Array:
        return np.einsum("...or,...ri->...io", b, a).reshape(shape)

    return change


# fmt: off
ROWS = [
    Row("matmul", "matmul", "float[N,5,8]", "y = MatMul(x, w)", {"w": (8, 6)}, (6, 8), in_out,
        (3, 5, 8)),
    Row("matmul of four axes", "matmul", "float[N,2,5,8]", "y = MatMul(x, w)", {"w": (8, 6)},
        (6, 8), in_out, (3, 2, 5, 8)),
    Row("matmul left", "matmul", "float[N,8,5]", "y = MatMul(w, x)", {"w": (6, 8)}, (6, 8),
        out_in, (3, 8, 5)),
    Row("matmul vector", "matmul", "float[8]", "y = MatMul(w, x)", {"w": (6, 8)}, (6, 8),
        out_in, (8,)),
    Row("matmul stack", "matmul", "float[N,4,5,8]", "y = MatMul(x, w)", {"w": (4, 8, 6)},
        (4, 6, 8), lambda a, b: np.einsum("eor,eri->eio", b, a), (3, 4, 5, 8)),
    Row("transpose", "matmul", "float[N,5,8]",
        "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", {"w": (6, 8)}, (6, 8), out_in,
        (3, 5, 8)),
    Row("transpose of no order", "matmul", "float[N,5,8]", "t = Transpose(w) y = MatMul(x, t)",
        {"w": (6, 8)}, (6, 8), out_in, (3, 5, 8)),
    Row("identity and reshape", "matmul", "float[N,5,8]",
        "s = Constant<value = int64[2] {8, -1}>() i = Identity(w) t = Reshape(i, s) "
        "y = MatMul(x, t)", {"w": (8, 2, 3)}, (6, 8),
        lambda a, b: in_out(a, b).reshape(8, 2, 3), (3, 5, 8)),
    Row("reshape that copies a size", "matmul", "float[N,5,8]",
        "s = Constant<value = int64[2] {0, -1}>() t = Reshape(w, s) y = MatMul(x, t)",
        {"w": (8, 2, 3)}, (6, 8), lambda a, b: in_out(a, b).reshape(8, 2, 3), (3, 5, 8)),
    Row("cast", "matmul", "double[N,5,8]", "t = Cast<to = 11>(w) y = MatMul(x, t)",
        {"w": (8, 6)}, (6, 8), in_out, (3, 5, 8), y="double"),
    Row("slice", "matmul", "float[N,5,8]",
        "lo = Constant<value = int64[1] {2}>() hi = Constant<value = int64[1] {8}>() "
        "ax = Constant<value = int64[1] {1}>() t = Slice(w, lo, hi, ax) y = MatMul(x, t)",
        {"w": (8, 10)}, (6, 8),
        lambda a, b: np.pad(in_out(a, b), ((0, 0), (2, 2))), (3, 5, 8), key="w[:, 2:8]"),
    Row("split", "matmul", "float[N,5,8]",
        "s = Constant<value = int64[2] {4, 6}>() p, q = Split<axis = 1>(w, s) "
        "u = MatMul(x, p) v = MatMul(x, q) y = Concat<axis = -1>(v, u)",
        {"w": (8, 10)}, (6, 8), lambda a, b: np.pad(in_out(a, b), ((0, 0), (4, 0))),
        (3, 5, 8), key="w[:, 4:10]", others=("w[:, 0:4]",)),
    Row("one of a stack", "matmul", "float[N,5,8]",
        "i = Constant<value = int64 {2}>() t = Gather(w, i) y = MatMul(x, t)",
        {"w": (3, 8, 6)}, (6, 8),
        lambda a, b: np.pad(in_out(a, b)[None], ((2, 0), (0, 0), (0, 0))), (3, 5, 8),
        key="w[2]"),
    Row("picked by data", "matmul", "float[N,8,1]",
        "e = Constant<value = int64 {4}>() i = ArgMax<axis = 1, keepdims = 0>(x) k = Mod(i, e) "
        "p = GatherND(w, k) y = MatMul(p, x)", {"w": (4, 6, 8)}, (4, 6, 8), stacked, (5, 8, 1)),
    Row("as many picked as there are", "matmul", "float[4,8,1]",
        "e = Constant<value = int64 {4}>() f = Constant<value = int64[1] {-1}>() "
        "i = ArgMax<axis = 1, keepdims = 0>(x) k = Mod(i, e) l = Reshape(k, f) "
        "p = Gather(w, l) y = MatMul(p, x)", {"w": (4, 6, 8)}, (4, 6, 8), stacked, (4, 8, 1)),
    Row("gemm", "gemm", "float[N,8]", "y = Gemm(x, w, b)", {"w": (8, 6), "b": (6,)}, (6, 8),
        in_out, (3, 8)),
    Row("gemm transB alpha beta", "gemm", "float[N,8]",
        "y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)", {"w": (6, 8), "b": (6,)},
        (6, 8), out_in, (3, 8)),
    Row("gemm transA", "gemm", "float[8,N]", "y = Gemm<transA = 1, transB = 1>(x, w)",
        {"w": (6, 8)}, (6, 8), out_in, (8, 3)),
    Row("gemm left", "gemm", "float[8,N]", "y = Gemm(w, x)", {"w": (6, 8)}, (6, 8), out_in,
        (8, 3)),
    Row("gemm left transA", "gemm", "float[8,N]", "y = Gemm<transA = 1>(w, x)",
        {"w": (8, 6)}, (6, 8), in_out, (8, 3)),
    Row("gemm left transB", "gemm", "float[N,8]", "y = Gemm<transB = 1>(w, x)",
        {"w": (6, 8)}, (6, 8), out_in, (3, 8)),
    Row("conv1d", "conv1d", "float[N,4,9]", "y = Conv<pads = [1, 1]>(x, w, b)",
        {"w": (6, 4, 3), "b": (6,)}, (6, 12), kernel(6, 4, 3), (2, 4, 9)),
    Row("conv2d", "conv2d", "float[N,4,9,7]",
        "y = Conv<kernel_shape = [3, 2], strides = [2, 1], dilations = [1, 2], "
        "pads = [1, 0, 2, 1]>(x, w)", {"w": (6, 4, 3, 2)}, (6, 24), kernel(6, 4, 3, 2),
        (2, 4, 9, 7)),
    Row("conv2d same", "conv2d", "float[N,4,9,7]",
        'y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)', {"w": (6, 4, 3, 2)},
        (6, 24), kernel(6, 4, 3, 2), (2, 4, 9, 7)),
    Row("conv2d groups", "conv2d", "float[N,8,5,7]", "y = Conv<group = 2>(x, w)",
        {"w": (6, 4, 3, 2)}, (2, 3, 24), kernel(6, 4, 3, 2), (2, 8, 5, 7)),
    Row("conv3d", "conv3d", "float[N,2,5,4,6]", "y = Conv(x, w)", {"w": (3, 2, 2, 3, 2)},
        (3, 24), kernel(3, 2, 2, 3, 2), (2, 2, 5, 4, 6)),
    Row("depthwise", "conv2d", "float[N,6,5,7]", "y = Conv<group = 6>(x, w)",
        {"w": (12, 1, 3, 2)}, (6, 2, 6), kernel(12, 1, 3, 2), (2, 6, 5, 7), include="w"),
    Row("conv transpose", "conv_transpose2d", "float[N,4,5,3]",
        "y = ConvTranspose<strides = [2, 1], pads = [1, 0, 0, 1]>(x, w, b)",
        {"w": (4, 6, 3, 2), "b": (6,)}, (36, 4), spread(4, 6, 3, 2), (2, 4, 5, 3)),
    Row("conv transpose groups", "conv_transpose1d", "float[N,4,5]",
        "y = ConvTranspose<group = 2, strides = [2], output_padding = [1]>(x, w)",
        {"w": (4, 3, 3)}, (2, 9, 2), spread(4, 3, 3), (2, 4, 5)),
    Row("embedding", "embedding", "int64[N,5]", "y = Gather(w, x)", {"w": (11, 6)}, (6, 11),
        in_out, (3, 5), ids=11),
    Row("einsum", "einsum", "float[N,5,8]", 'y = Einsum<equation = "bti,oi->bto">(x, w)',
        {"w": (6, 8)}, (6, 8), out_in, (3, 5, 8)),
    Row("einsum heads", "einsum", "float[N,5,8]",
        'y = Einsum<equation = "bti,ihd->bhtd">(x, w)', {"w": (8, 2, 3)}, (6, 8),
        lambda a, b: in_out(a, b).reshape(8, 2, 3), (3, 5, 8)),
    Row("lstm", "lstm", "float[T,N,8]", "y, h, c = LSTM<hidden_size = 3>(x, w, r)",
        {"w": (1, 12, 8), "r": (1, 12, 3)}, (12, 8),
        lambda a, b: out_in(a, b)[None], (5, 2, 8), others=("r",)),
    Row("lstm hidden", "lstm", "float[T,N,8]",
        'y, h, c = LSTM<hidden_size = 3, direction = "bidirectional">(x, w, r)',
        {"w": (2, 12, 8), "r": (2, 12, 3)}, (2, 12, 3),
        lambda a, b: np.einsum("dor,dri->doi", b, a), (5, 2, 8), key="r", others=("w",)),
    Row("gru", "gru", "float[T,N,8]", "y, h = GRU<hidden_size = 3>(x, w, r)",
        {"w": (1, 9, 8), "r": (1, 9, 3)}, (9, 8),
        lambda a, b: out_in(a, b)[None], (5, 2, 8), others=("r",)),
    Row("rnn", "rnn", "float[T,N,8]", "y, h = RNN<hidden_size = 3>(x, w, r)",
        {"w": (1, 3, 8), "r": (1, 3, 3)}, (3, 8),
        lambda a, b: out_in(a, b)[None], (5, 2, 8), others=("r",)),
    Row("used twice, both ways", "matmul", "float[N,5,8]",
        "h = MatMul(x, w) t = Transpose<perm = [1, 0]>(w) y = MatMul(h, t)", {"w": (8, 6)},
        (6, 8), in_out, (3, 5, 8), sites=2),
    Row("if", "matmul", "float[N,5,8]",
        "z = Constant<value = float {0}>() s = ReduceSum<keepdims = 0>(x) c = Less(z, s) "
        "y = If(c)<then_branch = t () => (float[N,5,6] u) { u = MatMul(x, w) }, "
        "else_branch = e () => (float[N,5,6] v) { n = Neg(x) v = MatMul(n, w) }>",
        {"w": (8, 6)}, (6, 8), in_out, (3, 5, 8), sites=2),
    Row("loop", "matmul", "float[N,6]",
        "m = Constant<value = int64 {3}>() k = Constant<value = bool {1}>() "
        "y = Loop(m, k, x)<body = g (int64 i, bool c, float[N,6] s) => (bool d, float[N,6] t) "
        "{ d = Identity(c) h = MatMul(s, w) g = MatMul(h, v) t = Tanh(g) }>",
        {"w": (6, 4), "v": (4, 6)}, (4, 6), in_out, (3, 6), others=("v",)),
    Row("fused matmul", "matmul", "float[N,5,8]",
        "y = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, w)", {"w": (6, 8)},
        (6, 8), out_in, (3, 5, 8), microsoft=True),
    Row("fused conv", "conv2d", "float[N,4,9,7]",
        'y = com.microsoft.FusedConv<activation = "Relu">(x, w)', {"w": (6, 4, 3, 2)},
        (6, 24), kernel(6, 4, 3, 2), (2, 4, 9, 7), microsoft=True),
    Row("fused gemm", "gemm", "float[N,8]",
        'y = com.microsoft.FusedGemm<activation = "Relu", alpha = 0.5, transB = 1>(x, w, b)',
        {"w": (6, 8), "b": (6,)}, (6, 8), out_in, (3, 8), microsoft=True),
    Row("fused gemm as stored", "gemm", "float[N,8]",
        'y = com.microsoft.FusedGemm<activation = "Tanh">(x, w)', {"w": (8, 6)},
        (6, 8), in_out, (3, 8), microsoft=True),
    Row("fused attention", "attention", "float[N,5,8]",
        "y = com.microsoft.Attention<num_heads = 2>(x, w, b)", {"w": (8, 24), "b": (24,)},
        (24, 8), in_out, (3, 5, 8), microsoft=True),
]
# fmt: on


def weights_of(row: Row, seed: int = 0) -> dict[str, Array]:
    """Random weights that keep activations near one."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in row.weights.items():
        fan = max(1, int(np.prod(shape)) // max(shape)) if len(shape) > 1 else 1
        result[name] = (rng.standard_normal(shape) / fan**0.5).astype(np.float32)
    return result


def model_of(
    row: Row, opset: int, values: dict[str, Array], *, constants: bool = False
) -> ir.Model:
    """The row as a model; its weights as initialisers, or as Constant nodes."""
    domains = f'"": {opset}' + (', "com.microsoft": 1' if row.microsoft else "")
    weights = (f"float[{','.join(map(str, s))}] {n}" for n, s in row.weights.items())
    inputs = ", ".join([f"{row.x} x", *weights])
    head = f"<ir_version: 10, opset_import: [{domains}]> m ({inputs}) => ({row.y} y)"
    model = ir.from_onnx_text(f"{head} {{ {row.body} }}")
    for out in model.graph.outputs:
        out.shape = None  # the text form has no output of unknown rank
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        tensor = ir.tensor(values[str(value.name)], name=value.name)
        if constants:
            node = ir.node("Constant", [], {"value": tensor})
            node.outputs[0].name = value.name
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            value.name = f"{value.name}_input"
            value.replace_all_uses_with(node.outputs[0])
            model.graph.insert_before(model.graph[0], node)
        else:
            value.const_value = tensor
            model.graph.initializers[str(value.name)] = value
    return model


def example(row: Row, seed: int = 1) -> Array:
    """An input."""
    rng = np.random.default_rng(seed)
    if row.ids:
        return rng.integers(0, row.ids, row.feed)
    return rng.standard_normal(row.feed).astype(np.float64 if "double" in row.x else np.float32)
