"""A small ONNX graph as source text, drawn from a seed, so that a failure can be read and replayed.

A graph takes floats [batch, steps, width] or [batch, width], ids, or images, and goes through a few
blocks: every way in which an op of the table reads a weight, views of weights, weights in bodies
and functions, other readers, ties, cuts to constants, masks and reductions.
"""

# ruff: noqa: E501  # lines of drawn text are not folded

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.fuzz.onnx_text import Text

WIDTHS = (3, 4, 6)
ROWS = 20
STYLES = ("{}.weight", "/layers/{}/MatMul", "a.{}[0]", "u@{}", "onnx::MatMul_{}", "{} .x", "é{}")
OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)


@dataclass
class Draft:
    """A graph while it is drawn.

    Attributes:
        rng: Of the seed.
        opset: Of the graph.
        kind: Of h: seq [N, T, width], flat [N, width] or image [N, width, H, W].
        width: Of h.
        steps: T where it is a number.
        lines: The text.
        known: Weights that may be used again: (variable, in, out, whether stored [in, out]).
        ids: There is an input of ids, int64.
        rows: N where it is a number.
    """

    rng: random.Random
    opset: int
    kind: str
    width: int
    steps: int | None = None
    lines: list[str] = field(default_factory=list)
    known: list[tuple[str, int, int, bool]] = field(default_factory=list)
    ids: bool = False
    rows: int | None = None
    count: int = 0

    def say(self, *lines: str) -> None:
        """Lines of the text."""
        self.lines += lines

    def out(self) -> int:
        """Another width, or the same."""
        return self.rng.choice((self.width, *WIDTHS))

    def chance(self, share: float) -> bool:
        """True so often."""
        return self.rng.random() < share

    def name(self) -> str:
        """A new variable, which is what a weight is called too; see Text.weight for odd names."""
        self.count += 1
        return f"w{self.count}"

    def weight(self, shape: str, layout: str, *, plain: bool = False, owner: str = "g") -> str:
        """A weight, stored in one of many ways; returns its variable."""
        w = self.name()
        sizes = [int(n) for n in shape.split()]
        text = ", ".join(map(str, sizes))
        way = 0 if plain else self.rng.randrange(16)
        how = {1: ", how='constant'", 2: ", how='input'"}.get(way, "")
        if how and owner != "g":
            how = ""
        if way == 3 and len(sizes) == 2:
            turned = " ".join(layout.split()[::-1])
            self.say(f"{w} = g.weight('{w}', ({sizes[1]}, {sizes[0]}), '{turned}')",
                     f"{w} = g.turn({w}, 1, 0)")  # fmt: skip
        elif way == 4 and not any(c.isdigit() for c in layout):
            split = " ".join(t + str(n) for t, n in zip(layout.split(), sizes, strict=True))
            whole = 1
            for n in sizes:
                whole *= n
            self.say(f"{w} = g.weight('{w}', ({whole},), '{split}')",
                     f"{w} = g.shape({w}, [{text}])")  # fmt: skip
        elif way == 5:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}', dtype='float16')",
                     f"{w} = g.cast({w}, 'float32')", "g.gate.append(4e-3)")  # fmt: skip
        elif way == 6:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}', dtype='float64')",
                     f"{w} = g.cast({w}, 'float32')")  # fmt: skip
        elif way == 7:
            self.say(f"{w} = g.weight('{w}', ({text},), '{layout}')",
                     f"{w} = g.view('Identity', {w})")  # fmt: skip
        elif way == 8 and not any(c.isdigit() for c in layout):
            self.say(f"{w} = g.weight('{w}', ({sizes[0] * 2}, {text[len(str(sizes[0])) + 2:]}), "
                     f"'{layout}')", f"{w} = g.cut({w}, {sizes[0]}, {2 * sizes[0]}, 0)")  # fmt: skip
        elif way == 9:
            self.say(f"{w} = g.weight('{w}', (1, {text}), 'o1 "
                     + self._sized(layout, sizes) + "')", f"{w} = g.squeeze({w}, 0)")  # fmt: skip
        else:
            self.say(f"{w} = {owner}.weight('{w}', ({text},), '{layout}'{how})")
        return w

    @staticmethod
    def _sized(layout: str, sizes: list[int]) -> str:
        if any(c.isdigit() for c in layout):
            return layout
        return " ".join(t + str(n) for t, n in zip(layout.split(), sizes, strict=True))

    def matrix(self, inside: int, out: int, *, stored_in_out: bool = True) -> str:
        """A matrix, or one that stands there already."""
        if self.chance(0.15):
            fits = [
                n for n, i, o, first in self.known if (i, o, first) == (inside, out, stored_in_out)
            ]
            if fits:
                return self.rng.choice(fits)
        shape, layout = (f"{inside} {out}", "i o") if stored_in_out else (f"{out} {inside}", "o i")
        w = self.weight(shape, layout)
        self.known.append((w, inside, out, stored_in_out))
        return w


Block = Callable[[Draft], None]


def _matmul(d: Draft) -> None:
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.node('MatMul', [h, {w}])")
    if d.chance(0.5):
        d.say(f"h = g.add(h, g.const(np.linspace(-1, 1, {out}), 'float32'))")
    d.width = out


