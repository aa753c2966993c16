"""Print where ONNX Runtime's CUDA provider puts the nodes of a file, as JSON.

Tests start this as a script in a child process that sees the stand-in:
`python tests/cuda/placed.py FILE`. The runtime partitions and fuses the graph, and says whether a
CUDA graph of the session can be captured. Nothing is run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from lora_fx.onnx.provider_nodes import CUDA, RECORD, nodes_by_provider
from lora_fx.onnx.runtime_log import quiet_options

COPIES = {"MemcpyToHost": "to host", "MemcpyFromHost": "to device"}
"""The runtime's own nodes, and where they copy to."""
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


def placement_of(path: str) -> dict[str, Any]:
    """The nodes of a file after the runtime's rewrites.

    - on_device: the number of nodes on CUDA;
    - on_cpu: operators whose nodes run on the CPU, with their number. Where there are no copies,
      these compute shapes;
    - copies: what every run copies between host and device;
    - fused: operators that do the work of several, with their number;
    - uncapturable: why no CUDA graph can be captured; empty where one can.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = str(Path(folder, "m.onnx"))
        try:
            session = opened(path, {}, saved)
        except Exception as error:  # the runtime's own classes, one for each status
            return {"refused": reason_of(error)}
        assert session.get_providers()[0] == CUDA, "the CUDA provider did not load"
        graph = onnx.load(saved, load_external_data=False).graph

    nodes = nodes_by_provider(session)
    return {
        "on_device": sum(nodes.get("cuda", {}).values()),
        "on_cpu": nodes.get("cpu", {}),
        "copies": [copy for inner in graphs(graph) for copy in copies_in(inner)],
        "fused": fused(graph),
        "uncapturable": why_uncapturable(path),
    }


def opened(path: str, options: Mapping[str, str], saved: str = "") -> ort.InferenceSession:
    """A session on CUDA, with the options of lora_fx.onnx.session."""
    settings = quiet_options()
    settings.add_session_config_entry(*RECORD)
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if saved:
        settings.optimized_model_filepath = saved
    providers = [(CUDA, {"use_tf32": "0", **options}), "CPUExecutionProvider"]
    return ort.InferenceSession(path, settings, providers=providers)


def reason_of(error: Exception) -> str:
    """The reason in the runtime's text, between its codes and what the system's loader says."""
    return str(error).rpartition(" : ")[2].partition(": ")[0].strip()


def why_uncapturable(path: str) -> str:
    """The reason for which the runtime captures no CUDA graph of a file; empty where it does."""
    try:
        opened(path, {"enable_cuda_graph": "1"})
    except Exception as error:
        return str(error).rpartition("as requested by the user")[2].strip().removeprefix("as ")
    return ""


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from graphs(inner)


def copies_in(graph: onnx.GraphProto) -> Iterator[str]:
    """The copies in a graph that the runtime has partitioned, as "Where → to host → Unique"."""
    source_of = {value.name: "input" for value in graph.input}
    readers_of: dict[str, set[str]] = {value.name: {"output"} for value in graph.output}
    for node in graph.node:
        source_of.update(dict.fromkeys(node.output, node.op_type))
        for name in node.input:
            readers_of.setdefault(name, set()).add(node.op_type)
    for node in graph.node:
        if node.op_type in COPIES:
            source = source_of.get(node.input[0], "initialiser")
            readers = ", ".join(sorted(readers_of.get(node.output[0], set())))
            yield f"{source} → {COPIES[node.op_type]} → {readers}"


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
    print(json.dumps(placement_of(sys.argv[1])))
