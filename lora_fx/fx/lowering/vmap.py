"""What torch.vmap runs, as plain operations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import fx
from torch.fx.node import Argument, map_arg

from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.proxy_tracing import make_fx


def without_vmap(graph: fx.Graph) -> None:
    """The plain operations that torch.vmap makes, instead of its own.

    A level of batching is entered and left by nodes without users, and what lies between holds
    there alone: no pass could move it, share it or drop it.
    """
    depth, body = 0, list[fx.Node]()
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        depth += name == "_vmap_increment_nesting"
        if depth and node.op == "call_function":
            body.append(node)
        if name == "_vmap_decrement_nesting" and not (depth := depth - 1):
            _batched(graph, body)
            body = []


def _batched(graph: fx.Graph, body: Sequence[fx.Node]) -> None:
    """Trace the nodes of one vmap again, below its levels, and put what it runs in their place."""
    read = dict.fromkeys(n for node in body for n in node.all_input_nodes)
    given = [n for n in read if n not in body]
    kept = [n for n in body if any(user not in body for user in n.users)]
    values = [n.meta["val"] for n in given]

    def run(*arguments: Argument) -> list[Argument]:
        env = dict(zip(given, arguments, strict=True))
        for node in body:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[n] for n in kept]

    with detect_fake_mode(values) or contextlib.nullcontext():
        plain = make_fx(run)(*values).graph
    places = dict(zip(plain.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(body[-1]):
        results = graph.graph_copy(plain, places)
    for node, new in zip(kept, results, strict=True):  # type: ignore[arg-type]
        node.replace_all_uses_with(new)
    for node in reversed(body):
        graph.erase_node(node)
