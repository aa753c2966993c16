"""Nodes of a file at which ONNX Runtime's CUDA provider copies between host and device.

The provider itself is asked where it is installed (provider_nodes.py). This is a list of what it
would answer, for a machine without a GPU; tests/cuda compares the list with the provider's own
answers. Sizes are computed on the CPU, and the kernels on the device that want sizes read them
there. So a copy, after which no CUDA graph can be captured, is made

1. where an operator has no CUDA kernel for its dtype;
2. where a node of control flow reads its condition;
3. where a computed size meets a number of the device, other than as a size;
4. where a number of the device is read as a size, so that a shape depends on data.

A layer with its own state needs cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lora_fx.onnx.host_sizes import computed_inputs, computes_sizes
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

CONTROL_FLOW = ("If", "Loop", "Scan")
RECURRENT = ("GRU", "LSTM", "RNN")
NO_KERNEL = ("ConcatFromSequence", "SequenceAt", "Unique")
NO_KERNEL_FOR_INTEGERS = ("Pad",)


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
    return list(_in_nodes(model.graph, set()))


def cuda_fields(obstacles: Sequence[Obstacle]) -> Json:
    """Return the object `cuda` of docs/json.md for a file with these obstacles."""
    return {
        "capturable": not obstacles,
        "obstacles": [asdict(obstacle) for obstacle in obstacles],
    }


def _in_nodes(nodes: Iterable[ir.Node], sizes: set[ir.Value]) -> Iterator[Obstacle]:
    """Yield the obstacles among nodes in their order, those of inner graphs included.

    Args:
        nodes: The nodes of a graph.
        sizes: Values on the CPU: those of Shape, and what is computed of them and of constants
            alone. Those of these nodes are added.
    """
    for node in nodes:
        reason = _own_reason(node, sizes)
        if reason:
            yield Obstacle(node.op_type, node.name or "", reason)
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                yield from _in_nodes(attribute.as_graph(), sizes)

        as_sizes, as_numbers = computed_inputs(node)
        if computes_sizes(node, sizes):
            sizes.update(node.outputs)
        elif sizes.intersection(as_numbers) and not reason:
            reason = "computes with a size, which is copied to the device in every run"
            yield Obstacle(node.op_type, node.name or "", reason)
        if any(value.producer() is not None for value in as_sizes - sizes) and not reason:
            reason = "has a size that depends on data, and is copied to the host in every run"
            yield Obstacle(node.op_type, node.name or "", reason)


def _own_reason(node: ir.Node, sizes: set[ir.Value]) -> str:
    """Return why a node is an obstacle wherever its inputs are; empty where it is none.

    A Pad of sizes is none: it is on the CPU as they are.
    """
    if node.op_type in CONTROL_FLOW:
        return "is control flow: its condition is copied to the host in every run"
    if node.op_type in RECURRENT:
        return "needs cuDNN"
    if node.op_type in NO_KERNEL:
        return "has no CUDA kernel: what it reads and writes is copied in every run"
    if lacks_kernel_for_integers(node) and node.inputs[0] not in sizes:
        return "has no CUDA kernel for integers: what it reads and writes is copied in every run"
    return ""


def lacks_kernel_for_integers(node: ir.Node) -> bool:
    """Whether a node computes integers with an operator that has a CUDA kernel for floats alone."""
    if node.domain or node.op_type not in NO_KERNEL_FOR_INTEGERS:
        return False
    value = node.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.is_integer()
