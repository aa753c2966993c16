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
    """The array as a tensor; a deferred one is computed each time that it is read."""
    if not isinstance(value, Deferred):
        return ir.tensor(value, name=name)
    dtype = ir.DataType.from_numpy(numpy_dtype(value.dtype))
    compute = value.compute
    return ir.LazyTensor(lambda: ir.tensor(compute()), dtype, ir.Shape(value.shape), name=name)


def add_initialiser(
    graph: ir.Graph, name: str, value: Array | Deferred, mark: str = ""
) -> ir.Value:
    """A new initialiser; `mark` is the site of the branch that it belongs to."""
    marked = {MARK: mark} if mark else None
    v = ir.val(name, const_value=as_tensor(value, name), metadata_props=marked)
    graph.initializers[name] = v
    return v


OF_CODES = {"bits", "block_size", "gather_axis", "quantize_axis"}
"""Attributes of a lookup of codes, which one of floats does not have."""
PLAIN = {"matmul": "MatMul", "div": "Div", "gather": "Gather", "einsum": "Einsum",
         "transpose": "Transpose"}  # fmt: skip
"""Primitives that are a node of the same operands and attributes."""


class EmittingGraph(Protocol):
    """What an emitter needs of the OnnxGraph that it inserts into."""

    model: ir.Model

    def fresh(self, stem: str) -> str:
        """A name that no value has."""

    def changed(self) -> None:
        """Drop what is known of the graph as it was."""


@dataclass(eq=False, repr=False)
class OnnxEmitter:
    """Inserts in order, after the site's node or before it, in the graph or body that holds it."""

    owner: EmittingGraph
    node: ir.Node
    mark: str
    found: OnnxWeightUse | None = None
    before: bool = field(kw_only=True)
    viewing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """The first node stands beside the site's, each other one after the last."""
        self.last = self.node

    def call(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node of an ONNX op and give its first result."""
        return self._place(ir.node(op, inputs, attributes))

    def results(self, op: str, *inputs: ir.Value, count: int, **attributes: Any) -> list[ir.Value]:
        """Add a node of an ONNX op and give all its results."""
        made = ir.node(op, inputs, attributes, num_outputs=count)
        self._place(made)
        return list(made.outputs)

    def _place(self, new: ir.Node) -> ir.Value:
        new.metadata_props[MARK] = self.mark
        if self.viewing:
            new.metadata_props[VIEW] = "of the weight form"
        for value in new.outputs:
            value.name = self.owner.fresh(f"{self.mark}_lora")
        if self.before:
            self.node.prepend(new)
        else:
            self.last.append(new)
            self.last = new
        self.owner.changed()
        return new.outputs[0]

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: Array) -> ir.Value:
        name = self.owner.fresh(f"{self.mark}_lora_const")
        return add_initialiser(self.owner.model.graph, name, value, self.mark)

    def op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        """Add the node of one primitive of the closed set; see lora_fx.ir.layout.Ops."""
        made = self._op(prim, *xs, **attrs)
        # onnx_ir infers no types, and later casts ask for this one
        first = next((x for x in xs if isinstance(x, ir.Value)), None)
        if made.dtype is None and first is not None and first.dtype is not None:
            made.type = ir.TensorType(first.dtype)
        return made

    def _op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        if prim in PLAIN:
            return self.call(PLAIN[prim], *xs, **attrs)
        if prim in ("add", "mul"):
            x, y = xs
            if isinstance(y, (int, float)):
                kind = numpy_dtype(dtype_name(x) or "float32")
                y = self._constant(np.array(y, np.float32).astype(kind))
            return self.call(prim.title(), x, y)
        if prim == "norm":
            if self.owner.model.opset_imports.get("", 0) < 18:
                return self.call("ReduceL2", xs[0], axes=[-1], keepdims=1)
            return self.call("ReduceL2", xs[0], self._ints(-1), keepdims=1)
        if prim in ("detach", "dropout"):  # a file has no gradients and is no training graph
            assert isinstance(xs[0], ir.Value)
            return xs[0]
        if prim == "repeat":
            shape = [int(n) for n in shape_of(xs[0]) or ()]
            one, wide = self._ints(*shape, 1), self._ints(*shape, attrs["times"])
            wide = self.call("Expand", self.call("Reshape", xs[0], one), wide)
            return self.call("Reshape", wide, self._ints(*shape[:-1], -1))
        if prim == "reshape":
            return self.call("Reshape", xs[0], self._ints(*attrs["shape"]))
        if prim == "slice":
            bounds = (self._ints(attrs[k]) for k in ("start", "stop", "axis"))
            return self.call("Slice", xs[0], *bounds)
        if prim == "pad":
            return self.call("Pad", xs[0], self._ints(*attrs["before"], *attrs["after"]))
        if prim == "conv":
            return self.call("Conv", *xs, group=attrs["groups"])
        if prim == "cast":
            return self._cast(xs[0], attrs["dtype"])
        if prim == "cast_like":
            wanted = dtype_name(xs[1])
            if wanted:
                return self._cast(xs[0], wanted)
            if self.owner.model.opset_imports.get("", 0) < 15:
                raise LoraFxError(
                    f"the dtype of {xs[1].name!r} is unknown, and opset 15 is needed to ask for it",
                    "onnx.shape_inference.infer_shapes(model) writes dtypes into the file",
                )
            return self.call("CastLike", *xs)
        raise MistakeError(f"the ONNX emitter has no primitive {prim!r}")

    def _cast(self, x: ir.Value, dtype: str) -> ir.Value:
        if dtype_name(x) == dtype:
            return x
        to = ir.DataType.from_numpy(numpy_dtype(dtype))
        made = self.call("Cast", x, to=int(to))
        made.type = ir.TensorType(to)
        return made

    def like(self, site: Site, x: ir.Value, w: ir.Value) -> ir.Value:
        """The site's own op on other operands, its attributes kept and its bias left out."""
        assert self.found is not None
        node, use, row = self.found.node, self.found.use, self.found.row
        inputs = list(node.inputs)
        inputs[use.x], inputs[use.weight] = x, w
        if row.bias is not None and row.bias < len(inputs):
            inputs = inputs[: row.bias]
        attributes = list(node.attributes.values())
        domain, op = node.domain, node.op_type
        if row.twin:
            domain, op, inputs = "", row.twin, inputs[:2]
            attributes = [a for a in attributes if a.name not in OF_CODES]
        made = self._place(ir.Node(domain, op, inputs, attributes))
        if w.dtype is not None:
            made.type = ir.TensorType(w.dtype)
        return made

    def parameter(self, name: str, value: Array, role: Role) -> ir.Value:
        """A new initialiser, or the one of that name; an input of the graph where `role` says so.

        An optional input has the value as its default.
        """
        graph = self.owner.model.graph
        known = graph.initializers.get(name)
        if known is not None:
            return known
        made = add_initialiser(graph, name, value, self.mark)
        if role is Role.OPTIONAL_INPUT:
            graph.inputs.append(made)
        return made
