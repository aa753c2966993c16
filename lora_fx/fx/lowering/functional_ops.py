"""Ops that write in place, as ops that give a new value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.in_place import Writes, written_by
from lora_fx.fx.graph.nodes import value
from lora_fx.fx.lowering.node_arguments import _reads
from lora_fx.fx.operators import OpOverload

aten = torch.ops.aten


def without_writes(graph: fx.Graph) -> None:
    """Let ops that write into a value nobody else reads afterwards give a new one.

    relu_ of a norm's result is relu of it. What something reads later by another name stays, as
    does an op that would round to the dtype of what it writes into.
    """
    writes = Writes(graph)
    for node in graph.nodes:
        into = written_by(node)
        plain = _giving(node.target) if len(into) == 1 else None
        if plain is None or into[0] is not node.args[0]:
            continue
        own, at = writes.storage[into[0]], writes.order[node]
        held = [n for n, s in writes.storage.items() if s & own and writes.order[n] < at]
        dtypes = {v.dtype for v in map(value, _reads(node)) if isinstance(v, torch.Tensor)}
        made = all(isinstance(n, fx.Node) and n.op == "call_function" for n in own)
        if made and len(dtypes) == 1 and all(writes.order[u] <= at for n in held for u in n.users):
            node.target = plain


def _giving(target: Any) -> OpOverload | None:
    """The op that gives what another writes: aten.relu.default for aten.relu_.default."""
    name = getattr(target, "_opname", "")
    packet = getattr(aten, name[:-1], None) if name[-1:] == "_" and name[-2:-1] != "_" else None
    plain = getattr(packet, target._overloadname, None) if packet is not None else None
    if plain is None or plain._schema.is_mutable:
        return None
    given, written = ([str(a.type) for a in op._schema.arguments] for op in (plain, target))
    return plain if given == written else None
