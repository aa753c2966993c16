"""Copies of the nodes of a block, put in the place of the opaque nodes of later calls."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from copy import deepcopy
from typing import cast

import torch
from torch import fx

from lora_fx.fx.capture.repeat import AGAIN, END, NUMBERS, START
from lora_fx.fx.graph.nodes import value

aten = torch.ops.aten


class NotRepeated(Exception):
    """Copies cannot be put into a graph; the model is traced without any."""


def write_out(module: fx.GraphModule) -> None:
    """Replace the opaque nodes of a graph by the copies of blocks that they represent.

    Raises:
        NotRepeated: Some node is elsewhere than its pattern, or reads what has no counterpart.
    """
    graph = module.graph
    starts: dict[int, fx.Node] = {}
    ends: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is START:
            starts[node.args[1]] = node
        elif node.target is END:
            ends[node.args[1]] = node
        elif node.target is AGAIN:
            key = node.args[1]
            if key not in starts or key not in ends:
                raise NotRepeated
            _copy_block(module, starts[key], ends[key], node)
    for mark in (*starts.values(), *ends.values()):
        graph.erase_node(mark)
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule) and _has_marks(inner.graph):
            raise NotRepeated


def _has_marks(graph: fx.Graph) -> bool:
    return any(node.target in (START, END, AGAIN) for node in graph.nodes)


def _copy_block(module: fx.GraphModule, start: fx.Node, end: fx.Node, call: fx.Node) -> None:
    """Copy the nodes between two marks over the tensors of a later call, and erase its node."""
    graph = module.graph
    block_inputs = cast("list[fx.Node]", start.args[0])
    call_inputs = cast("list[fx.Node]", call.args[0])
    block_outputs = cast("list[fx.Node]", end.args[0])
    copies = dict(zip(block_inputs, call_inputs, strict=True))
    block_nodes = _nodes_between(start, end)
    in_block = {*block_inputs, *block_nodes, end}
    with graph.inserting_before(call):
        for node in block_nodes:
            if _needs_no_copy(node):
                continue
            if _neighbours(node, block_outputs) - in_block:  # other calls would not share it
                raise NotRepeated
            copy = graph.node_copy(node, lambda operand: copies.get(operand, operand))
            copy.meta["nn_module_stack"] = _moved_stack(node, start, call)
            if node.op == "get_attr":
                _copy_body(module, node, copy)
            copies[node] = copy

    for user in list(call.users):
        if user.target is operator.getitem:
            output = block_outputs[cast("int", user.args[1])]
            user.replace_all_uses_with(copies.get(output, output))
            graph.erase_node(user)
    graph.erase_node(call)


def _nodes_between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    node = start.next
    while node is not end:
        nodes.append(node)
        node = node.next
    return nodes


def _needs_no_copy(node: fx.Node) -> bool:
    """Whether a later call goes without a copy of a node.

    Numbers and the assertions about them are the same in every call, and marks are erased.
    """
    return _is_number(node) or node.target in (START, END, aten._assert_scalar.default)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (*NUMBERS, int, float))


def _neighbours(node: fx.Node, block_outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes whose tensors a node reads, without parameters, and the nodes that read it.

    The readers of a parameter or of an output of the block are not counted.
    """
    neighbours = {n for n in node.all_input_nodes if n.op != "get_attr" and not _is_number(n)}
    if node.op != "get_attr" and node not in block_outputs:
        neighbours.update(node.users)
    return neighbours


def _copy_body(module: fx.GraphModule, node: fx.Node, copy: fx.Node) -> None:
    """Give the copy of a node its own copy of a body, since passes edit the body for one call."""
    body = getattr(module, str(node.target), None)
    if isinstance(body, fx.GraphModule):
        name = f"{node.target}_{copy.name}"
        copy.target = name
        module.add_submodule(name, deepcopy(body))


def _moved_stack(node: fx.Node, start: fx.Node, call: fx.Node) -> dict[str, tuple[str, object]]:
    """The module stack of a copied node: the modules of the call, then the node's own."""
    node_stack = node.meta.get("nn_module_stack") or {}
    block_stack = start.meta.get("nn_module_stack") or {}
    call_stack = call.meta.get("nn_module_stack") or {}
    is_within_block = list(node_stack)[: len(block_stack)] == list(block_stack)
    if not is_within_block or not block_stack or not call_stack:
        return dict(node_stack)

    block_key, (block_path, _) = list(block_stack.items())[-1]
    call_key, (call_path, _) = list(call_stack.items())[-1]
    moved = dict(call_stack)
    for key, (path, kind) in list(node_stack.items())[len(block_stack) :]:
        moved_key = call_key + key.removeprefix(block_key)
        moved[moved_key] = (call_path + path.removeprefix(block_path), kind)
    return moved
