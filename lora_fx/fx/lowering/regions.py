"""Bodies of no_grad and autocast, as nodes of the graph around them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lora_fx.fx.graph.nodes import NO_GRAD, dtype_of, replace_parts, value
from lora_fx.fx.operators import SET_GRAD_ENABLED
from lora_fx.fx.trees import tree_leaves

aten = torch.ops.aten

higher = torch.ops.higher_order


CHOSEN = ("aten.to.", "aten._to_copy", "aten.type_as", "aten.empty", "aten.zeros")
"""Beginnings of ops whose dtype the model chose, whatever autocast would."""


def inline_regions(module: fx.GraphModule, *, no_grad: bool = False) -> None:
    """Replace every call of a no_grad or autocast body by the body's own nodes.

    What runs in them is the model's like everything else: its weights are targets. What the
    regions did to gradients and dtypes is written out as detach and casts.
    """
    for node in list(module.graph.nodes):
        if node.target is higher.wrap_with_set_grad_enabled:
            _inline(module, node, node.args[1:], no_grad or not node.args[0], None)
        elif node.target is higher.wrap_with_autocast:
            _, dtype, enabled, *_ = node.args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, node, node.args[4:], no_grad, cast)


def _inline(
    module: fx.GraphModule, node: fx.Node, call: Any, no_grad: bool, cast: torch.dtype | None
) -> None:
    """Put the nodes of a body in the place of the one that runs it: call is (body, *arguments)."""
    body, *given = call
    graph, part = module.graph, operator.attrgetter(str(body.target))(module)
    inline_regions(part, no_grad=no_grad)
    with graph.inserting_before(node):
        given = [_detached(node, outer) for outer in given] if no_grad else given
        places = part.graph.find_nodes(op="placeholder")
        env: dict[fx.Node, Any] = dict(zip(places, given, strict=False))
        results: Any = graph.graph_copy(part.graph, env)
        for inner in (n for n in part.graph.nodes if n.op not in ("placeholder", "output")):
            if inner.op == "get_attr":
                env[inner].target = f"{body.target}.{inner.target}"
            if cast is not None:
                _cast_inputs(graph, env[inner], cast)
            if no_grad:
                env[inner].meta[NO_GRAD] = True
        if no_grad:
            results = map_arg(results, lambda n: _detached(node, n))
    replace_parts(node, results)
    if not body.users:
        graph.erase_node(body)


def without_grad_modes(graph: fx.Graph) -> None:
    """Write out what a recorded run did between two switches of the gradient as detach.

    Left in the graph, a switch would act on whatever runs after it, the user's code too.
    """
    region: dict[fx.Node, None] = {}
    enabled = True
    for node in list(graph.nodes):
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif not enabled and node.op == "call_function":
            region[node] = None
            node.meta[NO_GRAD] = True
    for node in region:
        readers = [user for user in node.users if user not in region]
        if not readers:
            continue
        with graph.inserting_after(node):
            result = _detached(node, node)
        for reader in readers:
            if reader is not result:
                reader.replace_input_with(node, result)


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
    tensors = (v for v in tree_leaves(value(node)) if isinstance(v, torch.Tensor))
    made = next(tensors, None)
    chosen = str(node.target).startswith(CHOSEN)
    if chosen or made is None or not made.is_floating_point():
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