def _left(d: Draft) -> None:
    out = d.out()
    if d.kind == "seq" and d.steps and d.chance(0.4):  # over the steps
        w = d.matrix(d.steps, d.steps, stored_in_out=False)
        d.say(f"h = g.node('MatMul', [{w}, h])")
        return
    w = d.matrix(d.width, out, stored_in_out=False)
    perm = "0, 2, 1" if d.kind == "seq" else "1, 0"
    d.say(f"h = g.turn(g.node('MatMul', [{w}, g.turn(h, {perm})]), {perm})")
    d.width = out


def _stack(d: Draft) -> None:
    out = d.out()
    if d.kind != "seq":
        w = d.weight(f"2 {d.width} {out}", "b i o")  # broadcast over rows: [2, N, out]
        d.say(f"h = g.reduce('Mean', g.node('MatMul', [h, {w}]), [0], 0)")
    else:
        way = d.rng.randrange(4)
        if way == 0:
            rows = 2 if d.rows == 2 and d.chance(0.7) else 1
            w = d.weight(f"{rows} {d.width} {out}", "b i o")
            d.say(f"h = g.node('MatMul', [h, {w}])")
        elif way == 1:
            w = d.weight(f"2 {d.width} {out}", "b i o")
            d.say(
                "h = g.unsqueeze(h, 1)", f"h = g.reduce('Mean', g.node('MatMul', [h, {w}]), [1], 0)"
            )
        elif way == 2 and d.width % 2 == 0:
            half = d.width // 2
            w = d.weight(f"2 {half} {out}", "b i o")
            d.say(f"h = g.turn(g.shape(h, [0, 0, 2, {half}]), 0, 2, 1, 3)",
                  f"h = g.reduce('Sum', g.node('MatMul', [h, {w}]), [1], 0)")  # fmt: skip
        else:
            w = d.weight(f"2 {out} {d.width}", "b o i")
            d.say("h = g.turn(g.unsqueeze(h, 1), 0, 1, 3, 2)",
                  f"h = g.turn(g.reduce('Mean', g.node('MatMul', [{w}, h]), [1], 0), 0, 2, 1)")  # fmt: skip
    d.width = out


def _views(d: Draft) -> None:
    """A weight behind several views, some of which change nothing."""
    out, w = d.out(), d.name()
    i, o, way = d.width, out, d.rng.randrange(10)
    if way == 0:
        d.say(f"{w} = g.weight('{w}', ({o}, 3, {i}), 'o b i')",
              f"{w} = g.turn({w}, 1, 2, 0)", f"{w} = g.view('Gather', {w}, [g.const(-1)], axis=0)")  # fmt: skip
    elif way == 1:
        d.say(f"{w} = g.weight('{w}', ({i}, {o}), 'i o')",
              f"{w} = g.cast(g.cast({w}, 'float16'), 'float32')", "g.gate.append(1e-2)")  # fmt: skip
    elif way == 2:
        d.say(f"{w} = g.weight('{w}', ({i}, {2 * o}), 'i o')",
              f"{w} = g.view('Slice', {w}, [g.const([-{o}]), g.const([2**62]), g.const([-1])])")  # fmt: skip
    elif way == 3:
        attrs = "" if d.opset < 18 else ", num_outputs=2"
        d.say(f"{w} = g.weight('{w}', ({i}, {2 * o}), 'i o')",
              f"{w} = g.view('Split', {w}, n=2, at=1, axis=-1{attrs})")  # fmt: skip
    elif way == 4:
        d.say(f"{w} = g.weight('{w}', ({i}, {o}), 'i o')",
              f"{w} = g.shape(g.shape({w}, [1, {i}, -1]), [{i}, {o}])")  # fmt: skip
    elif way == 5:
        d.say(f"{w} = g.weight('{w}', ({o}, {i}), 'o i')",
              f"{w} = g.view('Flatten', {w}, axis=-1)", f"{w} = g.turn({w}, 1, 0)")  # fmt: skip
    elif way == 6:  # not in the order of any axes
        d.say(f"{w} = g.weight('{w}', ({o}, {i}), '{'i o' if i == o else 'o i'}')",
              f"{w} = g.shape({w}, [{i}, {o}])")  # fmt: skip
    elif way == 7:
        d.say(f"{w} = g.weight('{w}', ({i}, {o}), 'i o')",
              f"{w} = g.view('Expand', {w}, [g.const([1, {i}, {o}])])",
              f"{w} = g.squeeze({w}, 0)")  # fmt: skip
    elif way == 8:
        d.say(f"{w} = g.weight('{w}', ({i + 2}, {o}), 'i o')",
              f"{w} = g.cut(g.cut({w}, 1, {i + 2}, 0), 0, {i}, 0)")  # fmt: skip
    else:
        d.say(f"{w} = g.weight('{w}', ({i}, {o}), 'i o')", f"{w} = g.unsqueeze({w}, 0)")
        d.say(f"{w} = g.squeeze({w}, 0)" if d.chance(0.5) else f"{w} = g.shape({w}, [{i}, {o}])")
    d.say(f"h = g.node('MatMul', [h, {w}])")
    d.width = out


