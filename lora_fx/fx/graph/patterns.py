"""Shapes of graphs that passes look for: attention, GELU, chains of elementwise operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Argument, map_aggregate

from lora_fx.fx.graph.flow import SHAPE_ONLY
from lora_fx.fx.graph.nodes import (
    MARK,
    argument,
    aten_ops,
    dtype_of,
    is_marked,
    make_marked,
    numel,
    op_name,
    overloads,
    reached,
    shape_of,
    value,
)
from lora_fx.fx.trees import tree_leaves

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
MASK, CAUSAL, SHARED = "attn_mask", "is_causal", "enable_gqa"
END = 9223372036854775807


def give(node: fx.Node, **changes: object) -> None:
    """Set arguments by their names in the op's schema; those after query, key, value by keyword."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    now = {a.name: argument(node, a.name) for a in schema} | changes
    defaults = {a.name: a.default_value for a in schema[3:] if a.has_default_value()}
    node.args = tuple(now.pop(a.name) for a in schema[:3])
    node.kwargs = {k: v for k, v in now.items() if v is not None and v != defaults.get(k)}


def plain_mask(node: fx.Node, form_of: Callable[[fx.Node], str]) -> bool:
    """Replace a mask that is causal, or lets everything through, at every size; say if it was."""
    mask = argument(node, MASK)
    if not isinstance(mask, fx.Node) or argument(node, CAUSAL, False) or not form_of(mask):
        return False
    give(node, attn_mask=None, is_causal=form_of(mask) == "causal")
    return True


def shared_heads(node: fx.Node) -> bool:
    """Let key and value heads be shared by the op where the graph repeats them; say if it did."""
    if argument(node, SHARED, False):
        return False
    key, value = _repeated(argument(node, "key")), _repeated(argument(node, "value"))
    if key is None or value is None or key[1] != value[1]:
        return False
    times = key[1]
    give(node, key=key[0], value=value[0], enable_gqa=times > 1)
    return True


