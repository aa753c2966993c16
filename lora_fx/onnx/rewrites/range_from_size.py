"""Range(s, l, d) + n → Range(s + n, l + n, d), where n is one integer that a device reads of sizes.

The positions of a decoder with its cache are those of its inputs plus the length of the past. The
range is on the device and the length on the host, so their sum copies the length in every run. The
kernel of Range reads its bounds on the host, where sums of sizes are computed as well.

Both have ⌈(l − s) / d⌉ numbers, of which number i is s + d·i + n. Integers are exact; a float
would be rounded in another order, so ranges of floats stay. A range that others read stays beside
the new one.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import constant, delete_unread, made_by, rank, remove_unread
from lora_fx.onnx.host_sizes import host_sizes


@dataclass(frozen=True)
class RangeFromSize(ir.passes.InPlacePass):
    """A rewrite of sums of a range of integers and a size."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        sizes = host_sizes(model.graph)
        names: NewNames | None = None
        for add in list(model.graph):
            found = _range_and_size(add, sizes)
            if found is not None:
                names = names or NewNames(model)
                _replace(model.graph, add, *found, names)
        return ir.passes.PassResult(model, names is not None)


def _range_and_size(add: ir.Node, sizes: set[ir.Value]) -> tuple[ir.Node, ir.Value] | None:
    """Return the Range and the size that a node adds; None for other nodes.

    The size has one number: rank 0, or the shape [1]. Bounds have rank 0; a runtime may take
    others, ONNX does not.
    """
    if add.op_type != "Add" or add.domain:
        return None
    first, second = add.inputs
    for ranged, size in ((first, second), (second, first)):
        source = made_by(ranged, "Range")
        if source is None or size is None or size not in sizes:
            continue
        if any(rank(bound) != 0 for bound in source.inputs[:2]):
            continue
        has_one_number = rank(size) == 0 or (rank(size) == 1 and size.shape == ir.Shape([1]))
        if has_one_number and size.dtype is not None and size.dtype.is_integer():
            return source, size
    return None


def _replace(
    graph: ir.Graph, add: ir.Node, source: ir.Node, size: ir.Value, names: NewNames
) -> None:
    """Replace the sum by a Range between bounds that have the size added."""
    result = add.outputs[0]
    nodes: list[ir.Node] = []

    def scalar(op_type: str, name: str, *inputs: ir.Value) -> ir.Value:
        """Add a node whose result is one number."""
        node = ir.node(op_type, inputs, name=names.take(f"{result.name}_{name}"))
        nodes.append(node)
        number = node.outputs[0]
        number.name = node.name
        number.type = size.type
        number.shape = ir.Shape([])
        return number

    if rank(size) == 1:
        size = scalar("Squeeze", "size", size)
    bounds: list[ir.Value] = []
    for bound, name in zip(source.inputs[:2], ("start", "limit"), strict=True):
        assert bound is not None
        number = constant(bound)
        if number is not None and number == 0:
            bounds.append(size)
            continue
        bounds.append(scalar("Add", name, bound, size))

    nodes.append(ir.node("Range", [*bounds, source.inputs[2]], name=f"{result.name}_Range"))
    shifted = nodes[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, add, [add], nodes, [result], [shifted])
    bounds_before = source.inputs
    remove_unread(source)
    for bound in bounds_before:
        delete_unread(bound)
