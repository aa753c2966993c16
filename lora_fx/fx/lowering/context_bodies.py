"""Bodies of no_grad and autocast, as nodes of the graph around them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
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
            args: Any = node.args
            enabled, body, *arguments = args
            _inline(module, node, body, arguments, no_grad=no_grad or not enabled, cast=None)
        elif node.target is higher.wrap_with_autocast:
            args = node.args
            _, dtype, enabled, _, body, *arguments = args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, node, body, arguments, no_grad=no_grad, cast=cast)


def _inline(
    module: fx.GraphModule,
    node: fx.Node,
    body: fx.Node,
    arguments: Sequence[Any],
    *,
    no_grad: bool,
    cast: torch.dtype | None,
) -> None:
    """Put the nodes of a body, run on these arguments, in the place of the node that runs it."""
    graph = module.graph
    region = operator.attrgetter(str(body.target))(module)
    inline_regions(region, no_grad=no_grad)
    with graph.inserting_before(node):
        if no_grad:
            arguments = [_detached(node, argument) for argument in arguments]
        placeholders = region.graph.find_nodes(op="placeholder")
        copies: dict[fx.Node, Any] = dict(zip(placeholders, arguments, strict=False))
        results: Any = graph.graph_copy(region.graph, copies)
        for inner in region.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            copy = copies[inner]
            if inner.op == "get_attr":
                copy.target = f"{body.target}.{inner.target}"
            if cast is not None:
                _cast_inputs(graph, copy, cast)
            if no_grad:
                copy.meta[NO_GRAD] = True
        if no_grad:
            results = map_arg(results, lambda result: _detached(node, result))
    replace_parts(node, results)
    if not body.users:
        graph.erase_node(body)


def without_grad_modes(graph: fx.Graph) -> None:
    """Replace the switches of the gradient in a recorded run by detach.

    Left in the graph, a switch would act on whatever runs after it, the user's code too.
    """
    region = _erase_switches(graph)
    for node in region:
        readers = [user for user in node.users if user not in region]
        if not readers:
            continue
        with graph.inserting_after(node):
            result = _detached(node, node)
        for reader in readers:
            if reader is not result:
                reader.replace_input_with(node, result)


def _erase_switches(graph: fx.Graph) -> dict[fx.Node, None]:
    """Erase the switches of the gradient; returns the nodes that ran without, in order."""
    region: dict[fx.Node, None] = {}
    enabled = True
    for node in list(graph.nodes):
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif not enabled and node.op == "call_function":
            region[node] = None
            node.meta[NO_GRAD] = True
    return region


def _detached(region: fx.Node, node: Any) -> Any:
    """The value without its gradient; tensors of the model and numbers have none to lose."""
    if not isinstance(node, fx.Node) or node.op == "get_attr":
        return node
    val = value(node)
    if not isinstance(val, torch.Tensor) or not val.is_floating_point():
        return node
    detached = region.graph.call_function(aten.detach.default, (node,))
    detached.meta = {"val": val, "nn_module_stack": region.meta.get("nn_module_stack", {})}
    return detached


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast a node's floating operands as autocast did when the graph was recorded.

    Ops that autocast runs narrow have a narrow result of wider operands; those that it runs in
    fp32 have an fp32 result of narrow operands.
    """
    results = (leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor))
    result = next(results, None)
    if result is None or not result.is_floating_point() or str(node.target).startswith(CHOSEN):
        return

    dtypes: dict[fx.Node, torch.dtype] = {}
    for operand in node.all_input_nodes:
        operand_dtype = dtype_of(operand)
        if operand_dtype and operand_dtype.is_floating_point:
            dtypes[operand] = operand_dtype
    if not _is_cast(set(dtypes.values()), result.dtype, dtype):
        return

    with graph.inserting_before(node):
        for operand, operand_dtype in dtypes.items():
            if operand_dtype is not result.dtype:
                cast = graph.call_function(aten.to.dtype, (operand, result.dtype))
                cast.meta = dict(operand.meta)
                cast.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                cast.meta["val"] = value(operand).to(result.dtype)
                node.replace_input_with(operand, cast)


def _is_cast(operands: set[torch.dtype], result: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether autocast made this result of these operands, and not plain type promotion."""
    if operands == {result} or result not in (narrow, torch.float32):
        return False
    return result is not torch.float32 or torch.float32 not in operands
