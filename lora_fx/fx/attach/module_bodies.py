"""Whether a module's forward is just one op on its weight, read from the captured graph.

A branch beside the module, y + B(A x)·s, is the branch beside the op only where what comes in is
the op's activation and what goes out is its result. Reshapes of leading axes on the way, as in
transformers' Conv1D, change nothing for a matmul of the last axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx, nn

from lora_fx.fx.capture.call import Signature
from lora_fx.fx.graph.elementwise_chains import VIEWS
from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Site


def bodies_of(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Module call → the nodes that it made, with the nodes of the modules inside."""
    bodies: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        for call in node.meta.get("nn_module_stack", ()):
            bodies.setdefault(call, set()).add(node)
    return bodies


def is_one_op(
    site: Site,
    node: fx.Node,
    x: object,
    states: Mapping[fx.Node, object],
    bodies: Mapping[str, set[fx.Node]],
) -> bool:
    """True when the innermost module call that made `node` holds nothing else.

    Args:
        site: The use.
        node: Its op.
        x: The op's activation.
        states: Nodes that depend on parameters only (FxFlow.behind).
        bodies: Module call → its nodes, as bodies_of gives them.
    """
    call = next(reversed(node.meta.get("nn_module_stack", {})), None)
    if call is None or not isinstance(x, fx.Node):
        return False
    body = bodies[call]
    before = _views_before(x, body)
    after = _views_after(node, body)
    if before is None or after is None:
        return False

    path = {node, *before, *after}
    for other in body - path:
        if other not in states and isinstance(value(other), torch.Tensor):
            return False
    if len(path) == 1:
        return True
    first = before[-1].args[0] if before else x
    last = after[-1] if after else node
    return isinstance(first, fx.Node) and _keeps_last_axis(site, first, last)


def _views_before(x: fx.Node, body: Collection[fx.Node]) -> list[fx.Node] | None:
    """The views in a body that lead to x, the last first; None where something else does."""
    views = []
    node = x
    while node in body:
        source = node.args[0] if node.target in VIEWS else None
        if not isinstance(source, fx.Node):
            return None
        views.append(node)
        node = source
    return views


def _views_after(node: fx.Node, body: Collection[fx.Node]) -> list[fx.Node] | None:
    """The views in a body that lead on from a node; None where something else reads it there."""
    views: list[fx.Node] = []
    last = node
    while any(user in body for user in last.users):
        users = list(last.users)
        if len(users) != 1 or users[0].target not in VIEWS:
            return None
        last = users[0]
        views.append(last)
    return views


def _keeps_last_axis(site: Site, first: fx.Node, last: fx.Node) -> bool:
    """True when reshapes left the last axis alone, before and after a matmul of that axis."""
    if not isinstance(site.kind, Einsum) or site.kind.form != "right" or len(site.operand) != 2:
        return False
    x = shape_of(first)
    y = shape_of(last)
    if x is None or y is None or len(x) != len(y):
        return False
    for size_before, size_after in zip(x[:-1], y[:-1], strict=True):
        if not bool(size_before == size_after):
            return False
    axes = site.kind.axes(site.operand)
    ends = (site.operand[axes.in_[0]], site.operand[axes.out[0]])
    return (x[-1], y[-1]) == ends


def takes_one_tensor(module: nn.Module) -> bool:
    """True when forward takes one tensor and nothing else, by the class and not by an instance."""
    if "forward" in module.__dict__:
        return False
    try:
        signature = Signature(type(module).forward)
    except (TypeError, ValueError):
        return False
    return len(signature.order) == len(signature.positional) == 2  # self and the tensor
