"""Values that ONNX Runtime computes on the CPU beside a device: sizes, and numbers made of them.

Shape gives its result on the CPU, and so does a node whose inputs come from there. Kernels of the
device that want a size read it in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

SIZES_OF_VALUES = ("SequenceLength", "Shape", "Size")
"""Operators whose kernels on the device write their results on the host."""
ALL_INPUTS = range(16)
READ_ON_HOST = {
    "ConstantOfShape": ALL_INPUTS,
    "CumSum": (1,),
    "Dropout": (1, 2),
    "Expand": (1,),
    "GroupQueryAttention": (6,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": ALL_INPUTS,
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "SequenceInsert": (2,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Operator → its inputs that CUDA's kernels read in the memory of the host."""


def host_sizes(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return the values on the CPU among those of nodes, which are in the order of a graph."""
    sizes: set[ir.Value] = set()
    for node in nodes:
        if computes_sizes(node, sizes):
            sizes.update(node.outputs)
    return sizes


def computes_sizes(node: ir.Node, sizes: set[ir.Value]) -> bool:
    """Whether the results of a node are on the CPU, where these sizes are.

    They are those of Shape, and what is computed of sizes and of constants alone.
    """
    if node.op_type in SIZES_OF_VALUES:
        return True
    _, as_numbers = computed_inputs(node)
    return bool(as_numbers) and as_numbers <= sizes


def computed_inputs(node: ir.Node) -> tuple[set[ir.Value], set[ir.Value]]:
    """Return the inputs of a node that are no constants: those read on the host, and the others."""
    as_sizes = set()
    as_numbers = set()
    read_on_host = READ_ON_HOST.get(node.op_type, ())
    for i, value in enumerate(node.inputs):
        if value is None or is_constant(value):
            continue
        if i in read_on_host:
            as_sizes.add(value)
        else:
            as_numbers.add(value)
    return as_sizes, as_numbers


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initialiser that no caller replaces, or a Constant's."""
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant"
    return value.is_initializer() and not value.is_graph_input()
