"""A weight as a format holds it, and what it stands for: how each format's reader is called."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.files.quantised.awq import awq
from lora_fx.files.quantised.bitsandbytes import four_bits, int8
from lora_fx.files.quantised.compressed_tensors import compressed
from lora_fx.files.quantised.fp4 import mxfp4, mxfp4_stack, nvfp4
from lora_fx.files.quantised.fp8 import fp8, fp8_blocks
from lora_fx.files.quantised.gptq import gptq
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.fx.capture.torchao import affine, nf4
from lora_fx.ir.quantised import Quantised
from tests.files.quantised import operators


def parts_of(module: str, arrays: Mapping[str, Array]) -> Parts:
    """Arrays by their last names as the parts of a module."""
    return Parts(module, {f"{module}.{name}": array for name, array in arrays.items()})


GOLDEN = Path(__file__).parent / "golden.json"
Arrays = Mapping[str, Array]
Options = Mapping[str, Any]
Read = Callable[[Arrays, Options], Quantised]

WEIGHTS: dict[str, Callable[[Parts, Options], QuantisedWeight]] = {
    "bitsandbytes four bits": lambda p, o: four_bits(p),
    "bitsandbytes int8": lambda p, o: int8(p),
    "gptq": lambda p, o: gptq(p, **o),
    "awq": lambda p, o: awq(p),
    "compressed-tensors": lambda p, o: compressed(p),
    "nvfp4": lambda p, o: nvfp4(p),
    "mxfp4": lambda p, o: mxfp4(p),
    "mxfp4 stack": lambda p, o: mxfp4_stack(p, "w"),
    "fp8": lambda p, o: fp8(p),
    "fp8 blocks": fp8_blocks,
}
"""Formats of checkpoints."""
READERS: dict[str, Read] = {
    "torchao": lambda a, o: affine("m.weight", a["qdata"], a["scale"], a.get("zero"), **o),
    "torchao nf4": lambda a, o: nf4("m.weight", tuple(o["shape"]), **a),
    "DequantizeLinear": lambda a, o: operators.dequantize_linear(
        "m.weight", a["x"], a["scale"], a.get("zero"), **o
    ),
    "MatMulNBits": lambda a, o: operators.matmul_nbits(
        "m.weight", a["b"], a["scale"], a.get("zero"), tuple(o["shape"]), o["bits"]
    ),
    "MatMulBnb4": lambda a, o: operators.matmul_bnb4(
        "m.weight", a["b"], a["absmax"], tuple(o["shape"]), o["quant_type"], o["block"]
    ),
    "GatherBlockQuantized": lambda a, o: operators.gather_block_quantized(
        "m.weight", a["x"], a["scale"], a.get("zero"), **o
    ),
}


def _reader(name: str) -> Read:
    return lambda a, o: WEIGHTS[name](parts_of("m", a), o).read()


READERS |= {name: _reader(name) for name in WEIGHTS}


class Row(NamedTuple):
    """Arrays, what the reader is told beside them, and the package's weight in its own dtype."""

    name: str
    reader: str
    arrays: Arrays
    options: Options
    want: Mark


class Mark(NamedTuple):
    """An array by its bits, but for the sign of zeros: kernels of bitsandbytes differ in it."""

    dtype: str
    shape: tuple[int, ...]
    hash: str
    first: tuple[float, ...]


def mark(array: Array) -> Mark:
    data = np.ascontiguousarray(array + 0)
    first = tuple(float(x) for x in data.reshape(-1)[:3])
    digest = hashlib.sha256(data.tobytes()).hexdigest()[:32]
    return Mark(str(array.dtype), array.shape, digest, first)


def read(row: Row) -> Quantised:
    return READERS[row.reader](row.arrays, row.options)


def dump(rows: Iterable[Row]) -> None:
    """Write the rows as text, one a line."""
    lines = [
        json.dumps(
            {
                "name": r.name,
                "reader": r.reader,
                "arrays": {n: _text(a) for n, a in r.arrays.items()},
                "options": r.options,
                "want": r.want,
            }
        )
        for r in rows
    ]
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def golden() -> list[Row]:
    def row(r: dict[str, Any]) -> Row:
        arrays = {n: _array(a) for n, a in r["arrays"].items()}
        dtype, shape, digest, first = r["want"]
        want = Mark(dtype, tuple(shape), digest, tuple(first))
        return Row(r["name"], r["reader"], arrays, r["options"], want)

    return [row(r) for r in json.loads(GOLDEN.read_text())]


def _text(a: Array) -> list[Any]:
    return [str(a.dtype), list(a.shape), base64.b64encode(a.tobytes()).decode()]


def _array(text: list[Any]) -> Array:
    dtype, shape, data = text
    return np.frombuffer(base64.b64decode(data), numpy_dtype(dtype)).reshape(shape)