def _repeated(node: Any) -> tuple[fx.Node, int] | None:
    """(k [n, heads, length, width], times) of what repeats each head of k `times` over.

    That is k.unsqueeze(2).expand(n, heads, times, length, width).reshape(n, heads·times, …), and
    k.repeat_interleave(times, 1).
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.repeat_interleave.self_int:
        k, times = argument(node, "self"), argument(node, "repeats")
        by_head = len(_sizes(k)) == 4 and argument(node, "dim") in (1, -3)
        return (k, times) if by_head and isinstance(times, int) else None
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    wide = whole(node.args[0])
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return None
    stretched = whole(wide.args[0])
    if not isinstance(stretched, fx.Node) or stretched.target is not aten.unsqueeze.default:
        return None
    k = whole(stretched.args[0])
    before, between, after = (_sizes(n) for n in (k, wide, node))
    if len(before) != 4 or len(between) != 5 or argument(stretched, "dim") not in (2, -3):
        return None
    times, heads = between[2], before[1]
    if not times.isdigit() or not heads.isdigit():
        return None
    n, _, length, width = before
    repeats = between == (n, heads, times, length, width)
    joins = after == (n, str(int(heads) * int(times)), length, width)
    return (k, int(times)) if repeats and joins else None


def _sizes(node: object) -> tuple[str, ...]:
    return tuple(str(s) for s in shape_of(node) or ())


def whole(node: Any) -> Any:
    """What a node is a slice of, where the slice is all of it."""
    while isinstance(node, fx.Node) and is_whole(node):
        node = node.args[0]
    return node


def is_whole(node: fx.Node) -> bool:
    """True for a slice from 0 to the end in steps of 1."""
    if node.target is not aten.slice.Tensor:
        return False
    start, step, end = (argument(node, k) for k in ("start", "step", "end"))
    return start in (None, 0) and step == 1 and (end is None or end == END)


# Masks, recognised by what they let through.
#
# A mask that is made of sizes and constants alone runs at small sizes, and at such as are larger
# than all numbers in it together. The ops that may make one give whole numbers, truths and what
# removes scores, all exactly, and none of them multiplies: beyond, the mask goes on as it began.


MASKING = {
    *overloads(None, "arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full"),
    *overloads(None, "add", "sub", "diff", "cumsum", "where", "masked_fill"),
    *overloads(None, "le", "lt", "ge", "gt", "eq", "ne"),
    *overloads(None, "bitwise_and", "logical_and", "__and__", "bitwise_not", "logical_not"),
    *overloads(None, "tril", "triu", "to", "_to_copy", "clone", "alias"),
    *overloads(None, "expand", "unsqueeze", "transpose", "slice", "index"),
}
LOWEST = -1e30
"""What adds at most this to a score removes it: −∞, and the lowest of float32 and bfloat16."""
LARGEST = 2500
"""A mask with larger numbers in it, such as a long window, stays as it is."""


def mask_form(mask: fx.Node, written: Collection[fx.Node]) -> str:
    """What a mask is: causal (j ≤ i, for a query i and a key j), open, or empty for anything else.

    Args:
        mask: Truths, or what is added to scores.
        written: Nodes that some op changes in place.
    """
    nodes = set(reached([mask], _operands))
    made = [n for n in mask.graph.nodes if n in nodes]
    if any(not _is_given(n) and (n.target not in MASKING or n in written) for n in made):
        return ""
    sizes = [value(n).node.expr for n in made if isinstance(value(n), torch.SymInt)]
    ends = [n.node.expr for n in (shape_of(mask) or ())[-2:] if isinstance(n, torch.SymInt)]
    lengths = {s for end in ends for s in end.free_symbols}
    most = _largest(made)
    if lengths and most > LARGEST:
        return ""
    # where queries and keys have fixed lengths, each of their places is looked at
    tries = [(2, 2), (3, 2), (5, 3), *([(most + 3, 2), (5, most + 3)] if lengths else [])]
    symbols = sorted({s for size in sizes for s in size.free_symbols}, key=str)
    forms = set[str]()
    for length, other in tries:
        at = {s: i + (length if s in lengths else other) for i, s in enumerate(symbols)}
        try:
            forms.add(_form_at(made, at))
        except (RuntimeError, IndexError, ValueError):  # sizes that the ops do not take
            return ""
    # along an axis of size 1 a mask is the same for all queries, or for all keys
    if forms == {"causal"} and "1" not in _sizes(mask)[-2:]:
        return "causal"
    return "open" if forms == {"open"} else ""


def _largest(made: Sequence[fx.Node]) -> int:
    """How far the last of some nodes may look: all numbers behind it, as often as they are read."""
    reach: dict[fx.Node, int] = {}
    for node in made:
        number = value(node)
        leaves = tree_leaves((node.args, node.kwargs))
        if isinstance(number, torch.SymInt):
            leaves = [int(a) for a in number.node.expr.atoms() if a.is_Integer]
        numbers = (a for a in leaves if isinstance(a, (int, float)) and a != END and a > LOWEST)
        reach[node] = sum(
            min(math.ceil(abs(a)), LARGEST + 1) if a < math.inf else 0 for a in numbers
        )
        reach[node] += sum(reach.get(n, 0) for n in leaves if isinstance(n, fx.Node))
    return reach[made[-1]]


def _is_given(node: fx.Node) -> bool:
    """Whether a node is a size, or the device of an input."""
    return isinstance(value(node), (torch.SymInt, int)) or node.target is getattr


def _operands(node: fx.Node) -> list[fx.Node]:
    """What decides the numbers that a node makes; not a tensor of which the dtype alone is read."""
    if _is_given(node):
        return []
    place = SHAPE_ONLY.get(op_name(node))
    like = node.args[place : place + 1] if place is not None else ()
    return [n for n in node.all_input_nodes if n not in like]


def _form_at(made: Sequence[fx.Node], sizes: Mapping[object, int]) -> str:
    """The form of the last of some nodes, run at sizes by their symbols; empty for any other."""
    values: dict[fx.Node, Argument] = {}

    def read(x: Any) -> Argument:
        if isinstance(x, torch.device):
            return torch.device("cpu")  # that of the capture may be meta, or of another machine
        if isinstance(x, fx.Node) and x not in values:
            return torch.empty(0, dtype=dtype_of(x))
        return values[x] if isinstance(x, fx.Node) else x

    mask = torch.ones(())
    for node in made:
        if node.target is getattr:
            values[node] = torch.device("cpu")
        elif isinstance(number := value(node), torch.SymInt):
            values[node] = int(number.node.expr.xreplace(sizes))
        elif isinstance(number, int):
            values[node] = number
        else:
            args, kwargs = map_aggregate((node.args, node.kwargs), read)
            values[node] = mask = node.target(*args, **kwargs)  # type: ignore[operator]
            adds = mask.is_floating_point() and bool(((mask == 0) | (mask <= LOWEST)).all())
            truths = bool(((mask == 0) | (mask == 1)).all())
            if not (adds or truths or mask.dtype in (torch.int32, torch.int64)):
                return ""  # numbers that a float may round
    if mask.dtype != torch.bool and not adds:
        return ""
    truth = mask if mask.dtype == torch.bool else mask == 0
    causal = truth.dim() > 1 and torch.equal(truth, torch.ones_like(truth).tril())
    return "open" if bool(truth.all()) else "causal" if causal else ""


# GELU written out in elementwise steps, recognised by what it computes.
#
# Such a chain is x/2·(1 + F(r(x))), r = x/√2 for F = erf, and r = √(2/π)·(x + .044715·x³) for tanh
# (Hendrycks and Gimpel, arXiv 1606.08415), its factors in any order. It runs on numbers, and what
# comes out is compared.


STEPS = aten_ops(
    "add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar "
    "pow.Tensor_Scalar square tanh erf"
)
FUNCTIONS = aten_ops("tanh erf")
POINTS = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
"""Numbers on both sides of 0, up to where GELU is x, or 0."""
GELUS = {kind: F.gelu(POINTS, approximate=kind) for kind in ("none", "tanh")}
CLOSE = 1e-7
"""Constants of one formula are written with eight digits or more."""
LONGEST = 26
"""More nodes than any such chain has."""


def gelu_of(node: fx.Node, written: Collection[fx.Node]) -> tuple[fx.Node, str] | None:
    """(x, approximate) where a node is the GELU of x in several steps; None where it is not.

    Args:
        node: A product or a sum.
        written: Nodes that some op changes in place.
    """
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor):
        return None
    walk = reached([node], lambda n: n.all_input_nodes if n.target in STEPS else [])
    near = list(islice(walk, 1, LONGEST))
    for x in near if any(n.target in FUNCTIONS for n in near) else ():
        made = _computed(node, x, written)
        for approximate, wanted in GELUS.items():
            if isinstance(made, torch.Tensor) and torch.allclose(made, wanted, CLOSE, CLOSE):
                return x, approximate
    return None


def _computed(
    node: object, x: fx.Node, written: Collection[fx.Node]
) -> torch.Tensor | float | None:
    """What a chain makes of POINTS in the place of x; None where it reads anything else."""
    if node is x:
        return POINTS
    if isinstance(node, (int, float)):
        return node
    if not isinstance(node, fx.Node) or node.target not in STEPS or node in written:
        return None
    if dtype_of(node) != dtype_of(x) or node.kwargs:
        return None
    parts = [_computed(a, x, written) for a in node.args]
    return None if any(p is None for p in parts) else node.target(*parts)  # type: ignore[operator]


# Chains of elementwise steps: which cheap steps make a value, from what, and what autograd keeps.
#
# A chain is a norm, an activation, a gate, with the casts and views around it. Running it again
# costs a pass over memory, which is little beside a matrix product; keeping its result and what its
# steps keep costs bytes.

VIEWS = aten_ops("view reshape _unsafe_view flatten.using_ints unflatten.int")
CASTS = aten_ops("to.dtype _to_copy type_as")
NOTHING = aten_ops("mean.dim neg mul.Scalar add.Scalar sub.Scalar")
SUMS = aten_ops("add.Tensor sub.Tensor")
INPUT = aten_ops(
    "layer_norm rms_norm group_norm pow.Tensor_Scalar square "
    "gelu silu mish softplus hardswish leaky_relu elu"
)
OUTPUT = aten_ops("relu rsqrt sqrt reciprocal tanh sigmoid exp")
PRODUCTS = aten_ops("mul.Tensor div.Tensor")
CHEAP = VIEWS | CASTS | NOTHING | SUMS | INPUT | OUTPUT | PRODUCTS
"""Sets are by what the op keeps for its backward: nothing, its input, its output, the factors."""


@dataclass(frozen=True)
class Chain:
    """Steps that make a value, in the order of the graph.

    Attributes:
        steps: The nodes; the value is the last.
        given: What they read: tensors, parameters and sizes.
        gain: Bytes at the example's sizes that are not kept when the chain runs again, less those
            of what it is given.
    """

    steps: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    gain: int


def chain_of(
    x: fx.Node, differentiable: Mapping[fx.Node, bool], written: Collection[fx.Node]
) -> Chain | None:
    """The steps to run again for x; None where that gains nothing.

    Args:
        x: The value.
        differentiable: Nodes through which a gradient can flow.
        written: Nodes that some op changes in place.
    """
    walks = (_walk(x, differentiable, written, sums) for sums in (False, True))
    best = max(filter(None, walks), key=lambda chain: chain.gain, default=None)
    return best if best is not None and 4 * best.gain >= nbytes(x) else None


def _walk(
    x: fx.Node, differentiable: Mapping[fx.Node, bool], written: Collection[fx.Node], sums: bool
) -> Chain | None:
    """The chain of every cheap node whose users are all among the steps."""
    steps: dict[fx.Node, None] = {}
    # what x is a view of: others may read it too
    trail = set(reached([x], lambda n: n.all_input_nodes[:1] if n.target in VIEWS else []))
    todo, node = {x}, x
    while todo:
        if node in todo:
            todo.remove(node)
            inside = all(u in steps for u in node.users)
            if (inside or node in trail) and _cheap(node, x, written, sums):
                steps[node] = None
                todo |= {i for i in node.all_input_nodes if i.target in CHEAP}
        node = node.prev
    order = list(reversed(steps))
    given = dict.fromkeys(i for n in order for i in n.all_input_nodes if i not in steps)
    views = all(n.target in VIEWS | CASTS for n in order)
    if x not in steps or views or any(g in written for g in given):
        return None
    held = {stored(x), *(stored(n) for step in order for n in keeps(step, differentiable))}
    kept = {n for n in held if n.op != "get_attr"}
    reads = {stored(g) for g in given if g.op != "get_attr"}
    gain = sum(map(nbytes, kept - reads)) - sum(map(nbytes, reads - kept))
    return Chain(tuple(order), tuple(given), gain)


def _cheap(node: fx.Node, x: fx.Node, written: Collection[fx.Node], sums: bool) -> bool:
    if node.op != "call_function" or node.target not in CHEAP or is_marked(node):
        return False
    if node in written or not isinstance(value(node), torch.Tensor):
        return False
    if node.target in SUMS and not sums:
        data = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        return sum(2 * nbytes(a) > nbytes(x) for a in data) < 2
    return True


def keeps(node: fx.Node, differentiable: Mapping[fx.Node, bool]) -> list[fx.Node]:
    """What autograd keeps of a cheap node's operands and result."""
    if not differentiable.get(node):
        return []
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target in INPUT:
        return operands[:1]
    if node.target in OUTPUT:
        return [node]
    if node.target in PRODUCTS and len(operands) == 2:
        first, second = operands
        return [a for a, b in ((first, second), (second, first)) if differentiable.get(b)]
    return []


