"""onnx_ir as an Emitter: nodes at a site, each marked as part of its branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import Role
from lora_fx.ir.graph import Deferred, Site
from lora_fx.onnx.flow import MARK, VIEW, Found
from lora_fx.onnx.views import dtype_name

if TYPE_CHECKING:
    from lora_fx.onnx.graph import OnnxGraph


def as_tensor(value: Array | Deferred, name: str) -> ir.TensorProtocol:
    """An array as a tensor; a deferred one is computed each time that it is read."""
    if not isinstance(value, Deferred):
        return ir.tensor(value, name=name)
    dtype = ir.DataType.from_numpy(numpy_dtype(value.dtype))
    compute = value.compute
    return ir.LazyTensor(lambda: ir.tensor(compute()), dtype, ir.Shape(value.shape), name=name)


def add_initialiser(
    graph: ir.Graph, name: str, value: Array | Deferred, mark: str = ""
) -> ir.Value:
    """A new initialiser; `mark` is the site of the branch that it belongs to."""
    tensor = as_tensor(value, name)
    shape, kind = ir.Shape(value.shape), ir.TensorType(tensor.dtype)
    v = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    if mark:
        v.metadata_props[MARK] = mark
    graph.initializers[name] = v
    return v


class OnnxEmitter:
    """Inserts in order, after the site's node or before it, in the graph or body that holds it."""

    def __init__(self, owner: OnnxGraph, found: Found, *, before: bool) -> None:
        self.owner = owner
        self.found = found
        self.site = found.site
        self.node = found.node
        self.before = before
        self.viewing = False
        self.last = found.node

    def _call(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._place(ir.node(op, inputs, attributes))

    def _place(self, new: ir.Node) -> ir.Value:
        new.metadata_props[MARK] = self.site.id
        if self.viewing:
            new.metadata_props[VIEW] = "of the weight form"
        new.outputs[0].name = self.owner.fresh(f"{self.site.id}_lora")
        graph = self.node.graph
        assert graph is not None
        if self.before:
            graph.insert_before(self.node, new)
        else:
            graph.insert_after(self.last, new)
            self.last = new
        self.owner.changed()
        return new.outputs[0]

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: Array) -> ir.Value:
        name = self.owner.fresh(f"{self.site.id}_lora_const")
        return add_initialiser(self.owner.model.graph, name, value, self.site.id)

    def op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        """One primitive of the closed set (see lora_fx.ir.graph.Emitter)."""
        made = self._op(prim, *xs, **attrs)
        if made.dtype is None:  # later casts ask for it
            dtype = self._dtype(xs, attrs)
            if dtype is not None:
                made.type = ir.TensorType(dtype)
        return made

    def _dtype(self, xs: Any, attrs: Any) -> ir.DataType | None:
        first = next((x for x in xs if isinstance(x, ir.Value)), None)
        return None if first is None else first.dtype

    def _op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        if prim == "matmul":
            return self._call("MatMul", *xs)
        if prim in ("add", "mul"):
            x, y = xs
            if isinstance(y, (int, float)):
                kind = numpy_dtype(dtype_name(x) or "float32")
                y = self._constant(np.array(y, np.float32).astype(kind))
            return self._call(prim.title(), x, y)
        if prim == "div":
            return self._call("Div", *xs)
        if prim == "norm":
            if self.owner.model.opset_imports.get("", 0) < 18:
                return self._call("ReduceL2", xs[0], axes=[-1], keepdims=1)
            return self._call("ReduceL2", xs[0], self._ints(-1), keepdims=1)
        if prim == "detach":  # a file has no gradients
            assert isinstance(xs[0], ir.Value)
            return xs[0]
        if prim == "transpose":
            return self._call("Transpose", xs[0], perm=list(attrs["perm"]))
        if prim == "reshape":
            return self._call("Reshape", xs[0], self._ints(*attrs["shape"]))
        if prim == "slice":
            bounds = (self._ints(attrs[k]) for k in ("start", "stop", "axis"))
            return self._call("Slice", xs[0], *bounds)
        if prim == "pad":
            return self._call("Pad", xs[0], self._ints(*attrs["before"], *attrs["after"]))
        if prim == "einsum":
            return self._call("Einsum", *xs, equation=attrs["equation"])
        if prim == "conv":
            return self._call("Conv", *xs, group=attrs["groups"])
        if prim == "gather":
            return self._call("Gather", *xs)
        if prim == "dropout":  # of training graphs
            assert isinstance(xs[0], ir.Value)
            return xs[0]
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
            return self._call("CastLike", *xs)
        raise LoraFxError(f"the ONNX emitter has no primitive {prim!r}")

    def _cast(self, x: ir.Value, dtype: str) -> ir.Value:
        if dtype_name(x) == dtype:
            return x
        to = ir.DataType.from_numpy(numpy_dtype(dtype))
        made = self._call("Cast", x, to=int(to))
        made.type = ir.TensorType(to)
        return made

    def like(self, site: Site, x: ir.Value, w: ir.Value) -> ir.Value:
        """The site's own op on other operands, attributes kept and bias left out."""
        use, bias = self.found.use, self.found.row.bias
        inputs = list(self.node.inputs)
        inputs[use.x], inputs[use.weight] = x, w
        if bias is not None and bias < len(inputs):
            inputs = inputs[:bias]
        new = ir.Node(
            self.node.domain, self.node.op_type, inputs, list(self.node.attributes.values())
        )
        if "kernel_shape" in new.attributes:
            kept = new.attributes["kernel_shape"].as_ints()
            new.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kept)
        made = self._place(new)
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
        made = add_initialiser(graph, name, value, self.site.id)
        if role is Role.OPTIONAL_INPUT:
            graph.inputs.append(made)
        elif role is Role.REQUIRED_INPUT:
            raise LoraFxError("the ONNX emitter makes no required inputs yet")
        return made
