"""QA-LoRA folded into the zero points of MatMulNBits: no node, no code and no scale changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx.inserted_branches import adapter_in
from lora_fx.onnx.session import open_session
from lora_fx.passes.verbs.insert_onnx import insert_onnx

Array = np.ndarray[Any, Any]
K, N, M = 96, 24, 7
TOL = 1e-6


def codes_of(
    rng: Any, n: int, k: int, bits: int, block: int, zero: str
) -> tuple[dict[str, Array], Array]:
    """Codes, scales and zeros of a matrix [n, k], and the matrix in fp64."""
    blocks, each = -(-k // block), 8 // bits
    codes = rng.integers(0, 2**bits, (n, blocks, block))
    parts = codes.reshape(n, blocks, -1, each) << (np.arange(each) * bits)
    scale = ((rng.random((n, blocks)) + 0.5) / 2**bits).astype(np.float32)
    tensors = {"w": parts.sum(-1).astype(np.uint8), "s": scale}
    zeros = np.full((n, blocks), 2.0 ** (bits - 1))
    if zero == "packed":
        zeros = rng.integers(0, 2**bits, (n, blocks)).astype(np.float64)
        wide = np.pad(zeros.astype(np.uint32), ((0, 0), (0, -blocks % each)))
        byte = wide.reshape(n, -1, each) << (np.arange(each, dtype=np.uint32) * bits)
        tensors["z"] = byte.sum(-1).astype(np.uint8)
    elif zero == "float":
        tensors["z"] = (rng.random((n, blocks)) * 2**bits).astype(np.float32)
        zeros = tensors["z"].astype(np.float64)
    w = (codes - zeros[..., None]) * scale[..., None].astype(np.float64)
    return tensors, w.reshape(n, -1)[:, :k]


def saved(
    path: Path, bits: int = 4, block: int = 32, zero: str = "none", *, shared: bool = False,
    constant: bool = False, scale_zero: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """Two products on one x as a file, y with a bias; with `shared`, over the same zero points."""
    rng = np.random.default_rng(0)
    nodes, matrices = [], []
    weights: dict[str, Array] = {}
    for name in "yv":
        tensors, w = codes_of(rng, N, K, bits, block, zero)
        if shared and name == "v":
            tensors["z"] = weights["yz"]
        if scale_zero:
            tensors["s"][1, 0] = 0
        names = ["x", *(f"{name}{t}" for t in tensors)]
        if shared and name == "v":
            names[3] = "yz"
            tensors.pop("z")
        if name == "y":
            names += [""] * (5 - len(names)) + ["bias"]
        nodes.append(helper.make_node(
            "MatMulNBits", names, [name], domain="com.microsoft", K=K, N=N, block_size=block,
            bits=bits, accuracy_level=0))  # fmt: skip
        weights |= {f"{name}{t}": v for t, v in tensors.items()}
        matrices.append(w)
    weights["bias"] = rng.standard_normal(N).astype(np.float32)
    if constant:
        tensor = numpy_helper.from_array(weights.pop("yz"), "yz")
        nodes.insert(0, helper.make_node("Constant", [], ["yz"], value=tensor))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["B", K])],
        [value(n, TensorProto.FLOAT, ["B", N]) for n in "yv"],
        [numpy_helper.from_array(v, n) for n, v in weights.items()])  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return matrices[0], weights["bias"]


def update(group: int, seed: int = 1) -> LowRank:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((3, K // group)).astype(np.float32)
    b = rng.standard_normal((N, 3)).astype(np.float32)
    return grouped(LowRank(a, b, group / 16), group)


def by_hand(low: LowRank) -> Array:
    """s · in/group² · (b @ a)[o, i // group] in fp64, s of the alpha that PEFT is given."""
    g = variant_of(low).constant_over
    wide = low.b.astype(np.float64) @ low.a[:, ::g].astype(np.float64)
    return np.repeat(g / 16 / 3 * K / g**2 * wide, g, 1)


def tensors_of(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("bits", "block", "group", "zero", "more"),
    [
        (4, 32, 32, "none", {}),
        (4, 16, 48, "packed", {}),
        (4, 32, 96, "float", {}),
        (2, 32, 32, "packed", {}),
        (4, 128, 96, "none", {}),  # a block that is longer than the row
        (4, 32, 32, "packed", {"shared": True}),
        (4, 32, 32, "packed", {"constant": True}),
    ],
    ids=str,
)
def test_merged_is_unmerged(
    bits: int, block: int, group: int, zero: str, more: dict[str, bool], tmp_path: Path
) -> None:
    base, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    w, bias = saved(base, bits, block, zero, **more)
    low = update(group)
    report = lora_fx.merge(base, [Adapter({"yw": low})], out, run=True)
    assert all(p.rel < TOL for p in report.parity) and report.parity
    assert report.details["tensors"][0]["gain"] == pytest.approx(1, abs=1e-4)
    assert "1 quantised weights have zero points in floating point" in " ".join(report.warnings)
    assert "of their own" not in " ".join(report.warnings)
    x = np.random.default_rng(5).standard_normal((M, K)).astype(np.float32)
    before, after = (open_session(p, "cpu").run({"x": x}) for p in (base, out))
    want = x.astype(np.float64) @ (w + by_hand(low)).T + bias
    assert rel(after["y"], want) < TOL and 0.05 < rel(before["y"], want) < 5
    assert np.array_equal(after["v"], before["v"])  # its zero points were the same tensor, or not
    ops = [Counter(n.op_type for n in onnx.load(p).graph.node) for p in (base, out)]
    ops[0].pop("Constant", None)
    assert ops[0] == ops[1] == {"MatMulNBits": 2}
    held, was = tensors_of(out), tensors_of(base)
    assert all(held[n].tobytes() == v.tobytes() for n, v in was.items() if n != "yz")
    (new,) = {n for n in held if n not in was or held[n].dtype != was[n].dtype or n == "yz"} - (
        {"yz"} if more.get("shared") else set()
    )
    assert held[new].dtype == np.float32 and held[new].shape == (N, -(-K // block))
    assert lora_fx.verify(out, base, adapter=Adapter({"yw": low}), provider="cpu")


def test_twice_and_a_sum(tmp_path: Path) -> None:
    """A sum of two, of other groups, and one upon another, which then has floats already."""
    base, one, two, both = (tmp_path / f"{n}.onnx" for n in ("base", "one", "two", "both"))
    w, bias = saved(base)
    first, second = Adapter({"yw": update(32)}), Adapter({"yw": update(96, 2)})
    lora_fx.merge(base, [first], one)
    lora_fx.merge(one, [(second, 0.5)], two)
    lora_fx.merge(base, [first, (second, 0.5)], both)
    x = np.random.default_rng(5).standard_normal((M, K)).astype(np.float32)
    delta = by_hand(update(32)) + 0.5 * by_hand(update(96, 2))
    want = x.astype(np.float64) @ (w + delta).T + bias
    for path in (two, both):
        assert rel(open_session(path, "cpu").run({"x": x})["y"], want) < TOL


@pytest.mark.parametrize(
    ("file", "low", "words"),
    [
        ({"block": 32}, update(16), "groups of 16 inputs are not whole blocks of 32 codes"),
        ({"block": 64}, update(32), "groups of 32 inputs are not whole blocks of 64 codes"),
        ({"bits": 8}, update(32), "no zero points that may be floats"),
        ({}, LowRank(update(96).a + np.eye(3, K, dtype=np.float32), update(96).b, 1.0),
         "would round the update away"),
        ({"scale_zero": True}, update(32), "a block of its codes has scale 0"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(file: dict[str, Any], low: LowRank, words: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    saved(base, **file)
    for verb in (
        lambda: lora_fx.merge(base, [Adapter({"yw": low})], out),
        lambda: lora_fx.export(base, out, adapters=Adapter({"yw": low})),
    ):
        with pytest.raises(LoraFxError) as caught:
            verb()
        assert words in caught.value.message and "'yw'" in caught.value.message
        assert "--mode switch" in caught.value.hint and caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx"]


def test_an_update_of_zero_changes_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    saved(base)
    low = update(32)
    with pytest.raises(LoraFxError, match="no element"):
        lora_fx.merge(base, [(Adapter({"yw": low}), 0.0)], tmp_path / "o.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx"]


def test_trained_as_a_graph(tmp_path: Path) -> None:
    """insert into the file, any trainer, merge: A has a column a group all the way to PEFT."""
    base, slots, out = (tmp_path / f"{n}.onnx" for n in ("base", "slots", "out"))
    w, bias = saved(base)
    insert_onnx(base, slots, rank=3, alpha=6, variant="qalora", include="yw", provider="cpu")
    model, rng = onnx.load(slots), np.random.default_rng(2)
    for t in model.graph.initializer:
        if ".yw" in t.name:
            drawn = rng.standard_normal(list(t.dims)).astype(np.float32) / 5
            t.CopyFrom(numpy_helper.from_array(drawn, t.name))
    onnx.save(model, slots)
    held = {n: v for n, v in tensors_of(slots).items() if n.endswith(".yw")}
    a, b = held["lora_A.yw"].astype(np.float64), held["lora_B.yw"].astype(np.float64)
    assert a.shape == (3, K // 32) and b.shape == (N, 3)
    lora_fx.merge(base, [slots], out)
    x = np.random.default_rng(5).standard_normal((M, K)).astype(np.float32)
    want = x.astype(np.float64) @ (w + 6 / 3 * K / 32**2 * np.repeat(b @ a, 32, 1)).T + bias
    for path in (slots, out):
        assert rel(open_session(path, "cpu").run({"x": x})["y"], want) < TOL
    assert rel(open_session(base, "cpu").run({"x": x})["y"], want) > 0.05
    low = adapter_in(slots).lowrank["yw"]
    assert variant_of(low).constant_over == 32 and variant_of(low).alpha(low) == 6
