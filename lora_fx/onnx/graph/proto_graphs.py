"""The graphs of a protobuf: that of the model, and those that its nodes hold."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all graphs within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from graphs(inner)
