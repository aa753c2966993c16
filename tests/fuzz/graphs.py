"""A small ONNX graph as source text, drawn from a seed, so that a failure can be read and replayed.

A graph takes floats [batch, steps, width] or [batch, width], ids, or images, and goes through a few
blocks: every way in which an op of the table reads a weight, views of weights, weights in bodies
and functions, other readers, ties, cuts to constants, masks and reductions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.fuzz.graph_blocks import BLOCKS, IMAGE, ROWS
from tests.fuzz.graph_draft import WIDTHS, Draft
from tests.fuzz.graph_products import gemm
from tests.fuzz.onnx_text import Text

STYLES = ("{}.weight", "/layers/{}/MatMul", "a.{}[0]", "u@{}", "onnx::MatMul_{}", "{} .x", "é{}")
OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)


@dataclass(frozen=True)
class GraphProgram:
    """A drawn graph.

    Attributes:
        seed: It is drawn from, and its weights are.
        source: The lines that make it.
    """

    seed: int
    source: str

    def text(self, changed: dict[str, object] | None = None, *, exact: bool = False) -> Text:
        """The graph, or the one by hand with these weights changed; see Text.exact."""
        import numpy as np

        from tests.fuzz.onnx_text import LOCAL, MS

        g = Text(seed=self.seed, changed=changed or {}, exact=exact)
        names: dict[str, object] = {"g": g, "np": np, "MS": MS, "LOCAL": LOCAL}
        exec(compile(self.source, f"<graph {self.seed}>", "exec"), names)
        return g

    def without(self, lines: range) -> GraphProgram:
        """The same without some lines."""
        kept = [s for k, s in enumerate(self.source.splitlines()) if k not in lines]
        return replace(self, source="\n".join(kept) + "\n")


def _begin(d: Draft) -> None:
    rng = d.rng
    rows: int | str = rng.choice(("N", "N", "N", "N", "N", 2))
    d.rows = rows if isinstance(rows, int) else None
    d.say(f"g.opset = {d.opset}")
    if d.chance(0.25):
        d.say(f"g.style = {d.rng.choice(STYLES)!r}")
    if d.chance(0.05):
        d.say("g.domain = 'ai.onnx'")
    if d.kind == "seq":
        steps: int | str = rng.choice(("T", "T", "T", 5))
        d.steps = steps if isinstance(steps, int) else None
        dims: list[int | str | None] = [rows, steps, d.width]
    elif d.kind == "flat":
        steps = 0
        dims = [rows, d.width]
    else:
        steps = 0
        dims = [rows, d.width, *rng.choice((("H", "W"), (9, 7), ("H", 8)))]
    told = [None if isinstance(n, str) and d.chance(0.06) else n for n in dims]
    said = f", said={told}" if told != dims else ""
    d.ids = d.kind == "seq" and d.chance(0.35)
    alone = d.ids and d.chance(0.5)
    if not alone:
        d.say(f"h = g.input('x', {dims}{said})")
    if d.ids:
        kind = rng.choice(("int64", "int64", "int32"))
        d.say(f"g.input('ids', {dims[:2]}, '{kind}', high={ROWS})")
        if kind == "int32":
            d.ids = False
        table = d.weight(f"{ROWS} {d.width}", "i o")
        d.known.append((table, ROWS, d.width, True))
        d.say(
            f"e = g.node('Gather', [{table}, 'ids'], axis=0)",
            "h = e" if alone else "h = g.add(h, e)",
        )
    if d.kind != "image" and d.chance(0.15):
        second = [f"{dims[0]}", *([dims[1]] if d.kind == "seq" else []), 3]
        second[0] = dims[0]
        w = d.weight(f"3 {d.width}", "i o")
        d.say(f"h = g.add(h, g.node('MatMul', [g.input('y', {second}), {w}]))")
    if d.kind == "seq" and d.chance(0.12):
        w = d.weight(f"3 {d.width}", "i o")
        d.say(f"z = g.node('MatMul', [g.input('z', [{dims[0]!r}, 'S', 3]), {w}])",
              "a = g.node('Softmax', [g.node('MatMul', [h, g.turn(z, 0, 2, 1)])], axis=2)",
              "h = g.add(h, g.node('MatMul', [a, z]))")  # fmt: skip


def graph(seed: int) -> GraphProgram:
    """The graph of a seed."""
    rng = random.Random(seed)
    kind = rng.choice(("seq", "seq", "seq", "seq", "seq", "flat", "flat", "image"))
    d = Draft(rng, rng.choice(OPSETS), kind, rng.choice(WIDTHS))
    _begin(d)
    blocks = IMAGE if kind == "image" else BLOCKS
    for _ in range(rng.randrange(2, 7)):
        rng.choice(blocks)(d)
    end = rng.randrange(6)
    if kind == "image" and end < 3:
        d.say("h = g.squeeze(g.node('GlobalAveragePool', [h]), 2, 3)")
        d.kind = "flat"
        gemm(d)
    if end == 4 and kind == "seq":
        d.say("g.output(g.reduce('Mean', h, [1], 0))")
    if end == 5:
        d.say("g.output(g.node('Shape', [h]), None, 'int64')")
    dims = {"seq": "['batch', 'length', None]", "flat": "['unk__1', None]"}.get(d.kind)
    d.say(f"g.output(h, {dims})" if dims and d.chance(0.6) else "g.output(h)")
    if d.chance(0.3):
        d.say("g.infer = True")
    if d.chance(0.15):
        d.say("g.external = True")
    return GraphProgram(seed, "\n".join(d.lines) + "\n")
