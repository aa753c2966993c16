"""The dtypes in files and graphs: their names, sizes and numpy arrays."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NumpyDtype = np.dtype[Any]
Floating = type[np.floating[Any]]
"""The dtype of computations: float32 or float64."""


class Dtype(NamedTuple):
    """A dtype, with its name in each kind of file.

    Attributes:
        name: numpy's or ml_dtypes', which is also torch's where torch has it.
        bits: Of an element, in a file.
        code: In a safetensors file.
        onnx: In ONNX Runtime's tensor(…); empty where it is the name.
    """

    name: str
    bits: int
    code: str
    onnx: str = ""


DTYPES = {
    d.name: d
    for d in (
        Dtype("bool", 8, "BOOL"),
        Dtype("uint8", 8, "U8"),
        Dtype("int8", 8, "I8"),
        Dtype("uint16", 16, "U16"),
        Dtype("int16", 16, "I16"),
        Dtype("uint32", 32, "U32"),
        Dtype("int32", 32, "I32"),
        Dtype("uint64", 64, "U64"),
        Dtype("int64", 64, "I64"),
        Dtype("float16", 16, "F16"),
        Dtype("bfloat16", 16, "BF16"),
        Dtype("float32", 32, "F32", "float"),
        Dtype("float64", 64, "F64", "double"),
        Dtype("complex64", 64, "C64"),
        Dtype("float8_e4m3fn", 8, "F8_E4M3"),
        Dtype("float8_e5m2", 8, "F8_E5M2"),
        Dtype("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
        Dtype("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
        Dtype("float8_e8m0fnu", 8, "F8_E8M0"),
        Dtype("float4_e2m1fn", 4, "F4"),
        Dtype("float6_e2m3fn", 6, "F6_E2M3"),
        Dtype("float6_e3m2fn", 6, "F6_E3M2"),
    )
}
"""Every dtype that a file may have, by name."""

FLOATING = ("bfloat16", "float16", "float32", "float64")
"""dtypes of weights that an update can be added to."""


def factor_dtype(name: str) -> NumpyDtype:
    """Return the dtype of a and b for a parameter's dtype: complex64 if complex, else float32."""
    return np.dtype(np.complex64 if name.startswith("complex") else np.float32)


def widened(array: Array) -> Array:
    """Return the array in float64, or in complex128 if it is complex."""
    return array.astype(
        np.result_type(array.dtype, np.float64) if array.dtype.kind == "c" else np.float64
    )


_FROM_ONNX = {d.onnx: d.name for d in DTYPES.values() if d.onnx}


def numpy_dtype(name: str) -> NumpyDtype:
    """Return the numpy dtype for a name such as float32 or bfloat16."""
    return np.dtype(getattr(ml_dtypes, name, name))


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def long_name(name: str | None) -> str | None:
    """Return bfloat16 for bf16; return other names, and None, unchanged."""
    return _SHORT.get(name or "", name)


def all_finite(array: Array) -> bool:
    """Whether a contiguous array of floats has no NaN and no infinity.

    Their bits are the largest integers of each sign, so two maxima decide; `np.isfinite` of bf16
    took ten times as long.
    """
    signed = array.view(f"i{array.itemsize}")
    unsigned = array.view(f"u{array.itemsize}")
    positive, negative = _bits_of_infinities(array.dtype)
    return int(signed.max(initial=0)) < positive and int(unsigned.max(initial=0)) < negative


@functools.cache
def _bits_of_infinities(dtype: NumpyDtype) -> tuple[int, int]:
    """Return the bits of inf and of -inf, as unsigned integers."""
    positive, negative = np.array([np.inf, -np.inf]).astype(dtype).view(f"u{dtype.itemsize}")
    return int(positive), int(negative)


@functools.cache
def values_of(dtype: NumpyDtype) -> Array:
    """Return the 256 values of an 8-bit dtype in fp32: a faster lookup than ml_dtypes' cast."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def from_onnx(kind: str) -> str:
    """Return float32 for ONNX Runtime's name tensor(float), and so on."""
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return _FROM_ONNX.get(inner, inner)


def finfo(dtype: str | NumpyDtype) -> np.finfo[Any]:
    """Return numpy.finfo of a floating dtype, also of bfloat16 and float8."""
    wanted = numpy_dtype(dtype) if isinstance(dtype, str) else dtype
    return ml_dtypes.finfo(wanted)  # type: ignore[no-untyped-call]