def _slots(d: Draft) -> None:
    """One weight in two slots of a node."""
    w = d.name()
    n, way = d.width, d.rng.randrange(3)
    if way == 0 and d.kind == "seq":
        d.say(f"{w} = g.weight('{w}', (1, {n}, {n}), 'b o i')",
              f"y = g.node('RNN', [g.turn(h, 1, 0, 2), {w}, {w}], hidden_size={n})",
              f"h = g.shape(g.turn(y, 2, 0, 1, 3), [0, 0, {n}])")  # fmt: skip
    elif way == 1 and d.opset >= 12:
        eq = "nti,io,ok->ntk" if d.kind == "seq" else "ni,io,ok->nk"
        d.say(f"{w} = g.weight('{w}', ({n}, {n}), 'i o')",
              f"h = g.node('Einsum', [h, {w}, {w}], equation='{eq}')")  # fmt: skip
    else:
        d.say(f"{w} = g.weight('{w}', ({n}, {n}), 'i o')",
              f"h = g.node('MatMul', [g.node('Tanh', [g.node('MatMul', [h, {w}])]), {w}])")  # fmt: skip


def _chosen(d: Draft) -> None:
    """A weight that data choose, join or mask."""
    out = d.out()
    a, b = d.name(), d.name()
    size = f"({d.width}, {out})"
    d.say(f"{a} = g.weight('{a}', {size}, 'i o')", f"{b} = g.weight('{b}', {size}, 'i o')",
          "c = g.node('Greater', [g.reduce('Mean', h, [0, 1], 0), g.const(0.0, 'float32')])")  # fmt: skip
    way = d.rng.randrange(4)
    if way == 0:
        d.say(f"v = g.node('Where', [c, g.other({a}), g.other({b})])")
    elif way == 1:
        d.say("s, t = g.body(), g.body()", f"s.output(s.node('Identity', [g.other({a})]))",
              f"t.output(t.node('Identity', [g.other({b})]))",
              "",
              "v = g.node('If', [c], then_branch=s.graph(), else_branch=t.graph())")  # fmt: skip
        d.lines[-2] = "c = g.node('Less', [g.node('Size', [h]), g.const(40)])"
    elif way == 2:
        d.say(f"v = g.node('Concat', [g.other({a}), g.other({b})], axis=1)")
        out *= 2
    else:
        d.say("k = g.cast(g.node('Greater', [g.node('Size', [h]), g.const(40)]), 'int64')",
              f"v = g.node('Concat', [g.unsqueeze(g.other({a}), 0), g.unsqueeze(g.other({b}), 0)], axis=0)",
              "v = g.node('Gather', [v, k], axis=0)")  # fmt: skip
    if way == 0 and d.kind != "seq":
        d.lines[-1] = f"v = g.node('Add', [g.other({a}), g.other({b})])"
    if way == 0 and d.kind == "seq":
        d.lines[-2] = (
            "c = g.node('Greater', [g.reduce('Mean', h, [0, 1, 2], 0), g.const(0.0, 'float32')])"
        )
    d.say("h = g.node('MatMul', [h, v])")
    d.width = out


def _ends(d: Draft) -> None:
    """A product that is an output, and is read on."""
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.node('MatMul', [h, {w}])", "g.output(h)")
    d.width = out


def _narrow(d: Draft) -> None:
    """A weight in float32 and a product in float16."""
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.cast(g.node('MatMul', [g.cast(h, 'float16'), g.cast({w}, 'float16')]), 'float32')",
          "g.gate.append(1e-2)")  # fmt: skip
    d.width = out


def _nested(d: Draft) -> None:
    """If in a Loop, its weight outside or inside."""
    w = d.matrix(d.width, d.width)
    d.say("b = g.body()", "i = b.input('i%d' % b.count[0], [], 'int64')",
          "c = b.input('c%d' % b.count[0], [], 'bool')", "s = b.input('s%d' % b.count[0], None)",
          "t, e = b.body(), b.body()", f"t.output(t.node('MatMul', [s, {w}]))")  # fmt: skip
    if d.chance(0.5):
        v = d.weight(f"{d.width} {d.width}", "i o", plain=True, owner="e")
        d.say(f"e.output(e.node('Tanh', [e.node('MatMul', [s, {v}])]))")
    else:
        d.say("e.output(e.node('Tanh', [s]))")
    d.say("r = b.node('If', [b.node('Less', [i, b.const(1)])], then_branch=t.graph(), else_branch=e.graph())",
          "b.output(b.node('Identity', [c]), [], 'bool')", "b.output(b.node('Tanh', [r]))",
          "h = g.node('Loop', [g.const(3), '', h], body=b.graph())")  # fmt: skip


def _vector(d: Draft) -> None:
    way = d.rng.randrange(3)
    if way == 0:
        w = d.weight(f"{d.width}", "i", plain=True)
        d.say(f"h = g.add(h, g.unsqueeze(g.node('MatMul', [h, {w}]), -1))")
        return
    out = d.width
    axes = "[0, 1]" if d.kind == "seq" else "[0]"
    d.say(f"v = g.reduce('Mean', h, {axes}, 0)")
    if way == 1:
        w = d.matrix(d.width, out)
        d.say(f"h = g.add(h, g.node('MatMul', [v, {w}]))")
    else:
        w = d.matrix(d.width, out, stored_in_out=False)
        d.say(f"h = g.add(h, g.node('MatMul', [{w}, v]))")