def stored(node: fx.Node) -> fx.Node:
    """The node whose memory a value lies in, through views and casts to its own dtype."""
    source = node.args[0] if node.args else None
    if node.op == "call_function" and isinstance(source, fx.Node):
        same = node.target in CASTS and dtype_of(node) == dtype_of(source)
        if same or node.target in VIEWS:
            return stored(source)
    return node


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensor at the example's sizes; 0 for anything else."""
    v = value(node)
    return numel(tuple(v.shape)) * v.element_size() if isinstance(v, torch.Tensor) else 0


def differentiable_nodes(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, bool]:
    """Which values a gradient may flow through: inputs, what is trained, and what depends on them.

    Args:
        graph: Nodes with the values that the capture saw.
        root: Holds the tensors.
    """
    found: dict[fx.Node, bool] = {}
    named = root.named_parameters(remove_duplicate=False)
    trained = {n for n, p in named if p.requires_grad}
    for node in graph.nodes:
        v = value(node)
        if isinstance(v, torch.Tensor) and not v.is_floating_point():
            found[node] = False
        elif node.op == "placeholder":
            found[node] = isinstance(v, torch.Tensor)
        elif node.op == "get_attr":
            found[node] = str(node.target) in trained
        else:
            found[node] = any(found.get(i, False) for i in node.all_input_nodes)
    return found


