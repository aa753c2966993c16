"""Is a module's forward just one op on its weight? Read from the captured graph.

A branch beside the module, y + B(A x)·s, is the branch beside the op only where what comes in is
the op's activation and what goes out is its result. Reshapes of leading axes on the way, as in
transformers' Conv1D, change nothing for a matmul of the last axis.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lora_fx.fx.nodes import shape_of, value
from lora_fx.ir.graph import Site
from lora_fx.ir.kinds import Einsum

aten = torch.ops.aten
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


def one_op(site: Site, node: fx.Node, x: Any, states: Mapping[fx.Node, Any]) -> bool:
    """True when the innermost module call that made `node` holds nothing else.

    Args:
        site: The use.
        node: Its op.
        x: The op's activation.
        states: Nodes that depend on parameters only (Flow.behind).
    """
    call = _call(node)
    if call is None or not isinstance(x, fx.Node):
        return False
    body = {n for n in node.graph.nodes if call in n.meta.get("nn_module_stack", {})}
    seen = {node}
    first, last = x, node
    while first in body:
        source = first.args[0] if first.target in RESHAPES else None
        if not isinstance(source, fx.Node):
            return False
        seen.add(first)
        first = source
    while any(u in body for u in last.users):
        users = list(last.users)
        if len(users) != 1 or users[0].target not in RESHAPES:
            return False
        last = users[0]
        seen.add(last)
    rest = [n for n in body - seen if n not in states and isinstance(value(n), torch.Tensor)]
    if rest:
        return False
    return len(seen) == 1 or _leading(site, first, last)


def _call(node: fx.Node) -> str | None:
    stack = list(node.meta.get("nn_module_stack", {}))
    return str(stack[-1]) if stack else None


def _leading(site: Site, first: fx.Node, last: fx.Node) -> bool:
    """True when reshapes left the last axis alone, before and after a matmul of that axis."""
    right = isinstance(site.kind, Einsum) and site.kind.form == "right"
    x, y = shape_of(first), shape_of(last)
    if not right or len(site.operand) != 2 or x is None or y is None:
        return False
    axes = site.kind.axes(site.operand)
    ends = site.operand[axes.in_[0]], site.operand[axes.out[0]]
    same = len(x) == len(y) and all(bool(a == b) for a, b in zip(x[:-1], y[:-1], strict=True))
    return same and (x[-1], y[-1]) == ends


def one_argument(module: nn.Module) -> bool:
    """True when forward takes one tensor and nothing else, by the class and not by an instance."""
    if "forward" in module.__dict__:
        return False
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    kinds = inspect.Parameter
    plain = (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)
    return len(parameters) == 1 and parameters[0].kind in plain
