"""A graph as text: one node a line."""

from __future__ import annotations

from torch import fx


def graph_text(graph: fx.Graph) -> str:
    """Return a graph as lines `name = op(operands)`, with `return` and the results as the last."""
    return "\n".join(map(_line, graph.nodes))


def _line(node: fx.Node) -> str:
    if node.op == "output":
        results = node.args[0]
        if isinstance(results, (tuple, list)):
            return f"return {', '.join(map(str, results))}"
        return f"return {results}"
    if node.op != "call_function":
        return f"{node.name} = {node.op}({node.target})"
    operands = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
    return f"{node.name} = {_op(node)}({', '.join(operands)})"


def _op(node: fx.Node) -> str:
    """Return an operator's name with its namespace, such as aten.linear."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    return str(schema.name).replace("::", ".")
