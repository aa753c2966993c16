"""recompute: the norm or the activation that feeds branches runs again in backward.

x = f(v), tᵢ = x·aᵢᵀ        becomes        (x, t₁ …) = recomputed(a₁ …; v)

with the same numbers, in forward and in backward. Autograd kept x for ∂L/∂aᵢ, and what the steps of
f keep; the region keeps v only, and a frozen layer that reads x keeps nothing of it. What f is, and
whether keeping v is less, is read from the graph: see lora_fx.fx.graph.elementwise_chains. Left
alone: values that are no such chain, whose chain keeps as little already (a ReLU), that an op
changes in place, whose branch has a dropout of its own, and branches in another block than their
input.

A weight that is made from codes, y = op(x, view(dequantise(codes))), is made again in backward too,
and so are the matrices of a stack that data picks, a copy for each row, y = op(x, w[ids]):

    y = op(x, w)        becomes        y = reread(codes; x)

These passes are torch's own: what is kept for backward is no property of other IRs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import getitem
from typing import Any

import torch
from torch import fx

from lora_fx.fx.func_transforms import transforms_are_active
from lora_fx.fx.graph.branch_nodes import Projection, maker, projections
from lora_fx.fx.graph.elementwise_chains import VIEWS, Chain, chain_of, differentiable_nodes
from lora_fx.fx.graph.flow import FxWeight
from lora_fx.fx.graph.graph import FxGraph, replaced
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import block_of, is_marked, reached, shape_of
from lora_fx.fx.graph.ops import Path, pick, row_of, slots
from lora_fx.fx.module.codegen import function
from lora_fx.passes.base import PassResult
from lora_fx.text import by_key

aten = torch.ops.aten


@dataclass(frozen=True)
class Recompute:
    """Let regions keep their inputs only.

    Attributes:
        blocks: Paths of modules that will be functions of their own; a region stays in one.
    """

    blocks: Sequence[str] = ()

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds the regions made and leaves them alone."""
        found = projections(graph.graph)
        groups = by_key(((p.x, block_of(p.node, self.blocks)), p) for p in found)
        flows = differentiable_nodes(graph.graph, graph.root) if groups else {}
        changed, modified = Writes(graph.graph).ever(), False
        for (x, block), group in groups.items():
            if x not in flows:
                continue  # another region makes it
            if block_of(x, self.blocks) != block:
                continue  # a block's tensors may be gathered for its own forward only
            chain = chain_of(x, flows, changed)
            if chain is not None:
                modified |= _replace(x, chain, group, flows)
        return PassResult(graph, modified)


@dataclass(frozen=True)
class RecomputeWeights:
    """Let products keep codes, or a stack and ids, which are there anyway, and no copied weight."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no product that reads such a weight."""
        weights = graph.flow().weights.items()
        made = [n for n, w in weights if _copied(w) and not is_marked(n)]
        chains = dict.fromkeys(n for n in made if n.op == "call_function")
        modified = False
        for node in dict.fromkeys(u for n in chains for u in n.users if u not in chains):
            row = row_of(node)
            if row is None or row.op.startswith("embedding"):
                continue
            paths = [p for i in node.all_input_nodes if i in chains for p in slots(node, i)]
            if paths:
                _reread(node, paths, chains)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
            graph.changed()
        return PassResult(graph, modified)


def _copied(weight: FxWeight) -> bool:
    """True for what is made from codes, and for the matrices that data picks from a stack."""
    return bool(weight.format) or (weight.view.picked is not None and not weight.edited)