def _gemm(d: Draft) -> None:
    out = d.out()
    turned, first = d.chance(0.5), d.chance(0.3)
    attrs = [f"transB={int(turned)}"] if turned else []
    attrs += [f"alpha={d.rng.choice((0.5, 2.0))}"] if d.chance(0.3) else []
    attrs += [f"beta={d.rng.choice((0.5, 2.0))}"] if d.chance(0.3) else []
    flat = "h" if d.kind == "flat" else f"g.shape(h, [-1, {d.width}])"
    d.say(f"x = {flat}")
    c = d.rng.choice(("", "", f"[0.5] * {out}", f"[[0.5] * {out}]", "0.25", "[0.5]"))
    bias = f", g.const({c}, 'float32')" if c else ""
    if d.chance(0.2):  # the weight is the first operand: [out, in] @ [in, rows]
        w = d.matrix(d.width, out, stored_in_out=not turned)
        a = f"transA={int(not turned)}"
        if c.startswith("["):
            bias = f", g.const([[0.5]] * {out}, 'float32')"
        d.say(f"y = g.node('Gemm', [{w}, g.turn(x, 1, 0){bias}], {a})", "y = g.turn(y, 1, 0)")
    else:
        w = d.matrix(d.width, out, stored_in_out=not turned)
        if first:
            attrs.append("transA=1")
        x = "g.turn(x, 1, 0)" if first else "x"
        d.say(f"y = g.node('Gemm', [{', '.join((x, w))}{bias}]{''.join(', ' + a for a in attrs)})")
    d.say("h = y" if d.kind == "flat" else f"h = g.like(y, h, {out})")
    d.width = out


def _convolution(d: Draft) -> None:
    if d.kind == "flat":
        return _matmul(d)
    out, n = d.out(), 2 if d.kind == "image" else 1
    transposed = d.chance(0.3)
    groups = 2 if d.width % 2 == 0 and out % 2 == 0 and d.chance(0.4) else 1
    if d.chance(0.08):
        groups = out = d.width
    kernel = d.rng.choice((1, 2, 3))
    stride = 2 if d.chance(0.2) else 1
    pads = d.rng.choice((0, 1))
    dilation = 2 if d.chance(0.15) and d.kind == "image" else 1
    attrs = f"kernel_shape={[kernel] * n}, group={groups}, strides={[stride] * n}"
    attrs += f", pads={[pads] * 2 * n}, dilations={[dilation] * n}"
    if transposed and stride == 2 and d.chance(0.5):
        attrs += f", output_padding={[1] * n}"
    if not transposed and d.chance(0.1):
        attrs = f"kernel_shape={[kernel] * n}, group={groups}, auto_pad='SAME_UPPER'"
    if d.chance(0.2):
        attrs = attrs.replace(f"kernel_shape={[kernel] * n}, ", "")
    ks = " ".join([str(kernel)] * n)
    if transposed:
        shape = f"{d.width} {out // groups} {ks}"
        layout = (
            "i" + " o" * (1 + n)
            if groups == 1
            else f"b{groups} i{d.width // groups} o{out // groups}"
            + "".join(f" o{kernel}" for _ in range(n))
        )
    else:
        shape = f"{out} {d.width // groups} {ks}"
        layout = (
            "o" + " i" * (1 + n)
            if groups == 1
            else f"b{groups} o{out // groups} i{d.width // groups}"
            + "".join(f" i{kernel}" for _ in range(n))
        )
    w = d.weight(shape, layout)
    bias = f", g.const(np.linspace(-1, 1, {out}), 'float32')" if d.chance(0.5) else ""
    op = "ConvTranspose" if transposed else "Conv"
    x = "h" if d.kind == "image" else "g.turn(h, 0, 2, 1)"
    end = "{}" if d.kind == "image" else "g.turn({}, 0, 2, 1)"
    if d.kind == "image" and not transposed and d.chance(0.1):
        made = f"g.node('FusedConv', [{x}, {w}{bias}], domain=MS, activation='Relu', {attrs})"
    else:
        made = f"g.node('{op}', [{x}, {w}{bias}], {attrs})"
    d.say(f"h = {end.format(made)}")
    d.width, d.steps = out, None


