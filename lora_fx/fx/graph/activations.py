"""The activations: the ops between two layers that are no sum, each element by itself.

Some are written out of others: softsign is y / (|y| + 1), and relu6 a clamp from 0 on. A clamp
with another lower bound guards a number, and |a - b| compares two results: neither is one.
"""

from __future__ import annotations

from torch import fx

from lora_fx.fx.graph.nodes import op_in_any_form

GATES = frozenset(("gelu", "relu", "sigmoid", "silu", "tanh"))
"""Those that tell a gate from the part beside it, where both are parts of one result."""
ACTIVATIONS = GATES | frozenset((
    "atan", "celu", "elu", "erf", "exp", "glu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "log_sigmoid", "mish", "pow", "prelu", "relu6", "rrelu", "selu",
    "softplus", "softshrink", "threshold",
))  # fmt: skip


def is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation."""
    op = op_in_any_form(node)
    if op in ("clamp", "clamp_min"):
        return len(node.args) > 1 and bool(node.args[1] == 0)
    if op == "abs":
        (argument,) = node.all_input_nodes
        return op_in_any_form(argument) not in ("add", "sub")
    return op in ACTIVATIONS


def is_gate(node: fx.Node) -> bool:
    """Whether a node is an activation of gates."""
    return op_in_any_form(node) in GATES
