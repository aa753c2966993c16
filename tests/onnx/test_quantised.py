"""Branches beside quantised weights of .onnx files: insert, switch and batch against fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.insert_onnx import insert_onnx
from lora_fx.targets.target import Target
from tests.onnx.graph.coded import (
    CODED,
    Array,
    Coded,
    Tensors,
    delta,
    linear,
    nbits,
    of_codes,
    product,
    sample,
    saved,
)
from tests.providers import PROVIDERS

ROWS = pytest.mark.parametrize("row", CODED, ids=lambda r: r.name)
TOL = 2e-6


def target_of(path: Path) -> Target:
    (target,) = find(OnnxGraph(load(path))).targets
    return target


def update(row: Coded, target: Target, seed: int) -> LowRank:
    layout, rng = target.layout, np.random.default_rng(seed)
    wide = 8.0 if row.kind == "embedding" else layout.in_size**0.5
    a = (rng.standard_normal((3, layout.in_size)) / wide).astype(np.float32)
    b = rng.standard_normal((layout.out_size, 3)).astype(np.float32)
    return LowRank(a, b, 1.2, layout)


def expected(
    row: Coded, x: Array, w: Array, tensors: Tensors, base: Array, low: LowRank | None
) -> Array:
    """The output with an update, in fp64; `base` is the file's own."""
    read = row.reads(x) if low is not None or not row.own else x
    change = None if low is None else delta(row, w, low.a, low.b, low.scale)
    if row.own:  # what was there, and the branch on what the product reads
        return base if change is None else base + product(row, read, change)
    return row.then(product(row, read, w if change is None else w + change), tensors)


def seen(y: Array, base: Array) -> bool:
    return 0.05 < rel(y, base) < 5


@ROWS
def test_find_and_insert(row: Coded, tmp_path: Path) -> None:
    path, tensors, w = saved(row, tmp_path)
    graph = OnnxGraph(load(path))
    found = find(graph)
    (target,) = found.targets
    sides = (w.shape[0], w.shape[1]) if row.kind == "embedding" else (w[0].size, w.shape[0])
    assert (target.layout.in_size, target.layout.out_size) == sides
    said = target.to_json()
    assert (said["key"], said["format"], said["bits"]) == ("w", row.format, row.bits)
    assert found.reached_share == 1.0 and not found.unreached and not graph.notes
    assert [r.verbs for r in found.refusals] == [("fold", "merge", "load")]
    x = sample(row)
    base = open_session(path, "cpu").run({"x": x})["y"]
    assert rel(base, expected(row, x, w, tensors, base, None)) < TOL
    low = update(row, target, 1)
    assert Insert({"w": low})(graph).modified and not Insert({"w": low})(graph).modified
    graph.lint()
    ir.save(graph.model, tmp_path / "made.onnx")
    y = open_session(tmp_path / "made.onnx", "cpu").run({"x": x})["y"]
    assert rel(y, expected(row, x, w, tensors, base, low)) < TOL
    assert seen(y, base)


@pytest.mark.parametrize("provider", PROVIDERS)
@ROWS
def test_the_verbs(row: Coded, tmp_path: Path, provider: str) -> None:
    path, tensors, w = saved(row, tmp_path)
    target, x = target_of(path), sample(row, 5)
    base = open_session(path, provider).run({"x": x})["y"]
    lows = {n: update(row, target, i) for i, n in enumerate(("one", "two"), 1)}
    wanted = {n: expected(row, x, w, tensors, base, low) for n, low in lows.items()}
    adapters = {n: Adapter({"w": low}) for n, low in lows.items()}
    assert insert_onnx(path, tmp_path / "i.onnx", rank=2, include="*", provider=provider)
    switch = tmp_path / "s.onnx"
    assert lora_fx.export(path, switch, adapters=adapters, mode="switch", provider=provider)
    session = Session(switch, provider)
    assert rel(session.run({"x": x})["y"], base) < TOL
    for name in adapters:
        session.load(name, tmp_path / f"{name}.onnx_adapter")
        y = session.run({"x": x}, adapter=name)["y"]
        assert rel(y, wanted[name]) < TOL and seen(y, base)
    batch = tmp_path / "b.onnx"
    given = list(adapters.values())
    assert lora_fx.export(path, batch, adapters=given, mode="batch", provider=provider)
    ids = np.array([2, 0, 1][: len(x)], np.int64)
    mixed = open_session(batch, provider).run({"x": x, "adapter_ids": ids})["y"]
    for i, each in enumerate(ids):
        row_wanted = [base, wanted["one"], wanted["two"]][each][i]
        assert rel(mixed[i], row_wanted) < TOL
    assert lora_fx.verify(switch, path, provider=provider)
    assert not lora_fx.verify(switch, path, adapter=adapters["one"], provider=provider)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mode merged": ({"mode": "merged", "adapters": True}, "would round the update away"),
    "mode load": ({"mode": "load", "adapters": True}, "mode load folds"),
    "mode load without one": ({"mode": "load", "include": "*"}, "mode load folds"),
    "dora": ({"variant": "dora"}, "dora reads W itself"),
    "pissa": ({"init": "pissa"}, "pissa reads W itself"),
    "olora": ({"init": "olora"}, "olora reads W itself"),
    "an adapter of DoRA": ({"mode": "switch", "adapters": "dora"}, "magnitude"),
}