@dataclass(frozen=True)
class Projection:
    """One product x·aᵀ: `node` = matmul(x, permute(type_as(a, x))), a the get_attr of [rank, in].

    Several a's stand below each other where `share` has joined their products.
    """

    node: fx.Node
    x: fx.Node
    factors: tuple[fx.Node, ...]


def projections(graph: fx.Graph) -> Iterator[Projection]:
    """Every product of an activation with factors of branches, in the order of the graph."""
    for node in graph.nodes:
        x, turned = operands(node, aten.matmul.default) or (None, None)
        cast, perm = operands(turned, aten.permute.default) or (None, None)
        a, like = operands(cast, aten.type_as.default) or (None, None)
        if perm != [1, 0] or like is not x:
            continue
        held = tuple((operands(a, aten.cat.default) or [[a]])[0])
        if all(isinstance(n, fx.Node) and n.op == "get_attr" for n in held):
            yield Projection(node, x, held)


def operands(node: object, target: object) -> tuple[Any, ...]:
    """The arguments of a branch's node where it is this op and has no keywords; else nothing."""
    if not isinstance(node, fx.Node) or node.target is not target or not is_marked(node):
        return ()
    return tuple(node.args) if not node.kwargs else ()


def maker(before: fx.Node, branch: fx.Node) -> Callable[..., fx.Node]:
    """What makes nodes before one of a graph, in its module and with the mark of a branch.

    It takes an op or function, args and kwargs, or the name of a tensor alone: see make_marked.
    """
    return partial(make_marked, before, before, branch.meta["custom"][MARK]["site"])