def _einsum(d: Draft) -> None:
    if d.opset < 12:
        return _matmul(d)
    out = d.out()
    if d.kind == "flat":
        way = d.rng.randrange(3)
        w = d.weight(*((f"{d.width} {out}", "i o") if way < 2 else (f"{out} {d.width}", "o i")))
        eq = ("ni,io->no", " ni , io -> no ", "ni,oi")[way]
    else:
        way = d.rng.randrange(7)
        if way == 4 and d.width % 2 == 0:
            w = d.weight(f"{d.width} 2 {out}", "i o o")
            d.say(f"h = g.node('Einsum', [h, {w}], equation='nti,iho->ntho')",
                  "h = g.reduce('Sum', h, [2], 0)")  # fmt: skip
            d.width = out
            return
        if way == 5 and d.width % 2 == 0:
            summed = d.chance(0.5)
            w = d.weight(f"2 {d.width // 2} {out}", "i i o" if summed else "b i o")
            d.say(f"h = g.shape(h, [0, 0, 2, {d.width // 2}])",
                  f"h = g.node('Einsum', [h, {w}], equation='nthi,hio->nt{'' if summed else 'h'}o')")  # fmt: skip
            if not summed:
                d.say("h = g.reduce('Sum', h, [2], 0)")
            d.width = out
            return
        if way == 6:
            w = d.weight(f"{d.width} {out}", "i o")
            d.say(f"h = g.node('Einsum', [h, {w}, g.const([0.5] * {out}, 'float32')], "
                  "equation='nti,io,o->nto')")  # fmt: skip
            d.width = out
            return
        w = d.weight(
            *((f"{d.width} {out}", "i o") if way % 2 == 0 else (f"{out} {d.width}", "o i"))
        )
        eq = ("nti,io->nto", "oi,nti->nto", "...i,io->...o", "NTI,OI->NTO")[way % 4]
        if eq.startswith("oi"):
            d.say(f"h = g.node('Einsum', [{w}, h], equation='{eq}')")
            d.width = out
            return
    d.say(f"h = g.node('Einsum', [h, {w}], equation='{eq}')")
    d.width = out


def _recurrent(d: Draft) -> None:
    if d.kind != "seq":
        return _gemm(d)
    op = d.rng.choice(("LSTM", "GRU", "RNN"))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    both = d.chance(0.3)
    n, hidden = 1 + both, d.rng.choice((2, 3, 5))
    w = d.weight(f"{n} {gates * hidden} {d.width}", "b o i")
    r = d.weight(f"{n} {gates * hidden} {hidden}", "b o i")
    attrs = f"hidden_size={hidden}, direction='{'bidirectional' if both else 'forward'}'"
    if op == "GRU" and d.chance(0.5):
        attrs += ", linear_before_reset=1"
    bias = (
        f", g.const(np.full(({n}, {2 * gates * hidden}), 0.1), 'float32')" if d.chance(0.5) else ""
    )
    d.say(f"y = g.node('{op}', [g.turn(h, 1, 0, 2), {w}, {r}{bias}], {attrs})",
          f"h = g.shape(g.turn(y, 2, 0, 1, 3), [0, 0, {n * hidden}])")  # fmt: skip
    d.width = n * hidden


def _tie(d: Draft) -> None:
    """A weight again, read the other way round."""
    usable = [(n, i, o, f) for n, i, o, f in d.known if o == d.width]
    if not usable or d.kind == "image":
        return _matmul(d)
    w, inside, _, first = d.rng.choice(usable)
    turned = f"g.turn({w}, 1, 0)" if first else w
    d.say(f"h = g.node('Tanh', [g.node('MatMul', [h, {turned}])])")
    d.width = inside


def _reader(d: Draft) -> None:
    """A product's weight, read by no product."""
    if not d.known:
        return None
    w = d.rng.choice(d.known)[0]
    way = d.rng.randrange(6)
    if way == 0:
        d.say(f"h = g.add(h, g.reduce('Mean', g.other({w}), [0, 1], 0))")
    elif way == 1:
        d.say(f"g.output(g.other({w}))")
    elif way == 2:
        d.say(f"r = g.node('Gather', [g.other({w}), g.const([1, 0])], axis=0)",
              "h = g.add(h, g.reduce('Sum', r, [0, 1], 0))")  # fmt: skip
    elif way == 3:
        d.say(f"r = g.node('Mul', [g.other({w}), g.const(0.01, 'float32')])",
              "h = g.add(h, g.reduce('Max', r, [0, 1], 0))")  # fmt: skip
    elif way == 4:
        d.say(f"s = g.cast(g.node('Size', [{w}.old]), 'float32')",
              "h = g.node('Div', [h, s])")  # fmt: skip
    else:
        d.say(f"r = g.node('Mul', [g.other({w}), g.const(2.0, 'float32')])",
              "h = g.add(h, g.reduce('Mean', g.node('Tanh', [r]), [0, 1], 0))")  # fmt: skip
    return None


def _computed(d: Draft) -> None:
    """A product with what is computed from a weight: no view of it."""
    out = d.out()
    w = d.name()
    d.say(f"{w} = g.weight('{w}', ({d.width}, {out}), 'i o')")
    how = d.rng.choice(("Mul", "Add"))
    d.say(f"c = g.node('{how}', [g.other({w}), g.const(0.5, 'float32')])",
          "h = g.node('MatMul', [h, c])")  # fmt: skip
    d.width = out