@pytest.mark.parametrize("name", ["MatMulNBits 4 bits, 16, zero packed", "ConvInteger",
                                  "DequantizeLinear, Conv", "GatherBlockQuantized"])  # fmt: skip
@pytest.mark.parametrize("case", REFUSED)
def test_what_reads_w_is_refused(case: str, name: str, tmp_path: Path) -> None:
    (row,) = (r for r in CODED if r.name == name)
    path, _, _ = saved(row, tmp_path)
    options, why = REFUSED[case]
    low = update(row, target_of(path), 1)
    options, out = dict(options), tmp_path / "o.onnx"
    if options.get("adapters") == "dora":
        size = np.ones(low.b.shape[0], np.float32)
        options["adapters"] = Adapter(
            {"w": LowRank(low.a, low.b, 1.0, low.layout, "dora", magnitude=size)}
        )
        why = ""
    elif options.get("adapters"):
        options["adapters"] = Adapter({"w": low})
    with pytest.raises(LoraFxError) as caught:
        if "mode" in options:
            lora_fx.export(path, out, provider="cpu", **options)
        else:
            insert_onnx(path, out, include="*", provider="cpu", rank=2, **options)
    assert why in caught.value.message and caught.value.exit_code == 2
    if why:
        assert "--mode switch" in caught.value.hint and "'w'" in caught.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx"]


def test_merged_without_an_adapter_copies(tmp_path: Path) -> None:
    path, tensors, _ = saved(CODED[0], tmp_path)
    report = lora_fx.export(path, tmp_path / "o.onnx", provider="cpu")
    assert report and "a copy" in report.warnings[0]
    written = load(tmp_path / "o.onnx").graph.initializers
    for name, value in tensors.items():
        held = written[name].const_value
        assert held is not None and held.numpy().tobytes() == value.tobytes()


FOUR = "MatMulNBits 4 bits, 16, zero {}"
DAMAGED: dict[str, tuple[str, str, str]] = {
    "codes too short": (FOUR.format("none"), "w", "codes"),
    "scales of another shape": (FOUR.format("none"), "s", "scales"),
    "zero points too short": (FOUR.format("packed"), "z", "zero points"),
    "absmax too short": ("MatMulBnb4 nf4", "s", "scales"),
    "codes of bnb too short": ("MatMulBnb4 nf4", "w", "codes"),
    "scales of another axis": ("DequantizeLinear by axis", "s", "scales"),
    "scales of other blocks": ("DequantizeLinear by block of 4 bits", "s", "scales"),
    "zero points of other blocks": ("DequantizeLinear by block of 4 bits", "z", "zero points"),
    "rows of scales missing": ("GatherBlockQuantized", "s", "scales"),
}
BLOCKS = ["MatMulNBits 4 bits, 16, zero none", "MatMulBnb4 nf4", "GatherBlockQuantized",
          "DequantizeLinear by block of 4 bits"]  # fmt: skip


def refused(path: Path, words: str) -> None:
    """Every command says it in one line and one hint, and writes nothing."""
    out = path.with_name("o.onnx")
    for run in (
        lambda: find(OnnxGraph(load(path))),
        lambda: insert_onnx(path, out, provider="cpu"),
        lambda: lora_fx.export(path, out, mode="switch", provider="cpu"),
        lambda: lora_fx.export(path, out, provider="cpu"),
    ):
        with pytest.raises(LoraFxError) as caught:
            run()
        assert words in caught.value.message and "\n" not in caught.value.message
        assert caught.value.hint and caught.value.exit_code == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["base.onnx"]


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file(case: str, tmp_path: Path) -> None:
    name, tensor, words = DAMAGED[case]
    (row,) = (r for r in CODED if r.name == name)
    path, tensors, _ = saved(row, tmp_path)
    model = load(path)
    cut = np.ascontiguousarray(tensors[tensor][:-1])
    model.graph.initializers[tensor].const_value = ir.tensor(cut, name=tensor)
    model.graph.initializers[tensor].shape = ir.Shape(cut.shape)
    ir.save(model, path)
    refused(path, f"{words} {tensor!r} are")


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_nothing(name: str, tmp_path: Path) -> None:
    (row,) = (r for r in CODED if r.name == name)
    path, _, _ = saved(row, tmp_path)
    model = load(path)
    for node in model.graph:
        if "block_size" in node.attributes:
            node.attributes["block_size"] = ir.AttrInt64("block_size", 0)
    ir.save(model, path)
    refused(path, "blocks of 0")


