"""Print where ONNX Runtime's CUDA provider puts the nodes of a file, as JSON.

Tests start this as a script in a child process that sees the stand-in:
`python tests/cuda/placed.py FILE`. The runtime partitions and fuses the graph, and says whether a
CUDA graph of the session can be captured. Nothing is run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import onnx

from lora_fx.onnx.device_placement import copies_in, placed_graph, why_uncapturable
from lora_fx.onnx.graph.proto_graphs import graphs
from lora_fx.onnx.provider_nodes import CUDA, nodes_by_provider

CONTRIBUTED = ("com.microsoft", "com.ms.internal.nhwc")
"""Domains of the runtime's operators, most of which do the work of several of ONNX's."""
FUSED_OF_ONNX = (
    "Gelu",
    "Gemm",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
)
"""Operators in ONNX's domain that the runtime makes of several nodes."""


def row_of(path: str) -> dict[str, Any]:
    """The nodes of a file after the runtime's rewrites.

    - on_device: the number of nodes on CUDA;
    - on_cpu: operators whose nodes run on the CPU, with their number. Where there are no copies,
      these compute shapes;
    - copies: what every run copies between host and device;
    - fused: operators that do the work of several, with their number;
    - uncapturable: why no CUDA graph can be captured; empty where one can.
    """
    try:
        session, graph = placed_graph(path, "cuda")
    except Exception as error:  # the runtime's own classes, one for each status
        return {"refused": reason_of(error)}
    assert session.get_providers()[0] == CUDA, "the CUDA provider did not load"
    nodes = nodes_by_provider(session)
    return {
        "on_device": sum(nodes.get("cuda", {}).values()),
        "on_cpu": nodes.get("cpu", {}),
        "copies": copies_in(graph),
        "fused": fused(graph),
        "uncapturable": why_uncapturable(path, "cuda"),
    }


def reason_of(error: Exception) -> str:
    """The reason in the runtime's text, between its codes and what the system's loader says."""
    return str(error).rpartition(" : ")[2].partition(": ")[0].strip()


def fused(graph: onnx.GraphProto) -> dict[str, int]:
    """The operators that do the work of several, with their number."""
    operators = [
        node.op_type
        for inner in graphs(graph)
        for node in inner.node
        if node.domain in CONTRIBUTED or node.op_type in FUSED_OF_ONNX
    ]
    return dict(Counter(operators))


if __name__ == "__main__":
    print(json.dumps(row_of(sys.argv[1])))
