"""Graphs as plain Python functions, with one function per block for hooks and recomputation.

Generated code takes 6.4 ms for a training step of a 4-layer GPT-2, 64 wide, where torch's
unflatten, which interprets node by node, takes 10.5. Outlining costs nothing that can be measured.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx, nn

from lora_fx.fx.graph.nodes import copy_into, scopes_of

CALLS = ("call_function", "call_module")
"""The kinds of nodes that compute something."""


def compile_program(
    graph: fx.Graph, ident: str, blocks: Sequence[str]
) -> dict[str, Callable[..., object]]:
    """Compile a graph to functions of (module, *values): one per block path, and "" for the whole.

    A block whose nodes cannot be gathered in one place stays part of the whole.
    """
    codes = {}
    scopes: dict[fx.Node, Collection[str]] = {}
    if blocks:
        scopes = {node: scopes_of(node) for node in graph.nodes if node.op in CALLS}
    for path in blocks:
        body = [node for node in graph.nodes if path in scopes.get(node, ())]
        outlined = outline(graph, path, ident, body)
        if outlined is not None:
            codes[path] = function(outlined, f"{ident}:{path}")
    codes[""] = function(graph, ident)
    return codes


def function(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Compile a graph to a function of (module, *values); tracebacks show `name`."""
    graph.set_codegen(fx.graph.CodeGen())
    code = graph.python_code("self")
    file = f"<lora_fx {name}>"
    space: dict[str, Callable[..., object]] = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    # tracebacks and debuggers look the source up here
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    return space["forward"]


def interpreted(graph: fx.Graph) -> Callable[..., Any]:
    """Return a function of (module, *values) that runs a graph node by node."""

    def run(module: nn.Module, *values: object) -> Any:
        return fx.Interpreter(module, graph=graph).run(*values, enable_io_processing=False)

    return run


def outline(graph: fx.Graph, path: str, ident: str, body: list[fx.Node]) -> fx.Graph | None:
    """Move the nodes of one module, in their order, into a new graph that a node calls.

    Returns None, and leaves the graph alone, where a node of another module depends on the block
    and the block depends on that node.
    """
    members = set(body)
    if not body or not _gather(graph, body, members):
        return None

    inputs: dict[fx.Node, None] = {}
    for node in body:
        for operand in node.all_input_nodes:
            if operand not in members:
                inputs[operand] = None
    prefix = f"{path}."
    own_tensors = [
        node for node in inputs if node.op == "get_attr" and str(node.target).startswith(prefix)
    ]
    arguments = [node for node in inputs if node not in own_tensors]
    outputs = [node for node in body if any(user not in members for user in node.users)]
    outlined = _copied(body, arguments, own_tensors, outputs, prefix)

    with graph.inserting_after(body[-1]):
        call = graph.create_node("call_module", path, (ident, *arguments))
    # The program is an argument, not the state of some module: a block that is recomputed after
    # another program has run must not pick that one's code.
    call.meta["nn_module_stack"] = {}
    results = [call]
    if len(outputs) != 1:
        with graph.inserting_before(call.next):
            results = [
                graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))
            ]
    for output, result in zip(outputs, results, strict=True):
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user not in members)

    for node in reversed(body):
        graph.erase_node(node)
    for node in own_tensors:
        if not node.users:
            graph.erase_node(node)
    return outlined


def _copied(
    body: Sequence[fx.Node],
    arguments: Sequence[fx.Node],
    own_tensors: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    prefix: str,
) -> fx.Graph:
    """Copy a block's nodes into a graph.

    Args:
        body: The nodes.
        arguments: Nodes of the graph around them that they read.
        own_tensors: Nodes of the block's own tensors that they read.
        outputs: Nodes among them that the graph around them reads.
        prefix: The block's path and a dot, with which names of its tensors begin.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in arguments:
        copies[node] = graph.placeholder(node.name)
    for node in own_tensors:
        copies[node] = graph.get_attr(str(node.target).removeprefix(prefix))
    for node in body:
        copy_into(graph, node, copies)
    results = tuple(copies[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph


def _gather(graph: fx.Graph, body: list[fx.Node], members: set[fx.Node]) -> bool:
    """Move other nodes away from between the first and the last node of a block.

    Nodes that depend on the block go behind it, all others before it. Returns False, and moves
    nothing, if a node of the block in turn depends on one that would go behind it.
    """
    early = []
    dependents = set(members)
    node = body[0]
    while node is not body[-1]:
        node = node.next
        if node in members or node.op in ("placeholder", "output"):
            continue
        if any(operand in dependents for operand in node.all_input_nodes):
            dependents.add(node)
        else:
            early.append(node)

    late = dependents - members
    for node in body:
        if any(operand in late for operand in node.all_input_nodes):
            return False
    for node in early:
        body[0].prepend(node)
    for node in reversed([node for node in graph.nodes if node in late]):
        body[-1].append(node)
    return True


def inlined_blocks(graph: fx.Graph, blocks: Sequence[str]) -> set[str]:
    """Return the blocks with nodes that are still in the graph after outlining."""
    scopes: set[str] = set()
    for node in graph.nodes:
        if node.op in CALLS:
            scopes.update(scopes_of(node))
    return scopes & set(blocks)
