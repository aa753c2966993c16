"""Adapters meet initialisers by name, by the exporter's metadata, by scope, by map, by shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.onnx.load import load
from lora_fx.onnx.match import read_map
from lora_fx.onnx.names import FOLDED_FROM
from lora_fx.passes.verbs.merge_onnx import merge_onnx

SIZES = {"q": (8, 6), "k": (8, 6), "o": (6, 4)}
STORED = {"q": "onnx::MatMul_11", "k": "onnx::MatMul_12", "o": "onnx::MatMul_13"}


def model(
    path: Path, nodes: dict[str, str] | None = None, meta: dict[str, str] | None = None
) -> dict[str, Any]:
    """y = (x @ q + x @ k) @ o under names of an exporter; weights [in, out]."""
    rng, values = np.random.default_rng(0), {}
    x = ir.Value(name="x", shape=ir.Shape(["N", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    held = {}
    for key, size in SIZES.items():
        values[key] = rng.standard_normal(size).astype("f4")
        kind, tensor = ir.TensorType(ir.DataType.FLOAT), ir.tensor(values[key], name=STORED[key])
        value = ir.Value(name=STORED[key], const_value=tensor, shape=ir.Shape(size), type=kind)
        if meta and key in meta:
            value.metadata_props[FOLDED_FROM] = str([meta[key]])
        held[key] = value
    names = nodes or {}
    q, k = (ir.node("MatMul", [x, held[n]], name=names.get(n)) for n in "qk")
    s = ir.node("Add", [q.outputs[0], k.outputs[0]])
    o = ir.node("MatMul", [s.outputs[0], held["o"]], name=names.get("o"))
    for i, n in enumerate((q, k, s, o)):
        n.outputs[0].name = f"v{i}"
        n.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        n.outputs[0].shape = ir.Shape(["N", 4 if n is o else 6])
    graph = ir.Graph(
        [x], o.outputs, nodes=[q, k, s, o], initializers=list(held.values()),
        opset_imports={"": 18}, name="g",
    )  # fmt: skip
    ir.save(ir.Model(graph, ir_version=10), path)
    return values


def low(size: tuple[int, int], seed: int) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, size[0])), rng.standard_normal((size[1], 2))
    return LowRank(a.astype("f4"), b.astype("f4"), 3.0)


def check(
    path: Path,
    base: dict[str, Any],
    adapter: Adapter,
    meant: dict[str, str],
    called: dict[str, str] = STORED,
    **kw: Any,
) -> None:
    """Each key changed the tensor that it means, by its own update, and nothing else."""
    out = path.with_name("out.onnx")
    merge_onnx(path, adapter, out, **kw)
    new = load(out).graph.initializers
    wanted = {n: w.astype("f8") for n, w in base.items()}
    for key, which in meant.items():
        u = adapter.lowrank[key]
        wanted[which] = wanted[which] + 1.5 * (u.b.astype("f8") @ u.a.astype("f8")).T
    for name, want in wanted.items():
        value = new[called[name]].const_value
        assert value is not None
        assert np.abs(value.numpy() - want).max() < 1e-5, name
    assert meant


def adapter_of(keys: dict[str, str]) -> Adapter:
    return Adapter({k: low(SIZES[n], i) for i, (k, n) in enumerate(keys.items())})


def test_by_the_initialiser_s_name(tmp_path: Path) -> None:
    base, keys = model(tmp_path / "m.onnx"), {STORED["k"]: "k"}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys)


def test_by_the_exporter_s_metadata(tmp_path: Path) -> None:
    names = {"q": "attn.q.weight", "k": "attn.k.weight"}
    base, keys = model(tmp_path / "m.onnx", meta=names), {"attn.k.weight": "k"}
    called = {**STORED, **names}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys, called)


def test_by_the_scope_in_node_names(tmp_path: Path) -> None:
    names = {n: f"/encoder/layer.0/{n}/MatMul" for n in "qko"}
    base = model(tmp_path / "m.onnx", names)
    keys = {"encoder.layer.0.k.weight": "k", "encoder.layer.0.o.weight": "o"}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys)


def test_an_initialiser_s_name_is_no_module_of_others(tmp_path: Path) -> None:
    names = {n: f"/{STORED['o']}/MatMul" for n in "qk"}
    base, keys = model(tmp_path / "m.onnx", names), {STORED["o"]: "o"}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys)


def test_by_a_map(tmp_path: Path) -> None:
    base, keys = model(tmp_path / "m.onnx"), {"layers.0.key": "k", "layers.0.query": "q"}
    names = {k: STORED[n] for k, n in keys.items()}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys, names=names)


def test_by_shape_where_one_target_has_it(tmp_path: Path) -> None:
    base, keys = model(tmp_path / "m.onnx"), {"out_proj.weight": "o"}
    check(tmp_path / "m.onnx", base, adapter_of(keys), keys)


@pytest.mark.parametrize(
    ("keys", "kw", "text"),
    [
        (
            {"x.weight": "q"},
            {},
            "'x.weight' is no target .* 'onnx::MatMul_11', 'onnx::MatMul_12'",
        ),
        ({"x.weight": "o", "z.weight": "o"}, {}, "may be any of 'x.weight', 'z.weight'"),
        (
            {"s.weight": "q"},
            {},
            "'s.weight' is no target .* 'onnx::MatMul_11', 'onnx::MatMul_12'",
        ),
        ({"x.weight": "q"}, {"names": {"x.weight": "nope"}}, "'nope' is not a target"),
        ({"x.weight": "q"}, {"names": {"w": STORED["q"]}}, "'w', which the adapter does not have"),
        (
            {"x": "q", "z": "q"},
            {"names": dict.fromkeys("xz", STORED["q"])},
            "gives one tensor two updates",
        ),
    ],
)
def test_what_is_ambiguous_is_refused(
    keys: dict[str, str], kw: dict[str, Any], text: str, tmp_path: Path
) -> None:
    model(tmp_path / "m.onnx", {"q": "/s/MatMul", "k": "/s/MatMul_1"})
    with pytest.raises(LoraFxError, match=text):
        merge_onnx(tmp_path / "m.onnx", adapter_of(keys), tmp_path / "out.onnx", **kw)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_key_beside_known_ones_is_no_other_naming(tmp_path: Path) -> None:
    model(tmp_path / "m.onnx")
    with pytest.raises(LoraFxError, match="'typo' is not a target"):
        adapter = adapter_of({STORED["q"]: "q", "typo": "o"})
        merge_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")


def test_map_files_that_are_none(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"a": 1}'):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(LoraFxError, match=r"map\.json: "):
            read_map(str(tmp_path / "map.json"))
