"""Further blocks of a drawn graph: ties, readers, parts, bodies, lookups, masks, and the list of all."""

# ruff: noqa: E501  # lines of drawn text are not folded

from __future__ import annotations

import re

from tests.fuzz.graph_draft import Block, Draft
from tests.fuzz.graph_products import (
    chosen,
    convolution,
    einsum,
    ends,
    gemm,
    left,
    matmul,
    narrow,
    nested,
    recurrent,
    slots,
    stack,
    vector,
    views,
)

ROWS = 20


def _tie(d: Draft) -> None:
    """A weight again, read the other way round."""
    usable = [(n, i, o, f) for n, i, o, f in d.known if o == d.width and _multiplied(d, n)]
    if not usable or d.kind == "image":
        return matmul(d)
    w, inside, _, first = d.rng.choice(usable)
    turned = f"g.turn({w}, 1, 0)" if first else w
    d.say(f"h = g.node('Tanh', [g.node('MatMul', [h, {turned}])])")
    d.width = inside


def _multiplied(d: Draft, name: str) -> bool:
    """Whether a product reads a weight so far: the first one says what its axes are."""
    lines = (line for line in d.lines if not line.startswith(f"{name} = "))
    return any(re.search(rf"(?<!other\()\b{name}\b(?!\.old)", line) for line in lines)


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
        return convolution(d)
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
        return matmul(d)
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
        return gemm(d)
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
    d.ids = False  # a mask made of them lies as the rows did
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
    *([matmul] * 4 + [gemm] * 4 + [left] * 3 + [stack] * 2 + [_plain] * 5 + [_cut] * 2),
    *([einsum] * 3 + [convolution] * 3 + [recurrent] * 2 + [_branch] * 2 + [_loop] * 2),
    *(_scan, _function, _fused, _fused, _half, _lookup, _lookup, _attend, _tie, _tie, _reader),
    *(_reader, _computed, _part, _overlap, vector, _norm, _regroup, _quantised, _empty),
    *(views, views, slots, chosen, ends, narrow, nested),
)
IMAGE: tuple[Block, ...] = (*([convolution] * 5 + [_plain] * 3), _norm, _fused)
