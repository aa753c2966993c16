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

from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

CONTROL_FLOW = ("If", "Loop", "Scan")
RECURRENT = ("GRU", "LSTM", "RNN")
NO_KERNEL = ("ConcatFromSequence", "SequenceAt", "Unique")
NO_KERNEL_FOR_INTEGERS = ("Pad",)
ALL_INPUTS = range(16)
READ_ON_HOST = {
    "ConstantOfShape": ALL_INPUTS,
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": ALL_INPUTS,
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
"""Operator → its inputs that CUDA's kernels read in the memory of the host."""


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
        reason = _own_reason(node)
        if reason:
            yield Obstacle(node.op_type, node.name or "", reason)
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                yield from _in_nodes(attribute.as_graph(), sizes)

        as_sizes, as_numbers = _computed_inputs(node)
        sizes_as_numbers = sizes.intersection(as_numbers)
        if node.op_type in ("Shape", "Size") or (
            as_numbers and len(sizes_as_numbers) == len(as_numbers)
        ):
            sizes.update(node.outputs)
        elif sizes_as_numbers and not reason:
            reason = "computes with a size, which is copied to the device in every run"
            yield Obstacle(node.op_type, node.name or "", reason)
        if any(value.producer() is not None for value in as_sizes - sizes) and not reason:
            reason = "has a size that depends on data, and is copied to the host in every run"
            yield Obstacle(node.op_type, node.name or "", reason)


def _computed_inputs(node: ir.Node) -> tuple[set[ir.Value], set[ir.Value]]:
    """Return the inputs of a node that are no constants: those read on the host, and the others."""
    as_sizes = set()
    as_numbers = set()
    read_on_host = READ_ON_HOST.get(node.op_type, ())
    for i, value in enumerate(node.inputs):
        if value is None or _is_constant(value):
            continue
        if i in read_on_host:
            as_sizes.add(value)
        else:
            as_numbers.add(value)
    return as_sizes, as_numbers


def _own_reason(node: ir.Node) -> str:
    """Return why a node is an obstacle whatever its inputs are; empty where it is none."""
    if node.op_type in CONTROL_FLOW:
        return "is control flow: its condition is copied to the host in every run"
    if node.op_type in RECURRENT:
        return "needs cuDNN"
    if node.op_type in NO_KERNEL:
        return "has no CUDA kernel: what it reads and writes is copied in every run"
    if node.op_type in NO_KERNEL_FOR_INTEGERS and _is_integer(node.inputs[0]):
        return "has no CUDA kernel for integers: what it reads and writes is copied in every run"
    return ""


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is an initialiser that no caller replaces, or a Constant's."""
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant"
    return value.is_initializer()


def _is_integer(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()
