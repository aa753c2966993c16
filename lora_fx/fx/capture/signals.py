"""Signals [N, C, L]: whether a graph reads dimension 1 of an input as channels."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lora_fx.fx.graph.nodes import op_name, reached

OF_SIGNALS = frozenset(("conv1d", "conv_transpose1d", "gru", "lstm", "rnn_tanh", "rnn_relu"))
"""The ops of a model that may read a signal [N, C, L]."""
_CONVOLUTIONS = frozenset(("conv1d", "conv_transpose1d"))
_IN_PLACE_OF_AXES = frozenset((
    "_to_copy", "add", "batch_norm", "clone", "contiguous", "div", "dropout", "mul", "sub", "to",
))  # fmt: skip
"""Ops before a convolution that leave each axis where it is."""


def may_have_signals(graph: fx.Graph) -> bool:
    """Whether some op of a graph may read a signal [N, C, L]."""
    return any(op_name(node) in OF_SIGNALS for node in graph.nodes)


def is_convolved(place: fx.Node) -> bool:
    """Whether a convolution over one dimension reads an input, so that its dimension 1 is channels.

    Args:
        place: The input's placeholder.
    """
    readers = reached(place.users, _users_with_the_same_axes)
    return any(op_name(node) in _CONVOLUTIONS for node in readers)


def _users_with_the_same_axes(node: fx.Node) -> Iterable[fx.Node]:
    return node.users if op_name(node) in _IN_PLACE_OF_AXES else ()
