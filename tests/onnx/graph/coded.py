"""One tiny ONNX model per way in which a quantised weight reaches its op, with what it stands for.

Codes are decoded here, in fp64 and from the operators' documents, so that it shares nothing with
what it judges. Shapes are rectangular, and blocks do not always divide them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
K, N = 40, 24
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
"""Low three bits by place, the high one is the sign; ONNX Runtime's table of quant_type 0."""


@dataclass(frozen=True)
class Coded:
    """A model y = f(x) with a quantised weight.

    Attributes:
        name: Of the row.
        body: Its nodes, as ONNX text.
        made: A function from a seed to its tensors and to W̃ as its op reads it: [out, in], a
            kernel, or rows of a table.
        format: What find calls it.
        bits: Of a code.
        kind: linear, conv or embedding.
        x: Type and shape of the input.
        feed: Its sizes.
        own: The activations are codes too: the file's own output stands for the product.
        reads: What the product reads, of the input.
        then: What follows the product, of its value and the tensors.
    """

    name: str
    body: str
    made: Callable[[np.random.Generator], tuple[Tensors, Array]]
    format: str
    bits: int
    kind: str = "linear"
    x: str = f"float[N,5,{K}]"
    feed: tuple[int, ...] = (3, 5, K)
    own: bool = False
    reads: Callable[[Array], Array] = lambda x: x
    then: Callable[[Array, Tensors], Array] = lambda y, t: y
    attributes: dict[str, Any] = field(default_factory=dict)


def _pack(codes: Array, bits: int) -> Array:
    """Codes of the last axis in bytes, the first one in the lowest bits."""
    each = 8 // bits
    pad = -codes.shape[-1] % each
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], pad), codes.dtype)], -1)
    parts = codes.reshape(*codes.shape[:-1], -1, each).astype(np.uint32)
    return (parts << (np.arange(each) * bits).astype(np.uint32)).sum(-1).astype(np.uint8)


