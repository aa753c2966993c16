"""Every use of a weight in a graph: the op table met with the data flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import isqrt
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.flow import SHAPE_ONLY, SPLITS, VIEWS, FxFlow, FxWeight, Namer, weight_flow
from lora_fx.fx.graph.nodes import (
    NO_GRAD,
    argument,
    aten_ops,
    hint,
    is_marked,
    numel,
    op_name,
    plain,
    reached,
    scope_of,
    shape_of,
    value,
)
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.ir.einsum import letters
from lora_fx.ir.graph import Axes, Kind, OtherReader, Site
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.quantised import no_fold
from lora_fx.ir.view import View

aten = torch.ops.aten
Bodies = Mapping[str, fx.GraphModule]
"""What higher-order ops call, by the name that a graph reads."""


FxUse = tuple[Site, fx.Node, FxWeight]
"""One use of a weight: the site, its node, and the weight as the flow has it."""


def uses(graph: fx.Graph, flow: FxFlow, bodies: Bodies) -> Iterator[FxUse]:
    """Every use, in execution order. Marked nodes are left out: they belong to branches."""
    namer = Namer()
    for node in graph.nodes:
        if node.op != "call_function" or is_marked(node):
            continue
        row = ops.row_of(node)
        given = body_uses(node, flow.weights, bodies) if row is None else row.uses(node)
        found = [(u, w) for u in given if (w := flow.weights.get(ops.pick(node, u.weight)))]
        if row is not None and not row.many and len(found) > 1:
            own = [(use, weight) for use, weight in found if weight.name]
            use, weight = found[0]  # of two weights neither is an activation
            both = replace(weight, edited=f"{op_name(node)} with another weight")
            found = own if len(own) == 1 else [(use, both)]
        if node in flow.behind and row is not None:
            continue  # a constant times a parameter: a computed weight, read later on
        for use, weight in found:
            yield _site(node, use, weight, row, namer), node, weight


def _site(
    node: fx.Node, use: ops.FxOperand, weight: FxWeight, row: ops.FxOp | None, namer: Namer
) -> Site:
    scope, cls = scope_of(node)
    refusal = use.refusal
    if weight.edited:
        refusal = f"the weight is computed by {weight.edited} from {', '.join(weight.behind)}"
    many = row is None or row.many
    axis = out_axis(use.kind)
    return Site(
        id=f"{node.name}:{'.'.join(map(str, use.weight))}" if many else node.name,
        op=op_name(node) if row is None else row.op,
        kind=use.kind,
        parameter=namer(weight),
        view=weight.view,
        operand=tuple(hint(n) for n in shape_of(ops.pick(node, use.weight)) or ()),
        scope=scope,
        module_class=cls,
        flops=site_flops(node, use),
        refusal=refusal,
        allowed=use.allowed and refusal == use.refusal,
        no_fold=no_fold(weight.format) if weight.format else "",
        no_grad=bool(node.meta.get(NO_GRAD)),
        gain=use.gain,
        behind=weight.behind,
        slot=use.weight,
        root=weight.root.name,
        parts=() if axis is None else parts_of(_result(node), axis),
        attrs=use.attrs,
    )


def _result(node: fx.Node) -> fx.Node:
    """What the rest of the graph reads: the node, or the sum with its branches."""
    for user in node.users:
        if is_marked(user) and user.target is aten.add.Tensor and user.args[0] is node:
            return _result(user)
    return node


# Weights that only the body of a higher-order op multiplies by: cond, while_loop, map.
#
# The parameter is an operand of the higher-order op, and the body says what it is for. An update
# goes to the operand, W + s·b·a, so the body does not change.


def body_uses(
    node: fx.Node, weights: Mapping[fx.Node, FxWeight], held: Bodies
) -> Iterator[ops.FxOperand]:
    """Uses of a higher-order op's operands as weights, by what its bodies do with them."""
    bodies, paths = _operands(node, held)
    for path in paths:
        operand = ops.pick(node, path)
        if not isinstance(operand, fx.Node) or operand not in weights:
            continue
        inner = [u for b in bodies for u in _inside(b, paths.index(path), len(paths), operand)]
        if inner:
            form = WeightForm("body", inner[0][0])
            yield ops.FxOperand(path, (0,), form, flops=sum(f for _, f in inner))