def _reread(node: fx.Node, paths: Sequence[Path], chains: Container[fx.Node]) -> None:
    """Let one call make a product and its weights."""
    weights = [pick(node, p) for p in paths]
    steps = [n for n in reached(weights, lambda n: n.all_input_nodes if n in chains else [])]
    given = [n for n in steps if n not in chains]
    made = sorted(n for n in steps if n in chains)
    make = _code(given, made, weights, f"codes of {node.name}")
    with node.graph.inserting_before(node):
        rest = node.args
        for path in paths:
            rest = replaced(rest, path, None)
        args = (tuple(given), rest, dict(node.kwargs))
        new = node.graph.call_function(rereading(make, node.target, paths), args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _replace(
    x: fx.Node, chain: Chain, group: Sequence[Projection], flows: dict[fx.Node, bool]
) -> bool:
    """Let one call make x and the products of its branches; `flows` follows what is there."""
    inside = set(chain.steps)
    outer = {n: [u for u in n.users if u not in inside] for n in chain.steps if n is not x}
    if any(u < x for users in outer.values() for u in users):
        return False  # read before x is made: the call would come too late
    made = [x, *(n for n, users in outer.items() if users)]
    emit = maker(x, group[0].node)
    factors = [tuple(emit(str(a.target)) for a in p.factors) for p in group]
    code = _code(chain.reads, chain.steps, made, f"recomputed {x.name}")
    formula = gelu_tanh if made == [x] and _is_gelu_tanh(chain) else None
    call = emit(region(code, formula), (factors, *chain.reads))
    flows[call] = True
    idle = [*(n for p in group for n in _reads(p)), *chain.steps]
    for i, old in enumerate([*made, *(p.node for p in group)]):
        new = emit(getitem, (call, i))
        if "val" in old.meta:
            new.meta["val"] = old.meta["val"]
        flows[new] = flows.get(old, True)
        old.replace_all_uses_with(new)
    for node in reversed(idle):
        if not node.users:
            node.graph.erase_node(node)
            flows.pop(node, None)
    return True


def _reads(p: Projection) -> list[fx.Node]:
    """A product and what was made for it alone, inputs first."""
    nodes: list[fx.Node] = [p.node]
    while nodes[-1].op != "get_attr":
        nodes.append(next(i for i in reversed(nodes[-1].all_input_nodes) if i is not p.x))
    return [*p.factors, *reversed(nodes[:-1])]


def _is_gelu_tanh(chain: Chain) -> bool:
    """True where all that is done to the first value is GELU by its tanh formula."""
    done = [(n.target, n.kwargs) for n in chain.steps if n.target not in VIEWS]
    same = str(shape_of(chain.reads[0])) == str(shape_of(chain.steps[-1]))  # asks no symbol
    return same and done == [(aten.gelu.default, {"approximate": "tanh"})]


def _code(
    given: Sequence[fx.Node], steps: Sequence[fx.Node], made: Sequence[fx.Node], name: str
) -> Code:
    """Some steps of a graph as one function: what they are given → what they make."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in given}
    for node in steps:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in made))
    return partial(function(graph, name), None)


# A region of a train program that keeps its inputs only, and runs again in backward.
#
# The region is the norm or the activation f that feeds a group of branches, together with their
# first products: (x, t₁ …) = (f(v…), f(v…)·a₁ᵀ …). Autograd would keep x for every ∂L/∂a, and what
# f's own steps keep; the region keeps v. Backward runs f again and has
#
#     ∂L/∂aᵢ = (∂L/∂tᵢ)ᵀ x        ∂L/∂x += ∂L/∂tᵢ · aᵢ        ∂L/∂v by autograd through f.
#
# A frozen layer that reads x keeps its weight and nothing of x.


Code = Callable[..., tuple[torch.Tensor, ...]]
Factors = tuple[tuple[torch.Tensor, ...], ...]


def region(code: Code, formula: Code | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of (factors, *values) for a program.

    Args:
        code: f: values → (x, …), pure, without random numbers.
        formula: Where x is made of the first value v alone, in its shape: v → (x,), and
            (v, ∂L/∂x) → (x, ∂L/∂v).

    Returns:
        (factors, *values) → (x, …, t₁ …). `factors` holds one tuple for each product: the a's
        [rank, in] that stand below each other in it, in any floating dtype.
    """

    def recomputed(factors: Factors, *values: Any) -> tuple[torch.Tensor, ...]:
        if _plainly():
            made = code(*values)
            return (*made, *(product(made[0], group) for group in factors))
        counts = tuple(len(group) for group in factors)
        flat = [a for group in factors for a in group]
        result: tuple[torch.Tensor, ...] = _Recomputed.apply(code, formula, counts, *flat, *values)  # type: ignore[no-untyped-call]
        return result

    return recomputed


def rereading(make: Code, op: Any, paths: Sequence[Path]) -> Callable[..., torch.Tensor]:
    """An op whose weights are made from codes, or picked, in forward and again in backward.

    Args:
        make: Codes, scales and zeros, or a stack and ids → the weights as the op reads them.
        op: The op.
        paths: Where among its arguments the weights stand.

    Returns:
        (what make takes, arguments, keyword arguments) → what the op gives. Of a weight autograd
        keeps a few numbers: where in it the tensor lay that the op's backward wants.
    """

    def reread(given: Sequence[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        weights = make(*given)
        for path, weight in zip(paths, weights, strict=True):
            args = replaced(args, path, weight)
        if _plainly():
            return op(*args, **kwargs)
        own = {w.untyped_storage().data_ptr(): i for i, w in enumerate(weights)}

        def pack(t: torch.Tensor) -> object:
            i = own.get(t.untyped_storage().data_ptr())
            return t if i is None else (i, t.size(), t.stride(), t.storage_offset())

        def unpack(kept: Any) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            i, *place = kept
            again: torch.Tensor = make(*given)[i].as_strided(*place)
            return again

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return op(*args, **kwargs)

    return reread


def _plainly() -> bool:
    """True where nothing is kept, or where another tracer decides what is.

    Compilers choose what to recompute by themselves; torch.func has transforms of its own.
    """
    return not torch.is_grad_enabled() or traced()


def traced() -> bool:
    """True while a compiler or a transform of torch.func sees what is run."""
    return torch.compiler.is_compiling() or transforms_are_active()


def stacked(group: Sequence[torch.Tensor]) -> torch.Tensor:
    """The a's of one product as one matrix [ranks, in]."""
    return group[0] if len(group) == 1 else torch.cat(list(group))


def product(x: torch.Tensor, group: Sequence[torch.Tensor]) -> torch.Tensor:
    """X·aᵀ in the dtype of x: [..., in] → [..., ranks]."""
    return torch.matmul(x, stacked(group).type_as(x).t())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, code: Code, formula: Code | None, counts: tuple[int, ...], *values: Any
    ) -> Any:
        n = sum(counts)
        made = code(*values[n:]) if formula is None else formula(values[n])
        groups = _groups(values[:n], counts)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(v, torch.Tensor) else (v,) for v in values]
        ctx.code, ctx.formula, ctx.counts = code, formula, counts
        ctx.autocast, ctx.dtype = _autocast(made[0].device.type), made[0].dtype
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[3 + n :]):
            ctx.mark_non_differentiable(*made)
        return (*made, *(product(made[0], group) for group in groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if o is None else o[0] for o in ctx.others]
        n, twice = sum(ctx.counts), torch.is_grad_enabled()
        needs, groups = ctx.needs_input_grad[3:], _groups(values[:n], ctx.counts)
        first = len(grads) - len(groups)
        into, dts = list(grads[:first]), grads[first:]
        for group, dt in zip(groups, dts, strict=True):
            if dt is not None and any(needs[n:]):
                into[0] = _sum(into[0], dt, stacked(group).to(dt.dtype), ctx.dtype)
        if ctx.formula is not None and into[0] is not None and not twice:
            x, dv = ctx.formula(values[n], into[0])
            through = [dv, *[None] * len(values[n + 1 :])]
        else:
            given = [
                v.detach().requires_grad_(need) if isinstance(v, torch.Tensor) and not twice else v
                for v, need in zip(values[n:], needs[n:], strict=True)
            ]
            with torch.enable_grad(), _again(ctx.autocast):
                made = ctx.code(*given)
            x = made[0] if twice else made[0].detach()
            through = _through(made, into, given, needs[n:], twice)
        found: list[torch.Tensor | None] = []
        for group, dt in zip(groups, dts, strict=True):
            if dt is None or not any(needs[:n]):
                found += [None] * len(group)
                continue
            rows = x.to(dt.dtype).reshape(-1, x.shape[-1])
            da = torch.matmul(dt.reshape(-1, dt.shape[-1]).t(), rows)
            parts = torch.split(da, [len(a) for a in group])
            found += [p.to(a.dtype) for p, a in zip(parts, group, strict=True)]
        return (None, None, None, *found, *through)


def _sum(
    dx: torch.Tensor | None, dt: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """∂L/∂t·a and what is there of ∂L/∂x already: in one op where the dtypes allow it."""
    if dx is None or dx.dtype != dt.dtype:
        part = torch.matmul(dt, a).to(dtype)
        return part if dx is None else dx + part
    have, more = (v.reshape(-1, v.shape[-1]) for v in (dx, dt))
    return torch.addmm(have, more, a).view_as(dx)


def _through(
    made: Sequence[torch.Tensor],
    into: Sequence[torch.Tensor | None],
    given: Sequence[Any],
    needs: Sequence[bool],
    twice: bool,
) -> list[torch.Tensor | None]:
    """Gradients of what f was given, from those of what it made."""
    ends = [(y, g) for y, g in zip(made, into, strict=True) if g is not None and y.requires_grad]
    wanted = [v for v, need in zip(given, needs, strict=True) if need]
    if not ends or not wanted:
        return [None] * len(given)
    outputs, gradients = zip(*ends, strict=True)
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, create_graph=twice)
    got = iter(found)
    return [next(got) if need else None for need in needs]


def _groups(flat: Sequence[torch.Tensor], counts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    rest = iter(flat)
    return [tuple(islice(rest, count)) for count in counts]


def _autocast(device: str) -> tuple[str, bool, torch.dtype | None]:
    """What autocast does on a device now."""
    if not torch.amp.is_autocast_available(device):
        return device, False, None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _again(state: tuple[str, bool, torch.dtype | None]) -> AbstractContextManager[object]:
    """Autocast as it was in forward; backward has none of its own."""
    device, enabled, dtype = state
    if _autocast(device) == state or dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=enabled)


# GELU's tanh formula on the CPU, ½·x·(1 + tanh(z/2)) = x·σ(z) with z = √(8/π)·(x + .044715·x³).
#
# Torch's own takes 1.3 ns a number in forward and again in backward, most of it for the tanh. σ
# takes a fifth of that, and x·σ(z) half; the slope, σ(z) + x·z'·σ(z)·(1 − σ(z)) with
# x·z' = 3·z − 2·√(8/π)·x, needs no σ of its own where both are computed together.


ROOT = math.sqrt(8 / math.pi)
PIECE = 1 << 17
"""Numbers at a time for each thread: what is between the steps stays in a cache."""


def gelu_tanh(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """X → (GELU of x,) and (x, ∂L/∂y) → (y, ∂L/∂x), computed in 32 bits and rounded once."""
    x = given[0]
    if x.device.type != "cpu" or x.dtype == torch.float64 or type(x) is not torch.Tensor:
        slopes = (aten.gelu_backward.default(g, x, approximate="tanh") for g in given[1:])
        return (aten.gelu.default(x, approximate="tanh"), *slopes)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in given]
    size, first = PIECE * torch.get_num_threads(), torch.tensor(ROOT)
    rows = (
        zip(*(torch.split(t.reshape(-1), size) for t in ts), strict=True) for ts in (given, made)
    )
    for (part, *dy), (y, *dx) in zip(*rows, strict=True):
        v = part.float()
        # σ is 0 or 1 long before; where x³ overflows, ∞·0 would be no slope
        z = torch.addcmul(first, v, v, value=0.044715 * ROOT).mul_(v).clamp_(-1e4, 1e4)
        s = torch.sigmoid(z)
        y.copy_(v * s)
        for g, to in zip(dy, dx, strict=True):
            z.sub_(v, alpha=2 / 3 * ROOT)
            s.add_(aten.sigmoid_backward.grad_input(z, s, grad_input=z), alpha=3)
            to.copy_(s.mul_(g.float()))
    return tuple(made)
