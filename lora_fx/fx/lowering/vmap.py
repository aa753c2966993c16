"""The operations of torch.vmap, replaced by plain operations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import fx
from torch.fx.node import Argument, map_arg

from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.proxy_tracing import make_fx
from lora_fx.patching import alone


def without_vmap(graph: fx.Graph) -> None:
    """Replace the operations of torch.vmap by the plain operations that they perform.

    A level of batching is entered and left by nodes without users, and what lies between holds
    there alone: no pass could move it, share it or drop it.
    """
    depth = 0
    body: list[fx.Node] = []
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "_vmap_increment_nesting":
            depth += 1
        if depth and node.op == "call_function":
            body.append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if not depth:
                _replace_by_plain(graph, body)
                body = []


def _replace_by_plain(graph: fx.Graph, body: Sequence[fx.Node]) -> None:
    """Trace the nodes of one vmap again without its levels, and replace them by the result."""
    operands: dict[fx.Node, None] = {}
    for node in body:
        operands |= dict.fromkeys(node.all_input_nodes)
    inputs = [node for node in operands if node not in body]
    outputs = [node for node in body if any(user not in body for user in node.users)]
    example = [node.meta["val"] for node in inputs]

    def run(*arguments: Argument) -> list[Argument]:
        results = dict(zip(inputs, arguments, strict=True))
        for node in body:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: results[n])
            results[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [results[node] for node in outputs]

    with alone(), detect_fake_mode(example) or contextlib.nullcontext():
        plain = make_fx(run)(*example).graph
    placeholders = dict(zip(plain.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(body[-1]):
        copies = graph.graph_copy(plain, placeholders)
    for node, copy in zip(outputs, copies, strict=True):  # type: ignore[arg-type]
        node.replace_all_uses_with(copy)
    for node in reversed(body):
        graph.erase_node(node)
