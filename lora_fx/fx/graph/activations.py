"""The activations: the ops between two layers that are no sum, each element by itself.

Some are written out of others: softsign is y / (|y| + 1), and a hard sigmoid may be a clamp.
"""

from __future__ import annotations

from torch import fx

from lora_fx.fx.graph.nodes import op_in_any_form

GATES = frozenset(("gelu", "relu", "sigmoid", "silu", "tanh"))
"""Those that tell a gate from the part beside it, where both are parts of one result."""
ACTIVATIONS = GATES | frozenset((
    "abs", "atan", "celu", "clamp", "clamp_max", "clamp_min", "cos", "elu", "erf", "exp", "glu",
    "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish",
    "pow", "prelu", "relu6", "rrelu", "selu", "sin", "softplus", "softshrink", "threshold",
))  # fmt: skip


def is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation."""
    return op_in_any_form(node) in ACTIVATIONS


def is_gate(node: fx.Node) -> bool:
    """Whether a node is an activation of gates."""
    return op_in_any_form(node) in GATES