def _part(d: Draft) -> None:
    """Parts of one weight at several products."""
    w = d.name()
    wide = d.width
    d.say(f"{w} = g.weight('{w}', ({wide}, {2 * wide}), 'i o')")
    if d.chance(0.5):
        opset = d.opset
        attrs = f", split=[{wide}, {wide}]" if opset < 13 else ""
        ins = "" if opset < 13 else f", [g.const([{wide}, {wide}])]"
        d.say(
            f"a, b = (g.view('Split', {w}{ins or ', []'}, n=2, at=k, axis=1{attrs}) for k in (0, 1))"
        )
    else:
        d.say(f"a, b = g.cut({w}, 0, {wide}, 1), g.cut({w}, {wide}, {2 * wide}, 1)")
    d.say(
        "h = g.node('Mul', [g.node('MatMul', [h, a]), g.node('Sigmoid', [g.node('MatMul', [h, b])])])"
    )


def _overlap(d: Draft) -> None:
    """Parts that overlap, or one that stands beside the whole."""
    w = d.name()
    wide = d.width
    d.say(f"{w} = g.weight('{w}', ({wide + 1}, {wide}), 'o i')",
          f"a, b = g.cut({w}, 0, {wide}, 0), g.cut({w}, 1, {wide + 1}, 0)",
          "h = g.add(g.node('MatMul', [h, a]), g.node('MatMul', [h, b]))")  # fmt: skip


def _branch(d: Draft) -> None:
    """If, whose bodies read outer and inner weights."""
    out = d.width
    axis = 1 if d.kind == "seq" else 0
    n = d.rng.choice((3, 8))
    d.say(f"n = g.node('Gather', [g.node('Shape', [h]), g.const({axis})], axis=0)",
          f"g.cuts.append({n})", f"c = g.node('Less', [n, g.const({n})])",
          "a, b = g.body(), g.body()")  # fmt: skip
    first = d.matrix(d.width, out)
    inner = d.chance(0.6)
    second = d.weight(f"{d.width} {out}", "i o", plain=True, owner="b" if inner else "g")
    twice = d.chance(0.3)
    d.say(f"a.output(a.node('Tanh', [a.node('MatMul', [h, {first}])]))",
          f"b.output(b.node('MatMul', [h, {first if twice and not inner else second}]))",
          "h = g.node('If', [c], then_branch=a.graph(), else_branch=b.graph())")  # fmt: skip


def _loop(d: Draft) -> None:
    """Loop, its weight outside, inside or carried."""
    way = d.rng.randrange(3)
    dims = "None"
    d.say("b = g.body()", "i = b.input('i%d' % b.count[0], [], 'int64')",
          "c = b.input('c%d' % b.count[0], [], 'bool')",
          f"s = b.input('s%d' % b.count[0], {dims})")  # fmt: skip
    trip = "g.const(2)"
    if way == 0:
        w = d.matrix(d.width, d.width)
    elif way == 1:
        w = d.weight(f"{d.width} {d.width}", "i o", plain=True, owner="b")
    if way < 2:
        d.say("b.output(b.node('Identity', [c]), [], 'bool')",
              f"b.output(b.node('Tanh', [b.node('MatMul', [s, {w}])]))",
              f"h = g.node('Loop', [{trip}, '', h], body=b.graph())")  # fmt: skip
        return
    w = d.name()
    d.say(f"{w} = g.weight('{w}', ({d.width}, {d.width}), 'i o')",
          f"v = b.input('v%d' % b.count[0], [{d.width}, {d.width}])",
          "b.output(b.node('Identity', [c]), [], 'bool')",
          "b.output(b.node('Tanh', [b.node('MatMul', [s, v])]))",
          "b.output(b.node('Identity', [v]))",
          f"h, _ = g.node('Loop', [{trip}, '', h, g.other({w})], n=2, body=b.graph())")  # fmt: skip


def _scan(d: Draft) -> None:
    """Scan over the steps, or over a stack of weights."""
    if d.kind != "seq":
        return _loop(d)
    d.say(
        "b = g.body()",
        "s = b.input('s%d' % b.count[0], None)",
        "x = b.input('x%d' % b.count[0], None)",
    )
    if d.chance(0.3):
        w = d.name()
        d.say(f"{w} = g.weight('{w}', (2, {d.width}, {d.width}), 'b i o')",
              "b.output(b.node('Tanh', [b.node('MatMul', [s, x])]))",
              f"h = g.node('Scan', [h, g.other({w})], body=b.graph(), num_scan_inputs=1)")  # fmt: skip
        return
    u, w = d.matrix(d.width, d.width), d.matrix(d.width, d.width)
    d.say(f"y = b.node('Tanh', [b.add(b.node('MatMul', [x, {w}]), b.node('MatMul', [s, {u}]))])",
          "b.output(y)", "b.output(b.node('Identity', [y]))",
          "_, h = g.node('Scan', [g.reduce('Mean', h, [1], 0), h], n=2, body=b.graph(), num_scan_inputs=1, "
          "scan_input_axes=[1], scan_output_axes=[1])")  # fmt: skip


def _function(d: Draft) -> None:
    """A function of the model, called twice."""
    f = f"Dense{d.count}"
    first, second = d.matrix(d.width, d.width), d.matrix(d.width, d.width)
    d.say("f = g.body()", "r = f.node('Tanh', [f.node('MatMul', ['x', 'w'])])",
          f"g.function('{f}', ['x', 'w'], f, [r])",
          f"h = g.node('{f}', [h, {first}], domain=LOCAL)")  # fmt: skip
    if d.chance(0.6):
        d.say(f"h = g.node('{f}', [h, {second}], domain=LOCAL)")


