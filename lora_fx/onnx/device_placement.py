"""Where ONNX Runtime runs the nodes of a file on a device, as the provider itself says.

A session is made for each question and never run. It places the nodes on the device or on the CPU,
adds copies between both, and says whether a graph of its kernels can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.errors import one_line
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.graph.proto_graphs import graphs
from lora_fx.onnx.provider_nodes import RECORD, nodes_by_provider
from lora_fx.onnx.runtime_log import quiet_options
from lora_fx.onnx.session import cuda_providers
from lora_fx.onnx.webgpu import cpu_nodes_of, webgpu_devices
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

COPIES = {"MemcpyToHost": "to host", "MemcpyFromHost": "to device"}
"""The runtime's own nodes, and where they copy to."""
CAPTURE = {"cuda": "enable_cuda_graph", "webgpu": "enableGraphCapture"}
"""Provider → the option with which a session captures the graph of its kernels, or is refused."""


@dataclass(frozen=True)
class Placement:
    """What a provider does with a file.

    Attributes:
        nodes: Under the provider's name and under cpu: operator → number of nodes there. Where
            there are no copies, those on the CPU compute shapes.
        copies: What every run copies between host and device, as "Where → to host → Unique".
        uncapturable: Why no graph of the kernels can be captured; empty where one can.
    """

    nodes: Mapping[str, Mapping[str, int]]
    copies: Sequence[str]
    uncapturable: str

    def to_json(self) -> Json:
        """Return the fields of docs/json.md that the provider's own answer fills."""
        return {
            "nodes": {name: dict(counts) for name, counts in self.nodes.items()},
            "copies": list(self.copies),
            "capturable": not self.uncapturable,
            "why": self.uncapturable,
        }


def placement_of(path: str | PathLike[str], provider: str) -> Placement:
    """Return what a provider does with a file that it loads.

    Args:
        path: The .onnx file.
        provider: cuda or webgpu, which must be usable.
    """
    session, graph = placed_graph(path, provider)
    nodes = nodes_by_provider(session)
    del session  # its weights are on the device
    return Placement(nodes, copies_in(graph), why_uncapturable(path, provider))


def placed_graph(
    path: str | PathLike[str], provider: str
) -> tuple[ort.InferenceSession, onnx.GraphProto]:
    """Return a session on a device, and the graph that the runtime made of the file for it."""
    import onnx

    with scratch_folder() as folder:
        saved = Path(folder, "placed.onnx")
        session = _session(path, provider, {}, saved)
        return session, onnx.load(saved, load_external_data=False).graph


def _session(
    path: str | PathLike[str],
    provider: str,
    provider_options: Mapping[str, str],
    saved: Path | None = None,
) -> ort.InferenceSession:
    """Make a session on a device, with the options of lora_fx.onnx.session.

    Args:
        path: The .onnx file.
        provider: cuda or webgpu.
        provider_options: Its options beside those.
        saved: Where the runtime writes the graph that it made of the file; its weights go beside.
    """
    import onnxruntime as ort

    options = quiet_options()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if saved is not None:
        options.optimized_model_filepath = fspath(saved)
        weights = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(weights, f"{saved.name}.data")
    providers = None
    if provider == "webgpu":
        device_options = {**cpu_nodes_of(path).options, **provider_options}
        options.add_provider_for_devices([webgpu_devices()[0]], device_options)
        options.add_session_config_entry(*RECORD)
    else:
        providers = cuda_providers(options, {"use_tf32": "0", **provider_options})
    return ort.InferenceSession(fspath(path), options, providers=providers)


def why_uncapturable(path: str | PathLike[str], provider: str) -> str:
    """Return the reason for which a provider captures no graph of a file; empty where it does."""
    try:
        _session(path, provider, {CAPTURE[provider]: "1"})
    except Exception as error:  # the runtime's own classes, one for each status
        text = str(error)
        reason = text.rpartition("as requested by the user")[2].strip().removeprefix("as ")
        return one_line(reason, 240)
    return ""


def copies_in(graph: onnx.GraphProto) -> list[str]:
    """Return the copies in a graph that the runtime has partitioned, and in its inner graphs."""
    return [copy for inner in graphs(graph) for copy in _own_copies(inner)]


def _own_copies(graph: onnx.GraphProto) -> Iterator[str]:
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
