"""The key test on ONNX: run(fold) = run(insert) = run(W + s·b·a written by hand), every row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.ir.graph import Role
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from tests.onnx.graph.table import ROWS, Row, example, model_of, weights_of

RANK = 2
TOL = 2e-6
ids = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def newest() -> int:
    """The highest opset that the installed runtime loads."""
    for opset in range(onnx.defs.onnx_opset_version(), 17, -1):
        try:
            run(model_of(ROWS[0], opset, weights_of(ROWS[0])), example(ROWS[0]))
        except Exception:
            continue
        return opset
    raise AssertionError("no opset loads")


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def update(row: Row, graph: OnnxGraph, seed: int = 3) -> LowRank:
    """A random update of the row's key; the shapes are the row's own."""
    *batch, out, in_ = row.size
    target = find(graph)[row.key]
    assert (*target.layout.batch_shape, target.layout.out_size, target.layout.in_size) == row.size
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, RANK, in_)).astype(np.float32) / np.float32(in_**0.5)
    b = rng.standard_normal((*batch, out, RANK)).astype(np.float32)
    return LowRank(a, b, 1.25, target.layout)


def by_hand(row: Row, u: LowRank) -> dict[str, np.ndarray[Any, Any]]:
    values = weights_of(row)
    name = row.key.partition("[")[0]
    wide = values[name].astype(np.float64)
    change = u.scale * row.change(u.a.astype(np.float64), u.b.astype(np.float64))
    return {**values, name: (wide + change).astype(np.float32)}


@pytest.mark.parametrize("opset", [13, 18, 20, 23, newest()])
@ids
def test_insert_and_fold_equal_the_sum_by_hand(row: Row, opset: int) -> None:
    check(row, opset, constants=False)


@ids
def test_weights_in_constant_nodes(row: Row) -> None:
    check(row, 18, constants=True)


def check(row: Row, opset: int, *, constants: bool) -> None:
    x = example(row)
    base = run(model_of(row, opset, weights_of(row)), x)
    graph = OnnxGraph(model_of(row, opset, weights_of(row), constants=constants))
    u = update(row, graph)
    want = run(model_of(row, opset, by_hand(row, u)), x)
    assert 0.05 < rel(want, base) < 5, "a test of a no-op proves nothing"
    for step in (Insert({row.key: u}), Fold({row.key: u})):
        graph = OnnxGraph(model_of(row, opset, weights_of(row), constants=constants))
        nodes = sum(1 for _ in graph.model.graph.all_nodes())
        assert step(graph).modified
        graph.lint()
        assert rel(run(graph.model, x), want) < TOL, type(step).__name__
        assert not step(graph).modified, "a second run must change nothing"
        if isinstance(step, Fold):
            assert sum(1 for _ in graph.model.graph.all_nodes()) == nodes


@ids
def test_zero_b_changes_nothing(row: Row) -> None:
    x = example(row)
    model = model_of(row, 18, weights_of(row))
    base, graph = run(model, x), OnnxGraph(model)
    u = update(row, graph)
    Insert({row.key: replace(u, b=np.zeros_like(u.b))})(graph)
    np.testing.assert_array_equal(run(graph.model, x), base)


VARIANTS = {
    "dora": lambda u: replace(u, magnitude=_sizes(u)),
    "frozen ranks": lambda u: replace(u, frozen=1),
    "lora-fa": lambda u: replace(u, variant="lora-fa"),
}


def _sizes(u: LowRank) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).uniform(0.5, 2, u.shape[:-1]).astype(np.float32)


def varied(row: Row, u: LowRank) -> dict[str, np.ndarray[Any, Any]]:
    """The weights with W' in place of W, axis by axis of the stored tensor."""
    values = by_hand(row, u)
    if u.magnitude is None:
        return values
    name, _, region = row.key.partition("[")
    part = eval(f"np.s_[{region[:-1]}]") if region else ...  # our own keys, in a test
    plain = weights_of(row)[name].astype(np.float64)
    change = u.scale * row.change(u.a.astype(np.float64), u.b.astype(np.float64))
    v, layout = (plain + change)[part], u.layout
    assert layout is not None
    own = [*layout.batch, *layout.out]
    split = v.reshape(layout.shape)
    sides = tuple(i for i in range(split.ndim) if i not in own)
    length = np.sqrt((split * split).sum(axis=sides, keepdims=True))
    sizes = u.magnitude.astype(np.float64).reshape([layout.shape[i] for i in own])
    sizes = sizes.transpose(np.argsort(own)).reshape(length.shape)
    plain[part] = (split * sizes / length).reshape(v.shape)
    return {**values, name: plain.astype(np.float32)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("opset", [13, 18])
@ids
def test_variants_equal_the_weight_by_hand(row: Row, opset: int, variant: str) -> None:
    x = example(row)
    base = run(model_of(row, opset, weights_of(row)), x)
    u = VARIANTS[variant](update(row, OnnxGraph(model_of(row, opset, weights_of(row)))))
    want = run(model_of(row, opset, varied(row, u)), x)
    assert rel(want, base) > 0.02, "a test of a no-op proves nothing"
    for step in (Insert({row.key: u}, role=Role.TRAIN), Fold({row.key: u})):
        graph = OnnxGraph(model_of(row, opset, weights_of(row)))
        assert step(graph).modified
        graph.lint()
        assert rel(run(graph.model, x), want) < 5e-6, type(step).__name__
        assert not step(graph).modified


@ids
def test_found(row: Row) -> None:
    found = find(OnnxGraph(model_of(row, 18, weights_of(row))))
    if row.include:
        assert [t.key for t in found.optional] == [row.key]
        assert found.refusals
        return
    assert sorted(t.key for t in found.targets) == sorted((row.key, *row.others))
    target = found[row.key]
    assert target.op == row.op
    assert len(target.sites) == row.sites
    assert not found.refusals
    assert target.flops > 0 or row.op == "embedding"


MUTATIONS = {
    "scale": lambda u: replace(u, alpha=u.alpha * 1.01),
    "order of in": lambda u: replace(u, a=u.a[..., ::-1].copy()),
    "order of out": lambda u: replace(u, b=u.b[..., ::-1, :].copy()),
}


@pytest.mark.parametrize("broken", MUTATIONS)
@ids
def test_a_broken_fold_is_seen(row: Row, broken: str) -> None:
    x = example(row)
    graph = OnnxGraph(model_of(row, 18, weights_of(row)))
    u = update(row, graph)
    want = run(model_of(row, 18, by_hand(row, u)), x)
    for make in (Insert, Fold):
        graph = OnnxGraph(model_of(row, 18, weights_of(row)))
        make({row.key: MUTATIONS[broken](u)})(graph)
        assert rel(run(graph.model, x), want) > 50 * TOL


def test_overridable_inputs_have_the_adapter_as_their_default() -> None:
    row = ROWS[0]
    graph = OnnxGraph(model_of(row, 18, weights_of(row)))
    u = update(row, graph)
    Insert({row.key: u}, role=Role.OPTIONAL_INPUT)(graph)
    assert graph.model.graph.inputs[0].name == "x"
    assert len(graph.model.graph.inputs) == 3
    want = run(model_of(row, 18, by_hand(row, u)), example(row))
    assert rel(run(graph.model, example(row)), want) < TOL
