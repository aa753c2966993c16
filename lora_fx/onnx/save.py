"""Writing ONNX files: one file, or external data beside it when the weights are large."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

EXTERNAL_OVER = 256 << 20
"""Bytes of weights above which they go to `NAME.onnx.data` (protobuf itself ends at 2 GiB)."""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def is_external(path: Path) -> bool:
    """True when a file keeps tensors in another file."""
    values = ir.load(path).graph.initializers.values()
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in values)


def save(
    model: ir.Model, path: Path, *, external_over: int = EXTERNAL_OVER, data: str = ""
) -> list[Path]:
    """Write a model; returns the files that were made.

    A data file is called `data`, or `NAME.data` where that is empty.

    Tensors are written one after the other, so that those that are computed on demand are in
    memory one at a time.
    """
    if weight_bytes(model) <= external_over:
        ir.save(model, path)
        return [path]
    data = data or path.name + ".data"
    ir.save(model, path, external_data=data, max_workers=1, max_in_flight_bytes=1 << 26)
    return [path, path.with_name(data)]
