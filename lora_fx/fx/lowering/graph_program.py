"""A flat graph of tensors as a program for an exporter, without running it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.fx.graph.nodes import value
from lora_fx.fx.lowering.decomposition import CHECKS, stands_alone
from lora_fx.fx.lowering.program_signature import signed
from lora_fx.fx.trees import tree_leaves


def program_of(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], free: Sequence[Collection[int] | None]
) -> ExportedProgram | None:
    """A flat graph of tensors as a program, without running it; None where that takes a run.

    Every node keeps the value that the capture gave it, and with it the capture's symbols. A
    module that was cast since, or code that was put in, has other values; a recorded run has none.

    Args:
        module: Its placeholders are the inputs, in order.
        inputs: Their values.
        free: The dimensions of each that stay free.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    if not _has_values_of_one_trace(module.graph):
        return None
    if not all(map(_stands_for, map(value, placeholders), inputs, free)):
        return None
    tensors = {
        node: operator.attrgetter(str(node.target))(module)
        for node in module.graph.find_nodes(op="get_attr")
    }
    if not all(_stands_for(value(node), tensor, None) for node, tensor in tensors.items()):
        return None

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    state = _copy_state(graph, tensors, copies, _unused_prefix(module.graph))
    for node in list(module.graph.nodes):
        if node.target is getattr:
            node.replace_all_uses_with(getattr(value(node.args[0]), node.args[1]))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return signed(graph, [copies[placeholder] for placeholder in placeholders], state)


def _has_values_of_one_trace(graph: fx.Graph) -> bool:
    """Whether every node has the value of one trace, and depends only on its operands."""
    if not all(map(_has_value, graph.nodes)):
        return False
    leaves = tree_leaves([value(node) for node in graph.nodes])
    modes = {getattr(t, "fake_mode", None) for t in leaves if isinstance(t, torch.Tensor)}
    return len(modes) == 1 and None not in modes


def _unused_prefix(graph: fx.Graph) -> str:
    """A beginning of names that no node's target has.

    The exporter renames inputs one by one: none may be called as a tensor is.
    """
    prefix = "state"
    while any(str(node.target).startswith(prefix) for node in graph.nodes):
        prefix += "_"
    return prefix


def _copy_state(
    graph: fx.Graph,
    tensors: Mapping[fx.Node, torch.Tensor],
    copies: dict[fx.Node, fx.Node],
    prefix: str,
) -> dict[str, torch.Tensor]:
    """Make an input of every tensor that nodes read; returns the tensors by name.

    `copies` gets the input for each of these nodes; one tensor is one input.
    """
    placeholder_of: dict[int, fx.Node] = {}
    state: dict[str, torch.Tensor] = {}
    for node, tensor in tensors.items():
        if id(tensor) not in placeholder_of:
            placeholder = graph.placeholder(f"{prefix}{len(placeholder_of)}")
            placeholder.meta = dict(node.meta)
            placeholder_of[id(tensor)] = placeholder
            state[str(node.target)] = tensor
        copies[node] = placeholder_of[id(tensor)]
    return state


def _has_value(node: fx.Node) -> bool:
    if not stands_alone(node):
        return False
    needs_none = node.op == "output" or node.target is getattr or node.target in CHECKS
    return needs_none or value(node) is not None


def _stands_for(val: object, tensor: torch.Tensor, free: Collection[int] | None) -> bool:
    """Whether a node can have a tensor like this as value; other sizes only if they are free."""
    if not isinstance(val, torch.Tensor) or val.dtype != tensor.dtype or val.dim() != tensor.dim():
        return False
    for axis, (expected, size) in enumerate(zip(val.shape, tensor.shape, strict=True)):
        fits = expected == size if isinstance(expected, int) else axis in (free or ())
        if not fits:
            return False
    return True