PACKED = Coded(
    "packed q, k and v",
    "n = Constant<value = int64[3] {12, 6, 6}>() p = com.microsoft.MatMulNBits<K = 40, N = 24, "
    "bits = 4, block_size = 16>(x, w, s) q, k, v = Split<axis = -1>(p, n) "
    "y = Concat<axis = -1>(v, k, q)",
    nbits(4, 16, "none"),
    "MatMulNBits",
    4,
    then=lambda y, t: np.concatenate([y[..., 18:], y[..., 12:18], y[..., :12]], -1),
)


def test_a_packed_weight_stays_packed(tmp_path: Path) -> None:
    """One A serves all parts; an adapter of parts has its parts' rows alone, and batch one A."""
    path, tensors, w = saved(PACKED, tmp_path)
    target, x = target_of(path), sample(PACKED)
    whole, rng = update(PACKED, target, 1), np.random.default_rng(2)
    parts, change = {}, np.zeros_like(w)
    for key, rows in (("w[0:12]", slice(0, 12)), ("w[18:24]", slice(18, 24))):
        a = (rng.standard_normal((2, 40)) / 6).astype(np.float32)
        b = rng.standard_normal((rows.stop - rows.start, 2)).astype(np.float32)
        layout = target.layout.narrow(((rows.start, rows.stop), (0, 40)))
        parts[key] = LowRank(a, b, 1.0, layout)
        change[rows] += 0.5 * b.astype(np.float64) @ a
    base = open_session(path, "cpu").run({"x": x})["y"]
    wanted = {
        "whole": expected(PACKED, x, w, tensors, base, whole),
        "parts": PACKED.then(product(PACKED, x, w + change), tensors),
    }
    adapters = {"whole": Adapter({"w": whole}), "parts": Adapter(dict(parts))}
    for name, adapter in adapters.items():
        made = tmp_path / f"{name}.onnx"
        lora_fx.export(path, made, adapters={name: adapter}, mode="switch", provider="cpu")
        session = Session(made, "cpu")
        session.load(name, adapter)
        y = session.run({"x": x}, adapter=name)["y"]
        assert rel(y, wanted[name]) < TOL and seen(y, base)
        assert len(reads(made, "w")) == 1
    assert len([n for n in reads(tmp_path / "whole.onnx", "w.lora_A")]) == 1
    batch = tmp_path / "b.onnx"
    given = list(adapters.values())
    lora_fx.export(path, batch, adapters=given, mode="batch", provider="cpu")
    ids = np.array([2, 0, 1], np.int64)
    mixed = open_session(batch, "cpu").run({"x": x, "adapter_ids": ids})["y"]
    for i, y in enumerate((wanted["parts"], base, wanted["whole"])):
        assert rel(mixed[i], y[i]) < TOL
    assert len(reads(batch, "w.batch_A")) == 1


def reads(path: Path, name: str) -> list[str]:
    """The ops that read an initialiser or an input."""
    return [
        n.op_type for n in load(path).graph for v in n.inputs if v is not None and v.name == name
    ]


BETWEEN = Coded(
    "codes before and behind",
    "k = Constant<value = float {0.02}>() c = Constant<value = uint8 {120}>() "
    "m = Constant<value = float {0.05}>() o = Constant<value = int8 {3}>() "
    "q = QuantizeLinear(x, k, c) r = DequantizeLinear(q, k, c) d = DequantizeLinear(w, s, z) "
    "p = MatMul(r, d) u = QuantizeLinear(p, m, o) y = DequantizeLinear(u, m, o)",
    linear((40, 24)),
    "DequantizeLinear",
    8,
    reads=of_codes(0.02, 120),
    then=lambda y, t: (np.clip(np.rint(y / 0.05) + 3, -128, 127) - 3) * 0.05,
)


def test_a_branch_is_added_before_the_product_is_made_codes(tmp_path: Path) -> None:
    """QuantizeLinear may do a Relu's work, so what follows it is no place for a sum."""
    path, tensors, w = saved(BETWEEN, tmp_path)
    target, x = target_of(path), sample(BETWEEN)
    low = update(BETWEEN, target, 1)
    adapters = {"one": Adapter({"w": low})}
    lora_fx.export(path, tmp_path / "s.onnx", adapters=adapters, mode="switch", provider="cpu")
    session = Session(tmp_path / "s.onnx", "cpu")
    session.load("one", adapters["one"])
    y = session.run({"x": x}, adapter="one")["y"]
    base = open_session(path, "cpu").run({"x": x})["y"]
    steps = np.abs(y - expected(BETWEEN, x, w, tensors, base, low)) / 0.05
    assert steps.max() < 1.01 and (steps > 0.5).mean() < 0.01 and seen(y, base)
    report = lora_fx.export(
        path, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu"
    )
    assert report
