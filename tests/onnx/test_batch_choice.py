"""Rows of a batch share one product of few adapters, or have their own: by count and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_fx.onnx.batch import IDS, LIMIT, SCALES, add_inputs
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.session import RuntimeSession, open_session

RANK = 3
INPUTS = {
    "int64[batch, length]": (lambda n: (n,), lambda n: n),
    "float[batch, length, 6]": (lambda n: (n, 6), lambda n: n),
    "float[batch, 6]": (lambda n: (6,), lambda n: 1),
}


def made(tmp_path: Path, kind: str, *, scales: bool) -> RuntimeSession:
    """The decision alone, its rows and mask as outputs."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g ({kind} x) => ({kind} y) {{ y = Identity(x) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "x.onnx")
    graph = OnnxGraph(ir.load(tmp_path / "x.onnx"))
    own = add_inputs(graph, "batch", 9, scales=scales)
    for name, value in (("rows", own.rows(RANK)), ("mask", own.mask(RANK, "float32"))):
        value.name = name
        value.type = ir.TensorType(ir.DataType.INT64 if name == "rows" else ir.DataType.FLOAT)
        graph.model.graph.outputs.append(value)
    assert own.rows(RANK).name == "rows", "made twice"
    ir.save(graph.model, tmp_path / "y.onnx")
    return open_session(tmp_path / "y.onnx", "cpu")


def expected(ids: Any, weights: Any, positions: int) -> tuple[Any, Any, bool]:
    """Rows, mask and whether they are shared, by loops."""
    used = sorted(set(ids))
    few = len(used) * (len(used) - 1) * positions <= LIMIT * len(ids)
    groups = [used] if few else [[i] for i in ids]
    rows = [[i * RANK + j for i in group for j in range(RANK)] for group in groups]
    mask = np.zeros((len(ids), 1, len(rows[0])), np.float32)
    for b, i in enumerate(ids):
        owners = groups[0 if few else b]
        at = owners.index(i) * RANK
        mask[b, 0, at : at + RANK] = weights[b]
    return np.array(rows), mask, few


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("scales", [False, True])
def test_rows_and_mask(tmp_path: Path, kind: str, scales: bool) -> None:
    session, rng, seen = made(tmp_path, kind, scales=scales), np.random.default_rng(0), set()
    shape, positions = INPUTS[kind]
    for length in (1, 2, 9):
        for ids in ([4], [4, 4, 4], [2, 0], [7, 0, 7, 7, 3, 0, 7], [1, 2, 3, 4, 5, 6, 7, 8]):
            weights = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)
            weights = weights if scales else np.ones_like(weights)
            x = np.zeros((len(ids), *shape(length)), "int64" if "int" in kind else "float32")
            got = session.run({"x": x, IDS: np.array(ids), **({SCALES: weights} if scales else {})})
            rows, mask, few = expected(ids, weights, positions(length))
            assert np.array_equal(got["rows"], rows), (ids, length)
            assert np.array_equal(got["mask"], mask), (ids, length)
            seen.add(few)
    assert seen == {False, True}