def nbits(bits: int, block: int, zero: str) -> Callable[[Any], tuple[Tensors, Array]]:
    def made(rng: np.random.Generator) -> tuple[Tensors, Array]:
        each = -(-K // block)
        codes = rng.integers(0, 2**bits, (N, each, block))
        scales = (rng.random((N, each)) + 0.5) / 2**bits
        zeros: Array = np.full((N, each), 2.0 ** (bits - 1))
        tensors = {"w": _pack(codes, bits), "s": scales.astype(np.float32)}
        if zero == "packed":
            zeros = rng.integers(0, 2**bits, (N, each))
            tensors["z"] = _pack(zeros, bits).reshape(-1)
        elif zero == "float":
            zeros = zeros + rng.random((N, each)).astype(np.float32)
            tensors["z"] = zeros.astype(np.float32)
        wide = (codes - tensors.get("z", zeros).reshape(zeros.shape)[..., None]
                if zero == "float" else codes - zeros[..., None])  # fmt: skip
        w = wide * tensors["s"].astype(np.float64)[..., None]
        return tensors, w.reshape(N, -1)[:, :K]

    return made


def bnb4(levels: Array, block: int) -> Callable[[Any], tuple[Tensors, Array]]:
    def made(rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes = rng.integers(0, 16, N * K)
        absmax = (rng.random(-(-N * K // block)) + 0.5).astype(np.float32)
        w = levels[codes] * np.repeat(absmax.astype(np.float64), block)[: N * K]
        high = codes.reshape(-1, 2).astype(np.uint8)
        return {"w": high[:, 0] << 4 | high[:, 1], "s": absmax}, w.reshape(N, K)

    return made


def linear(
    shape: tuple[int, ...],
    dtype: Any = np.int8,
    *,
    axis: int | None = None,
    block: int = 0,
    zero: bool = True,
    turn: bool = True,
) -> Callable[[Any], tuple[Tensors, Array]]:
    """Codes of a shape with one scale, one an index of an axis, or one a block of it."""

    def made(rng: np.random.Generator) -> tuple[Tensors, Array]:
        info = ml_dtypes.iinfo(dtype)
        codes = rng.integers(int(info.min), int(info.max) + 1, shape)
        each = () if axis is None else (shape[axis],)
        if block and axis is not None:
            each = tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape))
        fan = float(np.prod(shape[1:])) if len(shape) > 2 else float(shape[0])
        scale = ((rng.random(each) + 0.5) / (int(info.max) * fan**0.5)).astype(np.float32)
        point = rng.integers(0, 3, each) if zero else np.zeros(each, np.int64)
        tensors = {"w": codes.astype(dtype), "s": np.asarray(scale)}
        if zero:
            tensors["z"] = np.asarray(point).astype(dtype)
        wide_s, wide_z = np.asarray(scale, np.float64), np.asarray(point)
        if block and axis is not None:
            wide_s, wide_z = (
                np.repeat(v, block, axis).take(range(shape[axis]), axis) for v in (wide_s, wide_z)
            )
        elif axis is not None:
            along = [1] * len(shape)
            along[axis] = -1
            wide_s, wide_z = wide_s.reshape(along), wide_z.reshape(along)
        w = (codes - wide_z) * wide_s
        return tensors, w.T if turn and len(shape) == 2 else w

    return made


def packed_rows(rng: np.random.Generator) -> tuple[Tensors, Array]:
    """A table whose codes of four bits lie two in a byte, with blocks of 16; zero is 8."""
    codes = rng.integers(0, 16, (11, 32))
    scales = ((rng.random((11, 2)) + 0.5) / 16).astype(np.float32)
    w = (codes - 8) * np.repeat(scales.astype(np.float64), 16, 1)
    return {"w": _pack(codes, 4), "s": scales}, w


def with_bias(made: Callable[[Any], tuple[Tensors, Array]]) -> Callable[[Any], Any]:
    def more(rng: np.random.Generator) -> tuple[Tensors, Array]:
        tensors, w = made(rng)
        return {**tensors, "b": rng.standard_normal(w.shape[0]).astype(np.float32)}, w

    return more


def of_codes(scale: float, zero: int) -> Callable[[Array], Array]:
    """What QuantizeLinear and DequantizeLinear leave of x."""

    def through(x: Array) -> Array:
        step = np.float32(scale)
        return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * np.float64(step)

    return through


def _nbits(bits: int, block: int, zero: str) -> Coded:
    slots = "x, w, s" + ", z" * (zero != "none")
    given = f"K = {K}, N = {N}, bits = {bits}, block_size = {block}"
    body = f"y = com.microsoft.MatMulNBits<{given}>({slots})"
    name = f"MatMulNBits {bits} bits, {block}, zero {zero}"
    return Coded(name, body, nbits(bits, block, zero), "MatMulNBits", bits)


def with_bias_of_codes(
    made: Callable[[np.random.Generator], tuple[Tensors, Array]], *shape: int
) -> Callable[[np.random.Generator], tuple[Tensors, Array]]:
    """With a bias b in the units of the integers that a product of codes is."""

    def both(rng: np.random.Generator) -> tuple[Tensors, Array]:
        tensors, w = made(rng)
        return {**tensors, "b": rng.integers(-9000, 9000, shape).astype(np.int32)}, w

    return both


DQL, NODQL = "q, a, o = DynamicQuantizeLinear(x) ", "MatMulInteger(q, w, o, z) f = Cast<to = 1>(i) "
IMAGE, KERNEL = "float[N,4,9,7]", (6, 4, 3, 2)
TABLE = {"kind": "embedding", "x": "int64[N,5]", "feed": (3, 5)}
CONV = {"kind": "conv", "x": IMAGE, "feed": (2, 4, 9, 7)}
int4, uint4 = ml_dtypes.int4, ml_dtypes.uint4
# fmt: off
CODED = [
    *(_nbits(b, k, z) for b in (2, 4, 8) for k in (16, 32, 128) for z in ("none", "packed")),
    _nbits(4, 16, "float"), _nbits(2, 32, "float"),
    Coded("MatMulNBits with a bias", f"y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 4, "
          "block_size = 16>(x, w, s, , , b)", with_bias(nbits(4, 16, "none")), "MatMulNBits", 4,
          then=lambda y, t: y + t["b"]),
    Coded("MatMulBnb4 nf4", f"y = com.microsoft.MatMulBnb4<K = {K}, N = {N}, block_size = 64, "
          "quant_type = 1>(x, w, s)", bnb4(NF4, 64), "MatMulBnb4", 4),
    Coded("MatMulBnb4 fp4", f"y = com.microsoft.MatMulBnb4<K = {K}, N = {N}, block_size = 16, "
          "quant_type = 0>(x, w, s)", bnb4(FP4, 16), "MatMulBnb4", 4),
    Coded("DequantizeLinear of one scale", "d = DequantizeLinear(w, s, z) y = MatMul(x, d)",
          linear((K, N)), "DequantizeLinear", 8),
    Coded("DequantizeLinear by axis", "d = DequantizeLinear<axis = -1>(w, s) y = MatMul(x, d)",
          linear((K, N), axis=1, zero=False), "DequantizeLinear", 8),
    Coded("DequantizeLinear by block of 4 bits",
          "d = DequantizeLinear<axis = 0, block_size = 16>(w, s, z) y = MatMul(x, d)",
          linear((K, N), uint4, axis=0, block=16), "DequantizeLinear", 4),
    Coded("DequantizeLinear by block, turned",
          "d = DequantizeLinear<axis = 1, block_size = 32>(w, s) "
          "t = Transpose<perm = [1, 0]>(d) y = MatMul(x, t)",
          linear((N, K), int4, axis=1, block=32, zero=False, turn=False), "DequantizeLinear", 4),
    Coded("DequantizeLinear, Gemm", "d = DequantizeLinear<axis = 0>(w, s, z) "
          "y = Gemm<alpha = 0.5, transB = 1>(x, d, b)",
          with_bias(linear((N, K), np.uint8, axis=0, turn=False)), "DequantizeLinear", 8,
          x=f"float[N,{K}]", feed=(3, K), then=lambda y, t: 0.5 * y + t["b"]),
    Coded("DequantizeLinear, Conv", "d = DequantizeLinear<axis = 0>(w, s, z) "
          "y = Conv<pads = [1, 1, 0, 1], strides = [2, 1]>(x, d, b)",
          with_bias(linear(KERNEL, axis=0)), "DequantizeLinear", 8, **CONV,
          then=lambda y, t: y + t["b"][:, None, None], attributes={"stride": (2, 1)}),
    Coded("DequantizeLinear, Gather", "d = DequantizeLinear(w, s, z) y = Gather(d, x)",
          linear((11, N), turn=False), "DequantizeLinear", 8, **TABLE),
    Coded("activations are codes for a while", "k = Constant<value = float {0.02}>() "
          "c = Constant<value = uint8 {120}>() q = QuantizeLinear(x, k, c) "
          "r = DequantizeLinear(q, k, c) d = DequantizeLinear(w, s, z) y = MatMul(r, d)",
          linear((K, N)), "DequantizeLinear", 8, own=True, reads=of_codes(0.02, 120)),
    Coded("MatMulInteger, one product of scales", f"{DQL} t = Mul(a, s) i = {NODQL} y = Mul(f, t)",
          linear((K, N)), "MatMulInteger", 8, own=True),
    Coded("MatMulInteger, scales by axis, one by one",
          f"{DQL} i = {NODQL} g = Mul(a, f) y = Mul(g, s)",
          linear((K, N), axis=1), "MatMulInteger", 8, own=True),
    Coded("ConvInteger", f"{DQL} t = Mul(a, s) i = ConvInteger<pads = [1, 1, 0, 1], "
          "strides = [2, 1]>(q, w, o, z) f = Cast<to = 1>(i) y = Mul(f, t)",
          linear(KERNEL, np.uint8), "ConvInteger", 8, **CONV, own=True,
          attributes={"stride": (2, 1)}),
    Coded("MatMulInteger, a bias of codes", f"{DQL} t = Mul(a, s) h = MatMulInteger(q, w, o, z) "
          "i = Add(h, b) f = Cast<to = 1>(i) y = Mul(f, t)",
          with_bias_of_codes(linear((K, N)), N), "MatMulInteger", 8, own=True),
    Coded("ConvInteger, a bias of codes",
          f"{DQL} t = Mul(a, s) h = ConvInteger<pads = [1, 1, 0, 1], "
          "strides = [2, 1]>(q, w, o, z) i = Add(h, b) f = Cast<to = 1>(i) y = Mul(f, t)",
          with_bias_of_codes(linear(KERNEL, np.uint8), 1, 6, 1, 1), "ConvInteger", 8, **CONV,
          own=True, attributes={"stride": (2, 1)}),
    Coded("ConvInteger, a bias in front, scales one by one",
          f"{DQL} h = ConvInteger<pads = [1, 1, 0, 1], strides = [2, 1]>(q, w, o, z) "
          "i = Add(b, h) f = Cast<to = 1>(i) g = Mul(f, s) y = Mul(g, a)",
          with_bias_of_codes(linear(KERNEL, np.uint8), 6, 1, 1), "ConvInteger", 8, **CONV,
          own=True, attributes={"stride": (2, 1)}),
    Coded("ConvInteger, two biases of codes",
          f"{DQL} t = Mul(a, s) h = ConvInteger<pads = [1, 1, 0, "
          "1], strides = [2, 1]>(q, w, o, z) i = Add(h, b) j = Sub(i, b) k = Add(b, j) "
          "f = Cast<to = 1>(k) y = Mul(f, t)",
          with_bias_of_codes(linear(KERNEL, np.uint8), 1, 6, 1, 1), "ConvInteger", 8, **CONV,
          own=True, attributes={"stride": (2, 1)}),
    Coded("DynamicQuantizeMatMul", "y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z)",
          linear((K, N)), "DynamicQuantizeMatMul", 8, own=True),
    Coded("MatMulIntegerToFloat", f"{DQL} y = com.microsoft.MatMulIntegerToFloat(q, w, a, s, o, z)",
          linear((K, N)), "MatMulIntegerToFloat", 8, own=True),
    Coded("GatherBlockQuantized", "y = com.microsoft.GatherBlockQuantized<block_size = 16, "
          "gather_axis = 0, quantize_axis = 1>(w, x, s)",
          linear((11, N), int4, axis=1, block=16, zero=False, turn=False),
          "GatherBlockQuantized", 4, **TABLE),
    Coded("GatherBlockQuantized of bytes", "y = com.microsoft.GatherBlockQuantized<bits = 4, "
          "block_size = 16, gather_axis = 0, quantize_axis = 1>(w, x, s)",
          packed_rows, "GatherBlockQuantized", 4, **TABLE),
    Coded("looked-up codes", "c = Gather(w, x) y = DequantizeLinear(c, s, z)",
          linear((11, N), np.uint8, turn=False), "DequantizeLinear", 8, **TABLE),
    Coded("looked-up codes, cast", "c = Gather(w, x) f = Cast<to = 1>(c) y = Mul(f, s)",
          linear((11, N), zero=False, turn=False), "int8 cast", 8, **TABLE),
    Coded("cast codes, scale on the weight", "f = Cast<to = 1>(w) d = Mul(f, s) y = MatMul(x, d)",
          linear((K, N), axis=1, zero=False), "int8 cast", 8),
    Coded("cast codes, zero point and scale before them",
          "f = Cast<to = 1>(w) e = Cast<to = 1>(z) g = Sub(f, e) d = Mul(s, g) "
          "t = Transpose<perm = [1, 0]>(d) y = MatMul(x, t)",
          linear((N, K), np.uint8, turn=False), "uint8 cast", 8),
    Coded("cast codes, scale on the product", "f = Cast<to = 1>(w) p = MatMul(x, f) y = Mul(p, s)",
          linear((K, N), axis=1, zero=False), "int8 cast", 8),
]
# fmt: on


def model_of(row: Coded, tensors: Tensors) -> ir.Model:
    """The row as a model, opset 21."""
    names = {"float32": "float"}
    given = (
        f"{names.get(v.dtype.name, v.dtype.name)}[{','.join(map(str, v.shape))}] {n}"
        for n, v in tensors.items()
    )
    head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
    inputs = ", ".join([f"{row.x} x", *given])
    model = ir.from_onnx_text(f"{head} m ({inputs}) => (float y) {{ {row.body} }}")
    model.graph.outputs[0].shape = None
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(tensors[str(value.name)], name=value.name)
        model.graph.initializers[str(value.name)] = value
    return model


def sample(row: Coded, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    if row.kind == "embedding":
        return rng.integers(0, 11, row.feed)
    return rng.standard_normal(row.feed).astype(np.float32)


def product(row: Coded, x: Array, w: Array) -> Array:
    """The product in fp64 of what the op reads with a weight that lies as W̃ does."""
    if row.kind == "embedding":
        return w[x]
    if row.kind == "linear":
        return x.astype(np.float64) @ w.T
    n, _, height, width = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 0), (1, 1)))
    out, _, kh, kw = w.shape
    down, right = row.attributes["stride"]
    rows, columns = (height + 1 - kh) // down + 1, (width + 2 - kw) // right + 1
    y = np.zeros((n, out, rows, columns))
    for i in range(rows):
        for j in range(columns):
            part = padded[:, :, i * down : i * down + kh, j * right : j * right + kw]
            y[:, :, i, j] = np.einsum("nchw,ochw->no", part, w)
    return y


def delta(row: Coded, w: Array, a: Array, b: Array, scale: float) -> Array:
    """The change s·b·a of W̃, as W̃ lies."""
    change = scale * b.astype(np.float64) @ a.astype(np.float64)
    return change.T if row.kind == "embedding" else change.reshape(w.shape)


def saved(row: Coded, folder: Path, seed: int = 0) -> tuple[Path, Tensors, Array]:
    """The row as a file, its tensors and W̃."""
    tensors, w = row.made(np.random.default_rng(seed))
    path = folder / "base.onnx"
    ir.save(model_of(row, tensors), path)
    return path, tensors, w