def _operands(node: fx.Node, held: Bodies) -> tuple[list[fx.GraphModule], list[ops.Path]]:
    """The bodies of a higher-order op, and the paths to what their placeholders stand for."""
    if not isinstance(node.target, HigherOrderOperator):
        return [], []
    reads = {i: a for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"}
    bodies = {i: held[str(a.target)] for i, a in reads.items() if str(a.target) in held}
    last = max(bodies, default=-1)
    paths: list[ops.Path] = []
    for i, arg in enumerate(node.args[last + 1 :], last + 1):
        if isinstance(arg, (tuple, list)):
            paths += [(i, j) for j in range(len(arg))]
        else:
            paths.append((i,))
    return list(bodies.values()), paths


def _inside(
    body: fx.GraphModule, i: int, count: int, operand: fx.Node
) -> Iterator[tuple[Axes, int]]:
    """The axes, in terms of the operand, and the FLOPs of each use of a body's placeholder."""
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    if len(places) != count or shape_of(places[i]) != shape_of(operand):
        return
    shape = tuple(hint(n) for n in shape_of(operand) or ())
    start = FxWeight("w", View(), shape, places[i], ("w",))
    inner = {n: m for n, m in body.named_children() if isinstance(m, fx.GraphModule)}
    flow = weight_flow(body.graph, None, {}, {places[i]: start})
    for site, _, _ in uses(body.graph, flow, inner):
        if not site.refusal:
            axes = site.kind.axes(site.operand)
            yield replace(axes, steps=site.view.steps + axes.steps), site.flops


# What reads a weight and is no site: an index, a norm, a sum, the model's output.


def slots(node: fx.Node, operand: fx.Node) -> list[ops.Path]:
    """Every path to an operand in a node's args; empty for one that only a keyword reads."""

    def inside(arg: object, path: ops.Path) -> Iterator[ops.Path]:
        if arg is operand:
            yield path
        for i, a in enumerate(arg if isinstance(arg, (tuple, list)) else ()):
            yield from inside(a, (*path, i))

    by_name = [(-1,)] if operand in node.kwargs.values() else []
    return [*inside(tuple(node.args), ()), *by_name]


def other_readers(
    graph: fx.Graph, flow: FxFlow, found: Iterable[FxUse], bodies: Bodies
) -> list[OtherReader]:
    """Every read of a parameter, or of a view of it, that is neither a view nor a site."""
    taken = {(node, site.slot) for site, node, _ in found if not site.refusal or site.allowed}
    result, live = list[OtherReader](), set[fx.Node]()
    for node in reversed(graph.nodes):
        if node.op != "output" and not (node.is_impure() or any(u in live for u in node.users)):
            continue
        live.add(node)
        here = flow.weights.get(node)
        for operand in node.all_input_nodes if not is_marked(node) else ():
            w = flow.weights.get(operand)
            if w is None or not w.name:
                continue
            if here is not None and here.name == w.name and node.args[0] is operand:
                continue  # a view
            op = "the output" if node.op == "output" else op_name(node)
            inner, paths = _operands(node, bodies)
            for path in slots(node, operand):
                if path in paths:
                    result += _in_bodies(inner, paths.index(path), w)
                elif (node, path) not in taken and path != (SHAPE_ONLY.get(op),):
                    result.append(OtherReader(w.name, op, w.view))
    return result[::-1]


def _in_bodies(bodies: Sequence[fx.GraphModule], i: int, w: FxWeight) -> Iterator[OtherReader]:
    """What reads a weight, the i-th operand of some bodies, beside the products in them."""
    for body in bodies:
        place = [n for n in body.graph.nodes if n.op == "placeholder"][i]
        flow = weight_flow(body.graph, None, {}, {place: replace(w, root=place)})
        inner = {n: m for n, m in body.named_children() if isinstance(m, fx.GraphModule)}
        yield from other_readers(body.graph, flow, uses(body.graph, flow, inner), inner)


Part = tuple[str, int, int]
"""The role of a part, and its half-open bounds along out."""
Step = tuple[fx.Node, fx.Node]
"""A node, and the one before it on the way."""

CUTS = SPLITS | aten_ops("slice.Tensor select.int narrow")
GATES = aten_ops("silu gelu relu sigmoid tanh")
LIMIT = 8
"""More parts than this are heads, or steps of a loop, and have no roles."""
LARGEST = 1 << 22
"""Results of more elements are not cut up: their parts are found on a tensor of that size."""
DATA_PRODUCTS = ops.PRODUCTS | aten_ops("baddbmm einsum")
TURNS = aten_ops("transpose.int permute t mT")
FAR = 60
"""Among so many nodes behind a part its role is looked for."""


def out_axis(kind: Kind) -> int | None:
    """The axis of a result along which the weight's out lies; None where no single one does."""
    form = getattr(kind, "form", "")
    if form:
        return -1 if form == "right" else -2
    return {"conv": 1, "grouped": -1}.get(kind.name)


def parts_of(node: fx.Node, out_axis: int) -> tuple[Part, ...]:
    """The parts of a node's result along one axis; one part where it is used as a whole."""
    shape = tuple(hint(n) for n in shape_of(node) or ())
    if len(shape) < 2 or numel(shape) > LARGEST:
        return ()
    axis = out_axis % len(shape)
    size = shape[axis]
    halves = [u for u in node.users if u.target is aten.glu.default]
    if halves and len(node.users) == 1:
        return ("up", 0, size // 2), ("gate", size // 2, size)
    views = reached([node], lambda n: filter(_views, n.users))
    if not any(n.target in CUTS for n in views):
        role = _role([(u, node) for u in node.users])
        return ((role, 0, size),) if role else ()
    # Each place along out gets its number, and the numbers go through the views that follow: what
    # arrives at a node is the region that it reads.
    marks = torch.arange(size).view([-1 if i == axis else 1 for i in range(len(shape))])
    runs: list[tuple[int, int, bool, Step]] = []
    for marked, step in _leaves(node, marks.expand(shape)):
        seen = torch.bincount(marked.reshape(-1)).nonzero()[:, 0]  # unique() sorts them all
        if not len(seen):
            continue  # the empty rest of a partial rotation
        lo, hi = int(seen[0]), int(seen[-1]) + 1
        runs.append((lo, hi, hi - lo == len(seen), step))
    bounds = {(lo, hi) for lo, hi, joined, _ in runs if joined}
    outer = [p for p in bounds if not any(q != p and _within(p, q) for q in bounds)]
    pieces: dict[tuple[int, int], list[Step]] = {p: [] for p in sorted(outer)}
    for lo, hi, _, step in runs:
        home = next((p for p in pieces if _within((lo, hi), p)), None)
        if home is None:
            return ()  # interleaved by heads: no region of the weight
        pieces[home].append(step)
    ends = [0, *(hi for _, hi in pieces)]
    if not 2 <= len(pieces) <= LIMIT or ends != [*(lo for lo, _ in pieces), size]:
        return ()
    roles = _roles(list(pieces.values()))
    return tuple((role, lo, hi) for role, (lo, hi) in zip(roles, pieces, strict=True))


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _views(node: fx.Node) -> bool:
    return node.target in VIEWS or node.target in SPLITS


def _leaves(node: fx.Node, marks: Any) -> Iterator[tuple[torch.Tensor, Step]]:
    """Every way out of a node: its marks, and the first node on it that is no view."""
    for user in node.users:
        if not _views(user):
            yield marks, (user, node)
            continue
        args, kwargs = map_arg(
            (user.args, user.kwargs), lambda n: marks if n is node else plain(value(n))
        )
        if user.target in (aten.to.dtype, aten.type_as.default, aten.dropout.default):
            made = marks
        else:
            try:
                made = user.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError):
                return
        yield from _leaves(user, made)


def _roles(pieces: Sequence[Sequence[Step]]) -> list[str]:
    """The roles of the parts of a result, each given as the steps that read it."""
    gated = [any(user.target in GATES for user, _ in steps) for steps in pieces]
    if len(pieces) == 2 and sum(gated) == 1:
        return ["gate" if g else "up" for g in gated]
    return [_role(steps) for steps in pieces]


def _role(steps: Sequence[Step]) -> str:
    """The role that attention proves of a result: that of every product which it goes into."""
    roles = {_in_attention(node, i) for node, i in _products(steps)}
    return roles.pop() if len(roles) == 1 else ""


def _products(steps: Sequence[Step]) -> Iterator[tuple[fx.Node, int]]:
    """The first products of activations behind some nodes, and which operand leads there."""
    queue, seen = list(steps), set[fx.Node]()
    while queue and len(seen) < FAR:
        node, source = queue.pop(0)
        if node.target in ops.DATA_OPS or (node.target in DATA_PRODUCTS and _is_data(node)):
            first = node.target is aten.baddbmm.default
            yield from ((node, path[-1] - first) for path in slots(node, source))
        elif node not in seen and ops.row_of(node) is None and node.op == "call_function":
            queue += [(u, node) for u in node.users]
        seen.add(node)


def _in_attention(node: fx.Node, operand: int) -> str:
    """What a product uses an operand for: softmax(q kᵀ) v, in any order of the factors."""
    if node.target in ops.DATA_OPS:
        return "qkv"[operand] if operand in (0, 1, 2) else ""
    factors = _factors(node)
    if len(factors) != 2 or operand not in (0, 1):
        return ""
    if _is_softmax(factors[1 - operand]):
        return "v"
    summed = _summed(node)
    return "" if summed is None else "qk"[summed == operand]


def _factors(node: fx.Node) -> Sequence[Any]:
    if node.target is aten.einsum.default:
        return node.args[1]  # type: ignore[return-value]
    return node.args[node.target is aten.baddbmm.default :][:2]


def _is_softmax(value: object) -> bool:
    """Whether a value is a softmax, but for masks, dropout, casts and views."""
    for _ in range(10):
        if not isinstance(value, fx.Node) or value.op != "call_function" or ops.row_of(value):
            return False
        if value.target is aten.softmax.int:
            return True
        value = value.args[0] if value.args else None
    return False


def _summed(node: fx.Node) -> int | None:
    """Which factor has the axis that a softmax of their product sums over: the keys'."""

    def onwards(at: fx.Node) -> list[fx.Node]:
        return [u for u in at.users if ops.row_of(u) is None and u.target not in TURNS]

    near = (user for at in islice(reached([node], onwards), FAR) for user in at.users)
    softmax = next((user for user in near if user.target is aten.softmax.int), None)
    if softmax is None or not any(_products([(u, softmax) for u in softmax.users])):
        return None
    axis = argument(softmax, "dim") % -len(shape_of(softmax) or (0,))
    return _owner(node, axis) if axis in (-1, -2) else None


def _owner(node: fx.Node, axis: int) -> int | None:
    if node.target is not aten.einsum.default:
        return 1 if axis == -1 else 0
    ranks = [len(shape_of(f) or ()) for f in _factors(node)]
    first, second, result = letters(str(node.args[0]).replace(" ", ""), ranks)
    mine = [result[axis] in term for term in (first, second)]
    return mine.index(True) if sum(mine) == 1 else None


def _is_data(node: fx.Node) -> bool:
    """True for a product none of whose operands is read from the model, or a view of that."""

    def stored(value: object) -> bool:
        while isinstance(value, fx.Node) and _views(value):
            value = value.args[0]
        return isinstance(value, fx.Node) and value.op == "get_attr"

    return not any(stored(f) for f in _factors(node))


def site_flops(node: fx.Node, use: ops.FxOperand) -> int:
    """FLOPs of one use: 2 · elements of the result · in.

    A recurrent weight runs once for every step and row, and lookups are free.
    """
    if use.flops is not None:
        return use.flops
    if use.kind.name == "embedding":
        return 0
    w = shape_of(ops.pick(node, use.weight)) or ()
    if use.kind.name == "recurrent":
        x = shape_of(ops.pick(node, use.x)) or ()
        return 2 * numel(w) * numel(x[:-1])
    if use.kind.name == "conv_transpose":
        return 2 * numel(shape_of(ops.pick(node, use.x)) or ()) * numel(w[1:])
    y = shape_of(node)
    if y is None:
        return 0
    axes = use.kind.axes(tuple(hint(n) for n in w))
    split = axes.steps[0].shape if axes.steps else w  # type: ignore[union-attr]
    if use.refusal and len(split) < 2:
        return 2 * numel(y)  # a vector: every element once
    return 2 * numel(y) * numel(tuple(split[i] for i in axes.in_ if i < len(split)))


def gathered(graph: fx.Graph, flow: FxFlow) -> dict[fx.Node, str]:
    """Nodes that hold what is picked from one parameter, by numbers that a run computes.

    Experts are picked so from their stack: the one float that such an op reads is the parameter.
    """
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in flow.behind or not _is_float(node):
            continue
        floats = [n for n in node.all_input_nodes if _is_float(n)]
        names = {found.get(n) or next(iter(flow.behind.get(n, ())), "") for n in floats}
        if len(names) == 1 and "" not in names:
            found[node] = names.pop()
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def data_flops(node: fx.Node) -> int:
    """FLOPs of one product of activations, 0 for anything else; an einsum has every letter's."""
    y, row = shape_of(node), ops.row_of(node)
    product = row is not None and not row.op.startswith("embedding")
    if y is None or not (product or node.target in ops.DATA_OPS):
        return 0
    if node.target in ops.DATA_OPS:
        q, k, v = (shape_of(a) or () for a in node.args[:3])
        return 2 * numel(q) * hint(k[-2]) + 2 * numel(q[:-1]) * numel(v[-2:])
    if node.target is aten.einsum.default:
        shapes = [shape_of(o) or () for o in node.args[1]]  # type: ignore[union-attr]
        terms = letters(str(node.args[0]).replace(" ", ""), [len(s) for s in shapes])
        pairs = (zip(t, s, strict=True) for t, s in zip(terms, shapes, strict=False))
        return 2 * numel(tuple({c: n for pair in pairs for c, n in pair}.values()))
    if op_name(node).startswith("conv"):
        return 2 * numel(y) * numel((shape_of(node.args[1]) or ())[1:])
    at = 1 if row is not None and row.bias == 0 else 0
    first, second = (shape_of(a) or () for a in node.args[at : at + 2])
    if op_name(node) in ("addbmm", "inner", "tensordot"):  # no axis of a stack in the result
        return 2 * numel(y) * isqrt(numel(first) * numel(second) // max(1, numel(y)))
    return 2 * numel(y) * hint(first[-1]) if first else 0
