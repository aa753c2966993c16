"""Rows of a batch share one product of few adapters, or have their own: by count and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.batch_inputs import add_inputs
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.row_adapters import LIMIT
from lora_fx.onnx.session import RuntimeSession, open_session

RANK = 3
INPUTS = {
    "int64[batch, length]": (lambda n: (n,), lambda n: n),
    "float[batch, length, 6]": (lambda n: (n, 6), lambda n: n),
    "float[batch, 6]": (lambda n: (6,), lambda n: 1),
}


def made(tmp_path: Path, kind: str) -> RuntimeSession:
    """The decision alone, its rows and mask as outputs."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g ({kind} x) => ({kind} y) {{ y = Identity(x) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "x.onnx")
    graph = OnnxGraph(ir.load(tmp_path / "x.onnx"))
    shared = add_inputs(graph, "batch", 9, scales=False).shared
    assert shared
    values = {
        "rows": shared.rows(RANK), "mask": shared.mask(RANK),
        "rows of 2": shared.rows(RANK, 2), "mask of 2": shared.mask(RANK, 2),
    }  # fmt: skip
    for name, value in values.items():
        value.name = name
        value.type = ir.TensorType(ir.DataType.INT64 if "rows" in name else ir.DataType.BOOL)
        graph.model.graph.outputs.append(value)
    assert shared.rows(RANK).name == "rows", "made twice"
    ir.save(graph.model, tmp_path / "y.onnx")
    return open_session(tmp_path / "y.onnx", "cpu")


def expected(ids: Any, positions: int) -> tuple[Any, Any, bool]:
    """Rows, mask and whether they are shared, by loops."""
    used = sorted(set(ids))
    few = len(used) * (len(used) - 1) * positions < LIMIT * len(ids)
    groups = [used] if few else [[i] for i in ids]
    rows = [[i * RANK + j for i in group for j in range(RANK)] for group in groups]
    if not few:  # true for all rows, which one number says
        return np.array(rows), np.ones((1, 1, 1), bool), few
    mask = np.zeros((len(ids), 1, len(rows[0])), bool)
    for b, i in enumerate(ids):
        at = used.index(i) * RANK
        mask[b, 0, at : at + RANK] = True
    return np.array(rows), mask, few


@pytest.mark.parametrize("kind", INPUTS)
def test_rows_and_mask(tmp_path: Path, kind: str) -> None:
    session, seen = made(tmp_path, kind), set()
    shape, positions = INPUTS[kind]
    for length in (1, 2, 9):
        for ids in ([4], [4, 4, 4], [2, 0], [7, 0, 7, 7, 3, 0, 7], [1, 2, 3, 4, 5, 6, 7, 8]):
            x = np.zeros((len(ids), *shape(length)), "int64" if "int" in kind else "float32")
            got = session.run({"x": x, IDS: np.array(ids)})
            rows, mask, few = expected(ids, positions(length))
            assert np.array_equal(got["rows"], rows), (ids, length)
            assert np.array_equal(got["mask"], mask), (ids, length)
            both = np.concatenate([rows, rows + 9 * RANK], 1)  # the second table follows the first
            assert np.array_equal(got["rows of 2"], both), (ids, length)
            of_two = np.tile(mask, 2) if few else mask
            assert np.array_equal(got["mask of 2"], of_two), (ids, length)
            seen.add(few)
    assert seen == {False, True}
