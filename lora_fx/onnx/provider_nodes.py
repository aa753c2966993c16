"""Where ONNX Runtime has put the nodes of a session, as the session itself says."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

CUDA = "CUDAExecutionProvider"
NAMES = {
    CUDA: "cuda",
    "CudaPluginExecutionProvider": "cuda",
    "WebGpuExecutionProvider": "webgpu",
}
"""The runtime's names of its providers on devices → ours. CUDA's plugin had its own at first."""
RECORD = ("session.record_ep_graph_assignment_info", "1")
"""The option with which a session keeps where its nodes are."""


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, dict[str, int]]:
    """Return the number of nodes by operator, under our name of each provider.

    Args:
        session: Made with the option RECORD.
    """
    by_provider: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        name = NAMES.get(part.ep_name, "cpu")
        operators = [node.op_type for node in part.get_nodes()]
        by_provider.setdefault(name, Counter()).update(operators)
    return {name: dict(counts) for name, counts in by_provider.items()}
