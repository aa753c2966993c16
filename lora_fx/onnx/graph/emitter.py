"""onnx_ir as an Emitter: nodes at a site, each marked as part of its branch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.ir.graph import Deferred, Role, Site
from lora_fx.onnx.graph.flow import OnnxWeightUse
from lora_fx.onnx.graph.marks import MARK, VIEW
from lora_fx.onnx.graph.values import dtype_name, shape_of


def as_tensor(value: Array | Deferred, name: str) -> ir.TensorProtocol:
    """Return the array as a tensor; a deferred array is computed at each read."""
    if not isinstance(value, Deferred):
        return ir.tensor(value, name=name)
    dtype = ir.DataType.from_numpy(numpy_dtype(value.dtype))
    compute = value.compute
    return ir.LazyTensor(lambda: ir.tensor(compute()), dtype, ir.Shape(value.shape), name=name)


def add_initialiser(
    graph: ir.Graph, name: str, value: Array | Deferred, mark: str = ""
) -> ir.Value:
    """Add an initialiser; `mark` is the site of the branch that it belongs to."""
    marked = {MARK: mark} if mark else None
    initialiser = ir.val(name, const_value=as_tensor(value, name), metadata_props=marked)
    graph.initializers[name] = initialiser
    return initialiser


OF_CODES = {"bits", "block_size", "gather_axis", "quantize_axis"}
"""Attributes of a lookup of codes, which a lookup of floats does not have."""
PLAIN = {
    "matmul": "MatMul",
    "div": "Div",
    "gather": "Gather",
    "einsum": "Einsum",
    "transpose": "Transpose",
}
"""Primitives that are one node with the same operands and attributes."""


class EmittingGraph(Protocol):
    """The methods that an emitter needs of the OnnxGraph that it inserts into."""

    model: ir.Model

    def fresh(self, stem: str) -> str:
        """Return a name that no value has."""

    def changed(self) -> None:
        """Drop all analyses of the graph, after an edit."""


@dataclass(eq=False, repr=False)
class OnnxEmitter:
    """An emitter that inserts nodes in order after the site's node, or before it.

    Attributes:
        owner: The graph that the nodes are added to.
        node: The node that they stand beside.
        mark: The site's id, which every node is marked with.
        found: The site's use of its weight; None where the nodes belong to no site.
        before: Whether the nodes stand before `node`, and not after it.
        viewing: Whether the nodes are views of W + ΔW, which find follows to the weight.
    """

    owner: EmittingGraph
    node: ir.Node
    mark: str
    found: OnnxWeightUse | None = None
    before: bool = field(kw_only=True)
    viewing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Place the first node next to the site's node; later ones follow each other."""
        self.last = self.node

    def call(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node of an ONNX op; return its first result."""
        return self._place(ir.node(op, inputs, attributes))

    def results(self, op: str, *inputs: ir.Value, count: int, **attributes: Any) -> list[ir.Value]:
        """Add a node of an ONNX op; return all its results."""
        node = ir.node(op, inputs, attributes, num_outputs=count)
        self._place(node)
        return list(node.outputs)

    def _place(self, node: ir.Node) -> ir.Value:
        """Mark a node, name its results, and insert it; return its first result."""
        node.metadata_props[MARK] = self.mark
        if self.viewing:
            node.metadata_props[VIEW] = "of the weight form"
        for value in node.outputs:
            value.name = self.owner.fresh(f"{self.mark}_lora")
        if self.before:
            self.node.prepend(node)
        else:
            self.last.append(node)
            self.last = node
        self.owner.changed()
        return node.outputs[0]

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: Array) -> ir.Value:
        name = self.owner.fresh(f"{self.mark}_lora_const")
        return add_initialiser(self.owner.model.graph, name, value, self.mark)

    def op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        """Add the node of one primitive of the closed set; see lora_fx.ir.emitter.Ops."""
        result = self._op(prim, *xs, **attrs)
        # onnx_ir infers no types, and later casts ask for this one
        first = next((x for x in xs if isinstance(x, ir.Value)), None)
        if result.dtype is None and first is not None and first.dtype is not None:
            result.type = ir.TensorType(first.dtype)
        return result

    def _op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        if prim in PLAIN:
            return self.call(PLAIN[prim], *xs, **attrs)
        if prim in ("add", "mul"):
            return self._add_or_mul(prim, *xs)
        if prim == "where":
            picked = self.call("Where", *xs)
            picked.type = xs[1].type  # the first operand is a mask
            return picked
        if prim == "norm":
            return self._norm(xs[0])
        if prim in ("detach", "dropout"):  # a file has no gradients and is no training graph
            assert isinstance(xs[0], ir.Value)
            return xs[0]
        if prim == "repeat":
            return self._repeat(xs[0], attrs["times"])
        if prim == "reshape":
            return self.call("Reshape", xs[0], self._ints(*attrs["shape"]))
        if prim == "slice":
            start = self._ints(attrs["start"])
            stop = self._ints(attrs["stop"])
            axis = self._ints(attrs["axis"])
            return self.call("Slice", xs[0], start, stop, axis)
        if prim == "pad":
            return self.call("Pad", xs[0], self._ints(*attrs["before"], *attrs["after"]))
        if prim == "conv":
            return self.call("Conv", *xs, group=attrs["groups"])
        if prim == "cast":
            return self._cast(xs[0], attrs["dtype"])
        if prim == "cast_like":
            return self._cast_like(*xs)
        raise MistakeError(f"the ONNX emitter has no primitive {prim!r}")

    def _add_or_mul(self, prim: str, x: ir.Value, y: ir.Value | float) -> ir.Value:
        """Emit x + y or x · y; a number y becomes a constant in the dtype of x."""
        if isinstance(y, (int, float)):
            dtype = numpy_dtype(dtype_name(x) or "float32")
            y = self._constant(np.array(y, np.float32).astype(dtype))
        return self.call(prim.title(), x, y)

    def _norm(self, x: ir.Value) -> ir.Value:
        """Emit the Euclidean norm along the last axis."""
        if self._opset < 18:
            return self.call("ReduceL2", x, axes=[-1], keepdims=1)
        return self.call("ReduceL2", x, self._ints(-1), keepdims=1)

    def _repeat(self, x: ir.Value, times: int) -> ir.Value:
        """Emit x with every element of the last axis repeated `times` times in place."""
        shape = [int(size) for size in shape_of(x) or ()]
        column_shape = self._ints(*shape, 1)
        repeated_shape = self._ints(*shape, times)
        columns = self.call("Reshape", x, column_shape)
        repeated = self.call("Expand", columns, repeated_shape)
        return self.call("Reshape", repeated, self._ints(*shape[:-1], -1))

    def _cast_like(self, x: ir.Value, model: ir.Value) -> ir.Value:
        """Emit x in the dtype of another value, which may be known only at run time."""
        dtype = dtype_name(model)
        if dtype:
            return self._cast(x, dtype)
        if self._opset < 15:
            raise LoraFxError(
                f"the dtype of {model.name!r} is unknown, and only opset 15 or later can cast "
                "to an unknown dtype",
                "write the dtypes into the file with onnx.shape_inference.infer_shapes(model)",
            )
        return self.call("CastLike", x, model)

    @property
    def _opset(self) -> int:
        return self.owner.model.opset_imports.get("", 0)

    def _cast(self, x: ir.Value, dtype: str) -> ir.Value:
        if dtype_name(x) == dtype:
            return x
        onnx_dtype = ir.DataType.from_numpy(numpy_dtype(dtype))
        result = self.call("Cast", x, to=int(onnx_dtype))
        result.type = ir.TensorType(onnx_dtype)
        return result

    def like(self, site: Site, x: ir.Value, w: ir.Value) -> ir.Value:
        """Emit the site's own op with other operands; keep its attributes, leave out the bias."""
        assert self.found is not None
        node = self.found.node
        use = self.found.use
        row = self.found.row
        inputs = list(node.inputs)
        inputs[use.x] = x
        inputs[use.weight] = w
        if row.bias is not None and row.bias < len(inputs):
            inputs = inputs[: row.bias]
        attributes = list(node.attributes.values())
        if row.twin:  # codes have been decoded: the op of floats takes their place
            attributes = [a for a in attributes if a.name not in OF_CODES]
            copy = ir.Node("", row.twin, inputs[:2], attributes)
        else:
            copy = ir.Node(node.domain, node.op_type, inputs, attributes)
        result = self._place(copy)
        if w.dtype is not None:
            result.type = ir.TensorType(w.dtype)
        return result

    def parameter(self, name: str, value: Array, role: Role) -> ir.Value:
        """Add an initialiser, or return the existing one; `role` decides if it is a graph input.

        An optional input has the value as its default.
        """
        graph = self.owner.model.graph
        existing = graph.initializers.get(name)
        if existing is not None:
            return existing
        initialiser = add_initialiser(graph, name, value, self.mark)
        if role is Role.OPTIONAL_INPUT:
            graph.inputs.append(initialiser)
        return initialiser
