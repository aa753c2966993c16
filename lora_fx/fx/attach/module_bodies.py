"""Whether a module's forward is just one op on its weight, read from the captured graph.

A branch beside the module, y + B(A x)·s, is the branch beside the op only where what comes in is
the op's activation and what goes out is its result. Reshapes of leading axes on the way, as in
transformers' Conv1D, change nothing for a matmul of the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from lora_fx.fx.capture.call import Signature
from lora_fx.fx.graph.elementwise_chains import VIEWS
from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Site


def bodies_of(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Module call → the nodes that it made, those of the modules inside too."""
    bodies: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        for call in node.meta.get("nn_module_stack", ()):
            bodies.setdefault(call, set()).add(node)
    return bodies


def one_op(
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
        bodies: Those of the graph.
    """
    call = next(reversed(node.meta.get("nn_module_stack", {})), None)
    if call is None or not isinstance(x, fx.Node):
        return False
    body = bodies[call]
    seen = {node}
    first, last = x, node
    while first in body:
        source = first.args[0] if first.target in VIEWS else None
        if not isinstance(source, fx.Node):
            return False
        seen.add(first)
        first = source
    while any(u in body for u in last.users):
        users = list(last.users)
        if len(users) != 1 or users[0].target not in VIEWS:
            return False
        last = users[0]
        seen.add(last)
    more = any(isinstance(value(n), torch.Tensor) for n in body - seen if n not in states)
    return not more and (len(seen) == 1 or _leading(site, first, last))


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
        signature = Signature(type(module).forward)
    except (TypeError, ValueError):
        return False
    return len(signature.order) == len(signature.positional) == 2  # self and the tensor
