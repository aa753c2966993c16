"""What torch holds in one node as nodes of its own: no_grad, autocast, vmap, chains of products."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, map_arg

from lora_fx.fx.graph.nodes import NO_GRAD, aten_ops, dtype_of, value

aten = torch.ops.aten
higher = torch.ops.higher_order
CHOSEN = ("aten.to.", "aten._to_copy", "aten.type_as", "aten.empty", "aten.zeros")
"""Beginnings of ops whose dtype the model chose, whatever autocast would."""
CHAINS = aten_ops("linalg_multi_dot chain_matmul")


def inline_regions(module: fx.GraphModule, *, no_grad: bool = False) -> None:
    """Replace every call of a no_grad or autocast body by the body's own nodes.

    What runs in them is the model's like everything else: its weights are targets. What the
    regions did to gradients and dtypes is written out as detach and casts.
    """
    for node in list(module.graph.nodes):
        if node.target is higher.wrap_with_set_grad_enabled:
            enabled, body, *given = node.args
            off = no_grad or not enabled
            _inline(module, node, body, given, no_grad=off, cast=None)
        elif node.target is higher.wrap_with_autocast:
            _, dtype, enabled, _, body, *given = node.args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, node, body, given, no_grad=no_grad, cast=cast)


def _inline(
    module: fx.GraphModule,
    node: fx.Node,
    body: fx.Node,
    given: list[Argument],
    *,
    no_grad: bool,
    cast: torch.dtype | None,
) -> None:
    graph, part = module.graph, operator.attrgetter(str(body.target))(module)
    inline_regions(part, no_grad=no_grad)
    env: dict[fx.Node, Argument] = {}
    arguments = iter(given)
    results: Any = ()
    with graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op == "placeholder":
                outer = next(arguments)
                env[inner] = _detached(node, outer) if no_grad else outer
            elif inner.op == "output":
                results = map_arg(inner.args[0], lambda n: env[n])
            else:
                new = graph.node_copy(inner, lambda n: env[n])
                if inner.op == "get_attr":
                    new.target = f"{body.target}.{inner.target}"
                if cast is not None:
                    _cast_inputs(graph, new, cast)
                if no_grad:
                    new.meta[NO_GRAD] = True
                env[inner] = new
        if no_grad:
            results = map_arg(results, lambda n: _detached(node, n))
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _detached(region: fx.Node, node: Any) -> Any:
    """The value without its gradient; tensors of the model and numbers have none to lose."""
    floating = isinstance(node, fx.Node) and isinstance(v := value(node), torch.Tensor)
    if not floating or node.op == "get_attr" or not v.is_floating_point():
        return node
    new = region.graph.call_function(aten.detach.default, (node,))
    new.meta = {"val": v, "nn_module_stack": region.meta.get("nn_module_stack", {})}
    return new


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast a node's floating operands as autocast did when the graph was recorded.

    Ops that autocast runs narrow have a narrow result of wider operands; those that it runs in
    fp32 have an fp32 result of narrow operands.
    """
    made = value(node)
    if isinstance(made, (tuple, list)):
        made = next((m for m in made if isinstance(m, torch.Tensor)), None)
    chosen = str(node.target).startswith(CHOSEN)
    if chosen or not isinstance(made, torch.Tensor) or not made.is_floating_point():
        return
    dtypes = {i: dtype_of(i) for i in node.all_input_nodes}
    operands = [i for i, dtype in dtypes.items() if dtype and dtype.is_floating_point]
    seen = {dtypes[i] for i in operands}
    wanted = made.dtype
    mixed = seen != {wanted} and wanted in (dtype, torch.float32)
    if not mixed or (wanted is torch.float32 and torch.float32 in seen):
        return  # plain type promotion
    with graph.inserting_before(node):
        for i in operands:
            if dtypes[i] is not wanted:
                new = graph.call_function(aten.to.dtype, (i, wanted))
                new.meta = {**i.meta, "nn_module_stack": node.meta.get("nn_module_stack", {})}
                new.meta["val"] = value(i).to(wanted)
                node.replace_input_with(i, new)


def without_vmap(graph: fx.Graph) -> None:
    """The plain operations that torch.vmap makes, instead of its own.

    A level of batching is entered and left by nodes without users, and what lies between holds
    there alone: no pass could move it, share it or drop it.
    """
    depth, body = 0, list[fx.Node]()
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        depth += name == "_vmap_increment_nesting"
        if depth and node.op == "call_function":
            body.append(node)
        if name == "_vmap_decrement_nesting" and not (depth := depth - 1):
            _batched(graph, body)
            body = []


def _batched(graph: fx.Graph, body: Sequence[fx.Node]) -> None:
    """Trace the nodes of one vmap again, below its levels, and put what it runs in their place."""
    read = dict.fromkeys(n for node in body for n in node.all_input_nodes)
    given = [n for n in read if n not in body]
    kept = [n for n in body if any(user not in body for user in n.users)]
    values = [n.meta["val"] for n in given]

    def run(*arguments: Argument) -> list[Argument]:
        env = dict(zip(given, arguments, strict=True))
        for node in body:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[n] for n in kept]

    with detect_fake_mode(values) or contextlib.nullcontext():
        plain = make_fx(run)(*values).graph
    places = dict(zip(plain.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(body[-1]):
        results = graph.graph_copy(plain, places)
    for node, new in zip(kept, results, strict=True):  # type: ignore[arg-type]
        node.replace_all_uses_with(new)
    for node in reversed(body):
        graph.erase_node(node)


# Chains of products, written as products of two, which have rows in the op table.
#
# A chain is associative. It starts at its first activation and goes outwards, x, W₁, W₂ as
# (x W₁) W₂, so that each weight stands alone in one product with an activation.


def split_products(graph: fx.Graph) -> None:
    """Rewrite every chain of a graph; torch may choose another order, so last bits may differ."""
    moving: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "placeholder" and not any(n in moving for n in node.all_input_nodes):
            continue
        moving.add(node)
        if node.target in CHAINS:
            with graph.inserting_before(node):
                new = _chain(node, moving)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moving.add(new)


def _chain(node: fx.Node, moving: Collection[fx.Node]) -> fx.Node:
    factors: Any = node.args[0]
    start = next(i for i, f in enumerate(factors) if f in moving)
    y: fx.Node = factors[start]
    for f in reversed(factors[:start]):
        y = _product(node, f, y)
    for f in factors[start + 1 :]:
        y = _product(node, y, f)
    return y


def _product(node: fx.Node, *factors: fx.Node) -> fx.Node:
    """A product in the place of a chain, in its scope."""
    new = node.graph.call_function(aten.matmul.default, factors)
    new.meta = {**node.meta, "val": aten.matmul.default(*map(value, factors))}
    return new