def _fused(d: Draft) -> None:
    """An op of com.microsoft."""
    if d.kind == "image":
        return _convolution(d)
    out = d.out()
    way = d.rng.randrange(4)
    if way == 0:
        turned = d.chance(0.5)
        w = d.matrix(d.width, out, stored_in_out=not turned)
        d.say(
            f"h = g.node('FusedMatMul', [h, {w}], domain=MS, transB={int(turned)}, alpha={d.rng.choice((1.0, 0.5))})"
        )
    elif way == 1 and d.kind == "seq":
        w = d.matrix(d.width, out)
        d.say(f"h = g.node('FusedMatMul', [g.turn(h, 0, 2, 1), {w}], domain=MS, transA=1)")
    elif way == 2 and d.kind == "seq" and d.width % 2 == 0:
        out = d.width
        w = d.weight(f"{d.width} {3 * out}", "i o")
        d.say(
            f"h = g.node('Attention', [h, {w}, g.const([0.1] * {3 * out}, 'float32')], domain=MS, num_heads=2)"
        )
    else:
        out = d.width
        w = d.matrix(d.width, out)
        flat = "h" if d.kind == "flat" else f"g.shape(h, [-1, {d.width}])"
        y = f"g.node('FusedGemm', [{flat}, {w}, g.const([0.1] * {out}, 'float32')], domain=MS, activation='Relu')"
        d.say(f"h = {y}" if d.kind == "flat" else f"h = g.like({y}, h, {out})")
    d.width = out


def _half(d: Draft) -> None:
    """A product in another dtype."""
    out = d.out()
    kind = d.rng.choice(("float16", "float64"))
    w = d.name()
    d.say(f"{w} = g.weight('{w}', ({d.width}, {out}), 'i o', dtype='{kind}')",
          f"h = g.cast(g.node('MatMul', [g.cast(h, '{kind}'), {w}]), 'float32')")  # fmt: skip
    if kind == "float16":
        d.say("g.gate.append(1e-2)")
    d.width = out


def _lookup(d: Draft) -> None:
    """A table by ids, by positions, or along its other axis."""
    if d.kind != "seq":
        return _matmul(d)
    way = d.rng.randrange(4)
    w = d.name()
    if way == 0 and d.ids:
        d.say(f"{w} = g.weight('{w}', ({ROWS}, {d.width}), 'i o')",
              f"h = g.add(h, g.node('Gather', [{w}, 'ids'], axis=0))")  # fmt: skip
    elif way == 1:
        d.say(f"{w} = g.weight('{w}', (40, {d.width}), 'i o')", "g.cuts.append(40)",
              "n = g.node('Gather', [g.node('Shape', [h]), g.const(1)], axis=0)",
              "p = g.node('Range', [g.const(0), n, g.const(1)])",
              f"h = g.add(h, g.node('Gather', [{w}, p], axis=0))")  # fmt: skip
    elif way == 2:
        d.say(f"{w} = g.weight('{w}', ({d.width}, 7), 'i o')",
              f"r = g.node('Gather', [g.other({w}), g.const([2, 5])], axis=1)",
              "h = g.add(h, g.reduce('Mean', r, [1], 0))")  # fmt: skip
    else:
        d.say(f"{w} = g.weight('{w}', (12, {d.width}), 'i o')", "g.cuts.append(12)",
              "n = g.node('Slice', [g.node('Shape', [h]), g.const([1]), g.const([2])])",
              f"h = g.add(h, g.node('Slice', [g.other({w}), g.const([0]), n, g.const([0])]))")  # fmt: skip
    return None


def _attend(d: Draft) -> None:
    """A product of activations, masked where there are ids."""
    if d.kind != "seq":
        return _gemm(d)
    q = d.matrix(d.width, d.width)
    d.say(f"q = g.node('MatMul', [h, {q}])",
          "a = g.node('MatMul', [q, g.turn(h, 0, 2, 1)])")  # fmt: skip
    if d.ids and d.chance(0.5):
        d.say("m = g.unsqueeze(g.node('Greater', ['ids', g.const(3)]), 1)",
              "a = g.node('Where', [m, a, g.const(-10000.0, 'float32')])")  # fmt: skip
    d.say("h = g.add(h, g.node('MatMul', [g.node('Softmax', [a], axis=2), h]))")
    return None


def _cut(d: Draft) -> None:
    if d.kind != "seq":
        return _plain(d)
    n = d.rng.choice((3, 8, 100))
    start, stop, step = d.rng.choice(((0, n, 1), (-n, 2**62, 1), (0, 2**62, 2), (1, 2**62, 1)))
    d.say(f"g.cuts.append({n})", f"h = g.cut(h, {start}, {stop}, 1, {step})")
    d.steps = None
    return None


def _regroup(d: Draft) -> None:
    """A reshape with constants, which only some sizes allow."""
    if d.kind != "seq":
        return _plain(d)
    way = d.rng.randrange(3)
    if way == 0:
        d.say(f"h = g.shape(g.shape(h, [-1, {d.width}]), [-1, 1, {d.width}])")
    elif way == 1:
        d.say(
            "s = g.node('Shape', [h])",
            f"x = g.shape(h, [-1, {d.width}])",
            "h = g.node('Reshape', [x, s])",
        )
        return None
    else:
        d.say("h = g.turn(h, 1, 0, 2)")
    d.steps = None
    return None


