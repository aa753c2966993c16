"""A flat graph of tensors as a program for an exporter, without running it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.fx.graph.nodes import value
from lora_fx.fx.lowering.decomposition import CHECKS, _alone
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
    nodes = list(module.graph.nodes)
    places = module.graph.find_nodes(op="placeholder")
    tensors = tree_leaves([value(n) for n in nodes])
    modes = {getattr(t, "fake_mode", None) for t in tensors if isinstance(t, torch.Tensor)}
    given = map(_like, map(value, places), inputs, free)
    if not all(map(_has_value, nodes)) or len(modes) != 1 or None in modes or not all(given):
        return None
    graph, made, held = fx.Graph(), dict[fx.Node, fx.Node](), dict[int, fx.Node]()
    state: dict[str, torch.Tensor] = {}
    prefix = "state"
    while any(str(n.target).startswith(prefix) for n in nodes):
        prefix += "_"  # the exporter renames one by one: no place may be called as a tensor is
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = operator.attrgetter(name)(module)
        if not _like(value(node), tensor, None):
            return None
        if id(tensor) not in held:
            held[id(tensor)] = graph.placeholder(f"{prefix}{len(held)}")
            held[id(tensor)].meta = dict(node.meta)
            state[name] = tensor
        made[node] = held[id(tensor)]
    for node in nodes:
        if node.target is getattr:
            node.replace_all_uses_with(getattr(value(node.args[0]), node.args[1]))
        elif node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    return signed(graph, [made[n] for n in places], state)


def _has_value(node: fx.Node) -> bool:
    known = node.op == "output" or node.target in (getattr, *CHECKS) or value(node) is not None
    return known and _alone(node)


def _like(val: object, tensor: torch.Tensor, free: Collection[int] | None) -> bool:
    """Whether a node stands for tensors such as this; other sizes only where they are free."""
    if not isinstance(val, torch.Tensor) or val.dtype != tensor.dtype or val.dim() != tensor.dim():
        return False
    sizes = enumerate(zip(val.shape, tensor.shape, strict=True))
    return all(a == b if isinstance(a, int) else d in (free or ()) for d, (a, b) in sizes)
