"""Blocks of a drawn graph that multiply by a weight: every form of every op of the table."""

# ruff: noqa: E501  # lines of drawn text are not folded

from __future__ import annotations

from tests.fuzz.graph_draft import Draft


def matmul(d: Draft) -> None:
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.node('MatMul', [h, {w}])")
    if d.chance(0.5):
        d.say(f"h = g.add(h, g.const(np.linspace(-1, 1, {out}), 'float32'))")
    d.width = out


def left(d: Draft) -> None:
    out = d.out()
    if d.kind == "seq" and d.steps and d.chance(0.4):  # over the steps
        w = d.matrix(d.steps, d.steps, stored_in_out=False)
        d.say(f"h = g.node('MatMul', [{w}, h])")
        return
    w = d.matrix(d.width, out, stored_in_out=False)
    perm = "0, 2, 1" if d.kind == "seq" else "1, 0"
    d.say(f"h = g.turn(g.node('MatMul', [{w}, g.turn(h, {perm})]), {perm})")
    d.width = out


def stack(d: Draft) -> None:
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


def views(d: Draft) -> None:
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
    elif way == 6 and (i == o or (i % o and o % i)):  # not in the order of any axes
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


def slots(d: Draft) -> None:
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


def chosen(d: Draft) -> None:
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


def ends(d: Draft) -> None:
    """A product that is an output, and is read on."""
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.node('MatMul', [h, {w}])", "g.output(h)")
    d.width = out


def narrow(d: Draft) -> None:
    """A weight in float32 and a product in float16."""
    out = d.out()
    w = d.matrix(d.width, out)
    d.say(f"h = g.cast(g.node('MatMul', [g.cast(h, 'float16'), g.cast({w}, 'float16')]), 'float32')",
          "g.gate.append(1e-2)")  # fmt: skip
    d.width = out


def nested(d: Draft) -> None:
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


def vector(d: Draft) -> None:
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


def gemm(d: Draft) -> None:
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


def convolution(d: Draft) -> None:
    if d.kind == "flat":
        return matmul(d)
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


def einsum(d: Draft) -> None:
    if d.opset < 12:
        return matmul(d)
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


def recurrent(d: Draft) -> None:
    if d.kind != "seq":
        return gemm(d)
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
