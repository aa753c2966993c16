"""Nodes that WebGPU's provider computes wrongly, or fails at in a run: they run on the CPU.

All of this is of onnxruntime-ep-webgpu 0.4.0. tests/onnx/test_webgpu_faults.py has a reproduction
of each fault, which fails when the package has mended it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto

from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.proto_graphs import graphs

FAULTY = "onnxruntime-ep-webgpu 0.4.0"
SAME_SHAPE = ("Add", "Cast", "DequantizeLinear", "Mul")
"""Operators whose output has the shape of a stored weight that is their first input."""


@dataclass(frozen=True)
class CpuNodes:
    """The nodes of a file that run on the CPU.

    Attributes:
        names: Their names.
        note: A line for the user; empty if there are none.
    """

    names: Sequence[str] = ()
    note: str = ""

    @property
    def options(self) -> dict[str, str]:
        """The provider's options that keep them there."""
        return {"forceCpuNodeNames": "\n".join(self.names)} if self.names else {}


def cpu_nodes(model: ModelProto) -> CpuNodes:
    """Return the nodes that the provider computes wrongly or not at all.

    Args:
        model: Stored weights need no values.

    Raises:
        LoraFxError: Such a node has no name, by which the provider could be told.
    """
    wrong = [node for graph in graphs(model.graph) for node in _wrong_in(graph)]
    unnamed = [node for node in wrong if not node.name]
    for function in model.functions:  # the runtime copies their nodes under other names
        unnamed += [node for node in function.node if _may_be_wrong(node, {})]
    if unnamed:
        raise LoraFxError(
            f"a node {unnamed[0].op_type} without a name of its own, which {FAULTY} computes "
            "wrongly or not at all, cannot be put on the CPU",
            "use cpu; or give every node of the graph a name",
        )
    if not wrong:
        return CpuNodes()
    counts = Counter(node.op_type for node in wrong)
    listed = ", ".join(f"{count} {operator}" for operator, count in sorted(counts.items()))
    note = f"on the CPU, as {FAULTY} computes such nodes wrongly or not at all: {listed}"
    return CpuNodes([node.name for node in wrong], note)


def _wrong_in(graph: GraphProto) -> list[NodeProto]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in SAME_SHAPE and len(shapes.get(node.input[0], ())) > 2:
            shapes[node.output[0]] = shapes[node.input[0]]
    return [node for node in graph.node if _may_be_wrong(node, shapes)]


def _may_be_wrong(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the provider computes a node wrongly, or may: the shape of its weight is not known.

    Args:
        node: A node.
        shapes: The shapes of weights by name.
    """
    # On one value and four, [1, 1, 1, 1] and [3, 1, 1, 4], it leaves a program to later runs of
    # any model in the process, in which each row of [1, 1, 4, 4] is the first: a causal mask that
    # masks nothing.
    if node.op_type == "And":
        return True
    if node.op_type == "MaxPool":  # it is taken, and its second output refused in each run
        return len(node.output) > 1
    if node.op_type not in ("Conv", "ConvTranspose", "FusedConv"):
        return False

    shape = shapes.get(node.input[1])
    if shape is None:
        return True
    groups = _groups(node)
    if node.op_type == "ConvTranspose":
        # Of two groups with one output channel each, the second is wrong.
        return groups > 1
    out, in_of_group = shape[:2]
    if groups > 1:
        # Its groups are read as though all of their channels came in fours.
        out_of_group = out // groups
        return out_of_group > 3 and out_of_group % 4 != 0
    # It reads these three channels at a time, and does so rightly of three alone.
    in_threes = in_of_group % 3 == 0 and in_of_group % 4 != 0 and in_of_group != 3
    return in_threes and out % 4 == 0


def _groups(node: NodeProto) -> int:
    for attribute in node.attribute:
        if attribute.name == "group":
            return int(attribute.i)
    return 1
