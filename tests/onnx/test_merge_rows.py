"""merge of .onnx files: every row of the op table, inline and with data files, by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.passes.verbs.merge_onnx import merge_onnx
from tests.onnx.graph.table import ROWS, Row, example, model_of, weights_of
from tests.onnx.graph.test_rows import TOL, by_hand, run, update

FOLDABLE = [r for r in ROWS if not r.include]


def write(row: Row, path: Path, *, external: bool, opset: int = 18) -> LowRank:
    model = model_of(row, opset, weights_of(row))
    u = update(row, OnnxGraph(model_of(row, opset, weights_of(row))))
    if external:
        ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=0)
    else:
        ir.save(model, path)
    return u


def ort_run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def nodes(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    graph = load(path).graph
    return [(n.domain, n.op_type, tuple(str(v and v.name) for v in n.inputs)) for n in graph]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("row", FOLDABLE, ids=lambda r: r.name)
def test_merged_equals_the_sum_by_hand(row: Row, external: bool, tmp_path: Path) -> None:
    base, out, x = tmp_path / "base.onnx", tmp_path / "out.onnx", example(row)
    u = write(row, base, external=external)
    before = tree(tmp_path)
    report = lora_fx.merge(base, Adapter({row.key: u}), out)
    want = run(model_of(row, 18, by_hand(row, u)), x)
    got = ort_run(out, x)
    assert 0.05 < rel(want, ort_run(base, x)) < 5, "a test of a no-op proves nothing"
    assert rel(got, want) < TOL
    assert nodes(out) == nodes(base), "the same nodes over the same names"
    assert {k: v for k, v in tree(tmp_path).items() if k in before} == before, "inputs stay"
    made = {"out.onnx", "out.onnx.data"} if external else {"out.onnx"}
    assert {p.name for p in tmp_path.iterdir()} - set(before) == made
    assert set(report.outputs) == {str(tmp_path / n) for n in made}
    assert report.details["tensors"][0]["gain"] == pytest.approx(1.0, abs=1e-3)


def matmul(tmp_path: Path, *, external: bool = True) -> tuple[Path, LowRank, Row]:
    row = ROWS[0]
    return tmp_path / "b.onnx", write(row, tmp_path / "b.onnx", external=external), row


def test_a_data_file_of_several_dtypes_keeps_untouched_bytes(tmp_path: Path) -> None:
    import ml_dtypes

    text = "<ir_version: 10, opset_import: ['' : 18]> g (bfloat16[N,8] x) => (bfloat16[N,7] y)"
    text = text.replace("'", '"') + " { h = MatMul(x, w1)\n y = MatMul(h, w2) }"
    rng = np.random.default_rng(1)
    values = {"w1": (8, 600), "w2": (600, 7)}
    arrays = {n: (rng.standard_normal(s) / 8).astype(ml_dtypes.bfloat16) for n, s in values.items()}
    model = ir.from_onnx_text(text)
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        old = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.BFLOAT16)
        for node, i in list(old.uses()):
            node.replace_input_with(i, value)
        model.graph.initializers[name] = value
    base, out = tmp_path / "b.onnx", tmp_path / "o.onnx"
    ir.save(model, base, external_data="b.data", size_threshold_bytes=0)
    a = rng.standard_normal((3, 8)).astype("f4")
    b = rng.standard_normal((600, 3)).astype("f4") / 8
    report = merge_onnx(base, [(Adapter({"w1": LowRank(a, b, 6.0)}), 0.5)], out)
    new = load(out).graph.initializers
    got = {n: new[n].const_value.numpy() for n in arrays}
    assert got["w2"].tobytes() == arrays["w2"].tobytes()
    wide = arrays["w1"].astype("f8") + 0.5 * 2.0 * (b.astype("f8") @ a.astype("f8")).T
    half = np.abs(wide) * 2.0**-8 + 1e-7
    assert (np.abs(got["w1"].astype("f8") - wide) <= half).all()
    assert not (got["w1"] == arrays["w1"]).all()
    assert report.details["tensors"][0]["key"] == "w1"
    assert any("loads neither" in w for w in report.warnings)


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_the_same_adapter_again_is_refused(tmp_path: Path, external: bool) -> None:
    base, u, row = matmul(tmp_path, external=external)
    adapter, one, two = Adapter({row.key: u}), tmp_path / "1.onnx", tmp_path / "2.onnx"
    merge_onnx(base, adapter, one)
    with pytest.raises(LoraFxError, match="already merged into it"):
        merge_onnx(one, adapter, two)
    assert not two.exists()
    merge_onnx(one, adapter, two, again=True)
    history = json.loads(load(two).metadata_props["lora_fx.merge"])
    assert [m["adapters"][0]["weight"] for m in history] == [1.0, 1.0]


def test_several_adapters_are_summed(tmp_path: Path) -> None:
    base, u, row = matmul(tmp_path)
    v = update(row, OnnxGraph(model_of(row, 18, weights_of(row))), seed=9)
    out = tmp_path / "o.onnx"
    merge_onnx(base, [(Adapter({"w": u}), 0.5), Adapter({"w": v})], out)
    w = load(out).graph.initializers["w"].const_value.numpy()
    want = weights_of(row)["w"].astype("f8")
    for x, weight in ((u, 0.5), (v, 1.0)):
        want = want + weight * x.scale * (x.b.astype("f8") @ x.a.astype("f8")).T
    assert np.abs(w - want).max() < 1e-6


def refused(tmp_path: Path, text: str, error: type[LoraFxError] = LoraFxError, **kw: Any) -> None:
    before = tree(tmp_path)
    with pytest.raises(error, match=text):
        merge_onnx(**kw)
    assert tree(tmp_path) == before, "nothing is written"
    assert {p.name for p in tmp_path.iterdir()} == set(before)


def test_what_is_refused(tmp_path: Path) -> None:
    base, u, _ = matmul(tmp_path)
    good, out = Adapter({"w": u}), tmp_path / "o.onnx"
    refused(tmp_path, "exists", base=base, adapters=good, out=base)
    refused(tmp_path, "replace the input", base=base, adapters=good, out=base, force=True)
    zero = Adapter({"w": LowRank(u.a, np.zeros_like(u.b), 1.0)})
    refused(tmp_path, "no element", NoEffectError, base=base, adapters=zero, out=out)
    refused(
        tmp_path,
        "nope",
        base=base,
        adapters=Adapter({"nope": LowRank(u.a[:, :3], u.b, 1.0)}),
        out=out,
    )
    nan = Adapter({"w": LowRank(u.a, u.b * np.float32("nan"), 1.0)})
    refused(tmp_path, "off by nan", base=base, adapters=nan, out=out)


def test_replacing_keeps_the_data_that_the_old_file_reads(tmp_path: Path) -> None:
    base, u, row = matmul(tmp_path)
    out, adapter = tmp_path / "o.onnx", Adapter({row.key: u})
    merge_onnx(base, adapter, out)
    first = ort_run(out, example(row))
    report = merge_onnx(base, [(adapter, 0.5)], out, force=True)
    assert report.outputs[1] == str(tmp_path / "o.onnx.1.data")
    assert rel(ort_run(out, example(row)), first) > 0.01


def test_a_base_s_data_is_never_taken_for_the_output_s(tmp_path: Path) -> None:
    """A base that was renamed still reads NAME.data, which is where the output's data would go."""
    base, u, row = matmul(tmp_path)
    base.rename(tmp_path / "old.onnx")
    before = tree(tmp_path)
    merge_onnx(tmp_path / "old.onnx", Adapter({row.key: u}), base, force=True)
    assert {k: v for k, v in tree(tmp_path).items() if k in before} == before
    assert rel(ort_run(base, example(row)), ort_run(tmp_path / "old.onnx", example(row))) > 0.05


def test_a_failed_last_step_leaves_no_data(tmp_path: Path, monkeypatch: Any) -> None:
    base, u, _ = matmul(tmp_path)
    real, calls = os.replace, []

    def fails(a: Any, b: Any) -> None:
        calls.append(str(b))
        if str(b).endswith("o.onnx"):
            raise OSError(28, "no space")
        real(a, b)

    monkeypatch.setattr("os.replace", fails)
    refused(tmp_path, "disk full", base=base, adapters=Adapter({"w": u}), out=tmp_path / "o.onnx")
    assert any(c.endswith("o.onnx.data") for c in calls), "the data had its name"