PLAIN = (
    "h = g.node('Tanh', [h])",
    "h = g.node('Relu', [h])",
    "h = g.node('Mul', [h, g.node('Sigmoid', [h])])",
    "h = g.node('Mul', [h, g.const(100.0, 'float32')])",
    "h = g.add(h, g.const(100.0, 'float32'))",
    "h = g.node('Clip', [h, g.const(-2.0, 'float32'), g.const(2.0, 'float32')])",
    "h = g.add(h, g.reduce('Mean', h, [1], 1))",
    "h = g.node('Sub', [h, g.reduce('Max', h, [-1], 1)])",
    "h = g.node('Softmax', [h], axis=-1)",
    "h = g.node('Div', [h, g.add(g.reduce('Sum', g.node('Abs', [h]), [-1], 1), g.const(1.0, 'float32'))])",
    "h = g.add(h, g.reduce('Mean', h, [0], 1))",
    "h = g.node('Dropout', [h])",
    "h = g.node('Concat', [h, h], axis=1)",
    "h = g.node('Where', [g.node('Less', [h, g.const(-1.0, 'float32')]), g.const(0.0, 'float32'), h])",
)


def _plain(d: Draft) -> None:
    usable = PLAIN[:-2] if d.kind != "seq" else PLAIN
    d.say(d.rng.choice(usable))
    if d.kind == "seq" and "Concat" in d.lines[-1]:
        d.steps = None


def _norm(d: Draft) -> None:
    if d.kind == "image":
        d.say(
            f"h = g.node('BatchNormalization', [h, *(g.const([v] * {d.width}, 'float32') for v in (1.5, 0.1, 0.2, 0.9))])"
        )
    elif d.opset >= 17:
        d.say(f"h = g.node('LayerNormalization', [h, g.const([1.5] * {d.width}, 'float32'), "
              f"g.const([0.1] * {d.width}, 'float32')], axis=-1)")  # fmt: skip
    else:
        d.say("x = g.node('Sub', [h, g.reduce('Mean', h, [-1], 1)])",
              "v = g.add(g.reduce('Mean', g.node('Mul', [x, x]), [-1], 1), g.const(0.01, 'float32'))",
              "h = g.node('Div', [x, g.node('Sqrt', [v])])")  # fmt: skip


def _quantised(d: Draft) -> None:
    """A weight as integers."""
    out = d.out()
    if d.chance(0.5):
        d.say(f"c = g.const(np.arange({d.width * out}).reshape({d.width}, {out}) % 17 - 8, 'int8')",
              "q = g.node('DequantizeLinear', [c, g.const(0.05, 'float32'), g.const(1, 'int8')])",
              "h = g.node('MatMul', [h, q])")  # fmt: skip
    else:
        d.say("x, s, z = g.node('DynamicQuantizeLinear', [h], n=3)",
              f"c = g.const(np.arange({d.width * out}).reshape({d.width}, {out}) % 17, 'uint8')",
              "y = g.node('MatMulInteger', [x, c, z, g.const(8, 'uint8')])",
              "h = g.node('Mul', [g.cast(y, 'float32'), g.node('Mul', [s, g.const(0.05, 'float32')])])")  # fmt: skip
    d.say("g.gate.append(1e-1)")
    d.width = out


def _empty(d: Draft) -> None:
    """A weight without columns, and one of a single one."""
    w = d.name()
    n = d.rng.choice((0, 1))
    d.say(f"{w} = g.weight('{w}', ({d.width}, {n}), 'i o')",
          f"h = g.node('Concat', [h, g.node('MatMul', [h, {w}])], axis=-1)")  # fmt: skip
    d.width += n


BLOCKS: tuple[Block, ...] = (
    *([_matmul] * 4 + [_gemm] * 4 + [_left] * 3 + [_stack] * 2 + [_plain] * 5 + [_cut] * 2),
    *([_einsum] * 3 + [_convolution] * 3 + [_recurrent] * 2 + [_branch] * 2 + [_loop] * 2),
    *(_scan, _function, _fused, _fused, _half, _lookup, _lookup, _attend, _tie, _tie, _reader),
    *(_reader, _computed, _part, _overlap, _vector, _norm, _regroup, _quantised, _empty),
    *(_views, _views, _slots, _chosen, _ends, _narrow, _nested),
)
IMAGE: tuple[Block, ...] = (*([_convolution] * 5 + [_plain] * 3), _norm, _fused)


@dataclass(frozen=True)
class GraphProgram:
    """A drawn graph.

    Attributes:
        seed: It is drawn from, and its weights are.
        source: The lines that make it.
    """

    seed: int
    source: str

    def text(self, changed: dict[str, object] | None = None) -> Text:
        """The graph, or the one by hand with these weights changed."""
        import numpy as np

        from tests.fuzz.onnx_text import LOCAL, MS

        g = Text(seed=self.seed, changed=changed or {})
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
        _gemm(d)
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
