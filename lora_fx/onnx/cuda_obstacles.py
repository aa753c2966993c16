"""Nodes of a file at which ONNX Runtime's CUDA provider copies between host and device.

The provider itself is asked where it is installed (provider_nodes.py). This is a list of what it
would answer, for a machine without a GPU; tests/cuda compares the list with the provider's own
answers. Sizes are computed on the CPU, and the kernels on the device that want sizes read them
there. So a copy, after which no CUDA graph can be captured, is made

1. where an operator is not known to have a CUDA kernel for its dtypes (cuda_kernels.py);
2. where a node of control flow reads its condition;
3. where a computed size meets a number of the device, other than as a size;
4. where a number of the device is read as a size, or a kernel counts its results, so that a shape
   depends on data.

Some layers need cuDNN. What is computed of constants alone, the runtime computes when it loads the
file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lora_fx.onnx.cuda_kernels import UNKNOWN, why_no_kernel
from lora_fx.onnx.host_sizes import SIZES_OF_VALUES, computed_inputs
from lora_fx.onnx.value_dtypes import ValueDtypes
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

CONTROL_FLOW = ("If", "Loop", "Scan")
NEED_CUDNN = ("GRU", "LRN", "LSTM", "RNN")
COUNTED = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
"""Operators with as many results as they find, a number that the host waits for."""
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
          "RandomUniformLike")  # fmt: skip


@dataclass(frozen=True)
class Obstacle:
    """One node that makes a session on CUDA slower, or impossible.

    Attributes:
        op: Its operator.
        node: Its name.
        reason: Why, as a clause.
    """

    op: str
    node: str
    reason: str

    def __str__(self) -> str:
        """Return the obstacle as a line."""
        return f"{self.op} {self.node!r} {self.reason}"


def cuda_obstacles(model: ir.Model) -> list[Obstacle]:
    """Return the nodes at which CUDA copies between host and device, or that it cannot load."""
    return list(_Walk(model.opset_imports.get("", 1)).obstacles(model.graph))


def cuda_fields(obstacles: Sequence[Obstacle]) -> Json:
    """Return the object `cuda` of docs/json.md for a file with these obstacles."""
    return {
        "capturable": not obstacles,
        "obstacles": [asdict(obstacle) for obstacle in obstacles],
    }


class _Walk:
    """A walk over the nodes of a graph, in their order, and over those of its inner graphs."""

    def __init__(self, opset: int) -> None:
        """Start with nothing known.

        Args:
            opset: The version of ONNX's operators in the file.
        """
        self.opset = opset
        self.dtypes = ValueDtypes(opset)
        self.sizes: set[ir.Value] = set()
        """Values on the CPU: those of Shape, and what is computed of them and of constants."""
        self.folded: set[ir.Value] = set()
        """Values that are computed of constants alone."""

    def obstacles(self, nodes: Iterable[ir.Node]) -> Iterator[Obstacle]:
        """Yield the obstacles among nodes."""
        for node in nodes:
            self.dtypes.add(node)
            reason = self._reason(node)
            if reason:
                yield Obstacle(node.op_type, node.name or "", reason)
            for attribute in node.attributes.values():
                if attribute.type.name == "GRAPH":
                    yield from self.obstacles(attribute.as_graph())

    def _reason(self, node: ir.Node) -> str:
        """Return why a node is an obstacle, as a clause; empty where it is none."""
        if node.op_type in CONTROL_FLOW:
            return "is control flow: its condition is copied to the host in every run"
        if node.op_type in NEED_CUDNN:
            return "needs cuDNN"

        as_sizes, as_numbers = computed_inputs(node)
        as_sizes -= self.folded
        as_numbers -= self.folded
        if not as_sizes | as_numbers and node.op_type not in RANDOM:
            self.folded.update(node.outputs)
            return ""

        on_cpu = bool(as_numbers) and as_numbers <= self.sizes
        if on_cpu or node.op_type in SIZES_OF_VALUES:
            self.sizes.update(node.outputs)
        reason = "" if on_cpu else self._on_device(node, as_numbers)
        if not reason and any(value.producer() is not None for value in as_sizes - self.sizes):
            reason = "has a size that depends on data, and is copied to the host in every run"
        return reason

    def _on_device(self, node: ir.Node, as_numbers: set[ir.Value]) -> str:
        """Return why a node that should be on the device is an obstacle; empty where it is none."""
        lacking = why_no_kernel(node, self.opset, self.dtypes)
        if lacking:
            copied = "may be" if lacking.startswith(UNKNOWN) else "is"
            return f"{lacking}: what it reads and writes {copied} copied in every run"
        if node.op_type in COUNTED:
            return "has a shape that depends on data, and is copied to the host in every run"
        if self.sizes.intersection(as_numbers):
            return "computes with a size, which is copied to the device in every run"
        return ""
