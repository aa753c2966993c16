"""What drawn ONNX graphs found: each is served by these verbs, and is W + ΔW by hand at every size.

On 788628f each of them fails: a refusal that nothing deserves, a file that does not load, a weight
that find does not name, or an exception that is none of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import lora_fx
from lora_fx import Adapter, LowRank
from lora_fx.ir.layout import plain_layout
from lora_fx.onnx import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from tests.fuzz.check_graph import check_graph
from tests.fuzz.graphs import GraphProgram


@dataclass(frozen=True)
class Case:
    """Lines of a graph, and the verbs that serve it."""

    lines: str
    verbs: tuple[str, ...]
    seed: int = 0


X = "h = g.input('x', ['N', 'T', 4])\n"
FLAT = "h = g.input('x', ['N', 4])\n"
END = "g.output(h, ['N', 'T', None])\n"
HALF = "w = g.cast(g.weight('w', (4, 6), 'i o', dtype='float16'), 'float32')\ng.gate.append(4e-3)\n"
PARTS = "h = g.node('Mul', [g.node('MatMul', [h, a]), g.node('MatMul', [h, b])])\n"
CASES = {
    # parts of one tensor: the proof of a merge knew one of them at a time; switch took none
    "slices": Case(
        X + "w = g.weight('w', (4, 12), 'i o')\n"
        "a, b = g.cut(w, 0, 6, 1), g.cut(w, 6, 12, 1)\n" + PARTS + END,
        ("merge", "merged", "switch", "load"),
    ),
    "split": Case(
        X + "w = g.weight('w', (4, 8), 'i o')\n"
        "a, b = (g.view('Split', w, [g.const([4, 4])], n=2, at=k, axis=1) for k in (0, 1))\n"
        + PARTS + END,
        ("merge", "merged", "switch", "load"),
    ),
    "rows": Case(
        X + "w = g.weight('w', (8, 6), 'i o')\n"
        "a, b = g.cut(w, 0, 4, 0), g.cut(w, 4, 8, 0)\n" + PARTS + END,
        ("merge", "merged", "switch", "load"),
    ),
    # a size of 0 copied another one in the Reshape of a branch
    "a sequence of none": Case(
        X + "w = g.weight('w', (4, 4), 'i o')\ng.cuts.append(3)\n"
        "h = g.cut(h, 1, 4611686018427387904, 1, 1)\nh = g.node('MatMul', [h, w])\n" + END,
        ("switch", "load"),
    ),
    # onnxscript's optimizer takes the Identity away, and the output got the weight's name
    "an output that is a weight": Case(
        X + "w = g.weight('w', (4, 4), 'i o')\nu = g.weight('u', (6, 4), 'i o')\n"
        "h = g.node('MatMul', [h, w])\ng.output(g.other(u))\n" + END,
        ("merged",), 1,
    ),
    # no elements: ZeroDivisionError
    "no columns": Case(
        X + "w, e = g.weight('w', (4, 6), 'i o'), g.weight('e', (6, 0), 'i o')\n"
        "h = g.node('MatMul', [h, w])\n"
        "h = g.node('Concat', [h, g.node('MatMul', [g.node('Relu', [h]), e])], axis=-1)\n" + END,
        ("merge", "switch", "insert"),
    ),
    # W is rounded to what it is stored or read in, and the branches are not
    "float16": Case(X + HALF + "h = g.node('MatMul', [h, w])\n" + END, ("merge", "load", "batch")),
    "float16 of a convolution": Case(
        "h = g.input('x', ['N', 4, 9])\n"
        "w = g.cast(g.weight('w', (6, 4, 3), 'o i i', dtype='float16'), 'float32')\n"
        "g.gate.append(4e-3)\nh = g.node('Conv', [h, w])\ng.output(h)\n",
        ("merge", "switch", "load"),
    ),
    "product in float16": Case(
        X + "w = g.weight('w', (4, 6), 'i o', how='input')\ng.gate.append(1e-2)\n"
        "h = g.node('MatMul', [g.cast(h, 'float16'), g.cast(w, 'float16')])\n"
        "h = g.cast(h, 'float32')\n" + END,
        ("merge", "switch", "load"),
    ),
    # a dtype that the file does not say
    "after another domain": Case(
        "g.opset = 14\n" + X + "v, w = g.weight('v', (4, 6), 'i o'), g.weight('w', (6, 3), 'i o')\n"
        "h = g.node('FusedMatMul', [h, v], domain=MS)\nh = g.node('MatMul', [h, w])\n" + END,
        ("merge", "switch", "load", "insert"),
    ),
    # batch: ops and dimensions of older files
    "opset 11": Case(
        "g.opset = 11\n" + X + "w = g.weight('w', (4, 6), 'i o')\nh = g.node('MatMul', [h, w])\n"
        + END,
        ("batch",),
    ),
    "opset 12": Case(
        "g.opset = 12\n" + X + "w = g.weight('w', (6, 4), 'o i')\n"
        "h = g.node('MatMul', [h, g.turn(w, 1, 0)])\n" + END,
        ("batch",),
    ),
    "outputs of another name": Case(
        FLAT + "w = g.weight('w', (4, 6), 'i o')\nh = g.node('MatMul', [h, w])\n"
        "g.output(h, ['unk__1', None])\n",
        ("batch",),
    ),
    # the runtime gets transpose(A) @ v of one dimension wrong
    "left of a vector": Case(
        X + "v = g.reduce('Mean', h, [0, 1], 0)\nw = g.weight('w', (6, 4), 'o i')\n"
        "g.output(g.node('MatMul', [w, v]))\n",
        ("merge", "switch", "load", "insert"),
        67,
    ),
    # an einsum of several weights was taken for a constant
    "three operands": Case(
        X + "w = g.weight('w', (4, 6), 'i o')\n"
        "h = g.node('Einsum', [h, w, g.const([0.5] * 6, 'float32')], equation='nti,io,o->nto')\n"
        + END,
        ("merge", "switch", "load", "insert"),
    ),
    "chain": Case(
        X + "v, w = g.weight('v', (4, 5), 'i o'), g.weight('w', (5, 6), 'i o')\n"
        "h = g.node('Einsum', [h, v, w], equation='nti,io,ok->ntk')\n" + END,
        ("merge", "switch", "load", "insert"),
    ),
    "one weight twice": Case(
        X + "w = g.weight('w', (4, 4), 'i o')\n"
        "h = g.node('Einsum', [h, w, w], equation='nti,io,ok->ntk')\n" + END,
        ("merge", "switch", "load", "insert"),
    ),
    "rank unknown": Case(
        "g.opset = 14\n" + X + "v = g.weight('v', (4, 6), 'i o')\n"
        "w = g.weight('w', (3, 6), 'o i')\n"
        "h = g.node('FusedMatMul', [h, v], domain=MS)\n"
        "h = g.node('Einsum', [g.turn(w, 0, 1), h], equation='oi,nti->nto')\n" + END,
        ("merge", "switch", "insert"),
    ),
    # a data file that is the base's
    "small and beside": Case(
        "g.external = True\n" + X + "v, w = g.weight('v', (4, 8), 'i o'), g.weight('w', (8, 40), "
        "'i o')\nh = g.node('MatMul', [g.node('MatMul', [h, v]), w])\n"
        "h = g.add(h, g.const([0.5] * 40, 'float32'))\n" + END,
        ("merge", "load"),
    ),
    "beside, in a body": Case(
        "g.external = True\n" + X + "v = g.weight('v', (4, 6), 'i o')\n"
        "h = g.node('MatMul', [h, v])\n"
        "a, b = g.body(), g.body()\nw = b.weight('w', (6, 6), 'i o')\n"
        "a.output(a.node('Tanh', [h]))\nb.output(b.node('MatMul', [h, w]))\n"
        "c = g.node('Less', [g.node('Size', [h]), g.const(3)])\n"
        "h = g.node('If', [c], then_branch=a.graph(), else_branch=b.graph())\n" + END,
        ("merge", "load"),
    ),
    # a name that reads as a part or a use of another tensor: KeyError, or no such target
    "u@w": Case(
        "g.style = 'u@{}'\n" + X + "w = g.weight('w', (4, 6), 'i o')\n"
        "h = g.node('MatMul', [h, w])\n" + END,
        ("merge", "switch", "load", "batch", "insert"),
    ),
    "a[0]": Case(
        "g.style = 'a.{}[0]'\n" + X + "w = g.weight('w', (4, 6), 'i o')\n"
        "h = g.node('MatMul', [h, w])\n" + END,
        ("merge", "switch", "load", "batch", "insert"),
    ),
    # a Constant that nothing but the output reads after the fold: KeyError
    "constant put out": Case(
        X + "w = g.weight('w', (4, 6), 'i o', how='constant')\nh = g.node('MatMul', [h, w])\n"
        "g.output(h)\ng.output(g.other(w))\n",
        ("merge", "merged"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_was_found_is_served_and_right(name: str) -> None:
    case = CASES[name]
    verdict = check_graph(GraphProgram(case.seed, case.lines), case.verbs)
    assert not verdict.wrong and not verdict.raw and not verdict.unseen
    assert verdict.refused == {} and not verdict.blind and not verdict.idle
    assert set(verdict.served) == set(case.verbs)


TWINS = {
    "mean over the batch": "h = g.add(h, g.reduce('Mean', h, [0], 1))\n",
    "by the number of rows": "n = g.cast(g.node('Size', [h]), 'float32')\n"
    "h = g.node('Mul', [h, n])\n",
}


@pytest.mark.parametrize("name", TWINS)
def test_a_batch_that_mixes_rows_stays_refused(name: str) -> None:
    lines = FLAT + TWINS[name] + "h = g.node('MatMul', [h, g.weight('w', (4, 6), 'i o')])\n"
    verdict = check_graph(GraphProgram(0, lines + "g.output(h)\n"), ("batch",))
    assert "batch" in verdict.refused and not verdict.served and not verdict.wrong


def test_a_weight_left_of_a_value_of_unknown_rank_is_right_at_every_rank(tmp_path: Path) -> None:
    """Of a vector, ONNX Runtime gets aᵀ v wrong; nothing says that v is none.

    A switchable file gave other numbers for the same change with a rank more.
    """
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3), (1, 3)))
    text = '<ir_version: 8, opset_import: ["": 17]> m (float[N,3] x, float[5,3] w) => (y) '
    model = ir.from_onnx_text(text + "{ v = Squeeze(x) y = MatMul(w, v) }")
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(w, name="w")
    model.graph.initializers["w"] = value
    ir.save(model, tmp_path / "m.onnx")
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3), (5, 2)))
    out = tmp_path / "s.onnx"
    lora_fx.export(tmp_path / "m.onnx", out, mode="switch", inputs={"x": x}, provider="cpu")
    session = Session(out, "cpu")
    want = (w + b.astype(np.float64) @ a) @ x[0]
    layout = plain_layout((5, 3))
    for more in range(3):
        wide = np.concatenate([a, np.ones((more, 3), np.float32)])
        tall = np.concatenate([b, np.zeros((5, more), np.float32)], 1)
        low = LowRank(wide, tall, float(2 + more), layout)
        session.load(f"r{more}", Adapter({"w": low}))
        np.testing.assert_allclose(session.run({"x": x}, f"r{more}")["y"], want, rtol=1e-5)


def test_a_name_that_reads_as_a_key_takes_no_other_tensors_name() -> None:
    """Before, `u@w` became `u_w`, and the tensor of that name `u_w.1`: an adapter went astray."""
    text = '<ir_version: 8, opset_import: ["": 17]> m (float[N,3] x, float[3,4] a, float[4,5] b)'
    model = ir.from_onnx_text(text + " => (float[N,5] y) { h = MatMul(x, a) y = MatMul(h, b) }")
    for value, name in zip(list(model.graph.inputs)[1:], ("u@w", "u_w"), strict=True):
        model.graph.inputs.remove(value)
        shape = tuple(value.shape.numpy()) if value.shape is not None else ()
        value.const_value = ir.tensor(np.ones(shape, np.float32), name=name)
        value.name = name
        model.graph.initializers[name] = value
    found = find(OnnxGraph(model))
    assert found["u_w"].parameter.shape == (4, 5) and found["u@w"].parameter.shape == (3, 4)
