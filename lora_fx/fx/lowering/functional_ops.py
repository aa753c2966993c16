"""Ops that write in place, as ops that give a new value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.in_place import Writes, written_by
from lora_fx.fx.graph.nodes import value
from lora_fx.fx.lowering.node_arguments import read_nodes
from lora_fx.fx.operators import OpOverload

aten = torch.ops.aten


def without_writes(graph: fx.Graph) -> None:
    """Let ops that write into a value nobody else reads afterwards give a new one.

    relu_ of a norm's result is relu of it. What something reads later by another name stays, as
    does an op that would round to the dtype of what it writes into.
    """
    writes = Writes(graph)
    for node in graph.nodes:
        written = written_by(node)
        functional = _functional(node.target) if len(written) == 1 else None
        if functional is None or written[0] is not node.args[0]:
            continue
        if _is_last_reader(node, written[0], writes) and not _rounds(node):
            node.target = functional


def _is_last_reader(node: fx.Node, written: fx.Node, writes: Writes) -> bool:
    """Whether a node writes into a tensor that the graph made and that nothing reads later."""
    storage = writes.storage[written]
    position = writes.order[node]
    if not all(isinstance(owner, fx.Node) and owner.op == "call_function" for owner in storage):
        return False
    for alias, alias_storage in writes.storage.items():
        if not alias_storage & storage or writes.order[alias] >= position:
            continue
        if any(writes.order[user] > position for user in alias.users):
            return False
    return True


def _rounds(node: fx.Node) -> bool:
    """Whether operands have several dtypes, so that the result must be cast to the written one."""
    values = map(value, read_nodes(node))
    return len({val.dtype for val in values if isinstance(val, torch.Tensor)}) != 1


def _functional(target: Any) -> OpOverload | None:
    """The functional form of an in-place op: aten.relu.default for aten.relu_.default."""
    name = getattr(target, "_opname", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        return None
    same_arguments = _argument_types(functional) == _argument_types(target)
    return functional if same_arguments else None


def _argument_types(op: OpOverload) -> list[str]:
    return [str(argument.type) for argument in op._schema.arguments]
