"""Data flow from stored tensors: which values of an ONNX graph are weights, and through which View.

Tensors are stored as initialisers (of the graph or of an If, Loop or Scan body) and in Constant
nodes. A body reads the values of the graphs around it, so one walk over all nodes follows both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from lora_fx.ir.emitter import Parameter
from lora_fx.ir.graph import Site
from lora_fx.ir.kinds import Shape
from lora_fx.ir.view import View
from lora_fx.onnx.ops import DATA_OPS, QUANTISED, Row, Use, row_of
from lora_fx.onnx.views import VIEWS, after, tensor_dtype

MARK = "lora_fx"
VIEW = "lora_fx.view"
"""On the views of a use in weight form: they start at a sum instead of the weight."""
WAS = "lora_fx.was"
"""On the value of a site whose name went to the sum with its branches."""


@dataclass(frozen=True)
class Store:
    """Where a tensor is stored: the value of an initialiser, or of a Constant node."""

    name: str
    value: ir.Value

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The tensor itself."""
        node = self.value.producer()
        found = self.value.const_value if node is None else node.attributes["value"].as_tensor()
        assert found is not None
        return found

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Store another tensor in its place."""
        node = self.value.producer()
        if node is None:
            self.value.const_value = tensor
        else:
            node.attributes["value"] = ir.AttrTensor("value", tensor)


@dataclass(frozen=True)
class Weight:
    """A value that is one stored tensor seen through a View."""

    name: str
    view: View
    shape: tuple[int, ...]
    quantised: str = ""


@dataclass(frozen=True)
class Found:
    """One use of a weight."""

    site: Site
    node: ir.Node
    use: Use
    row: Row


@dataclass
class Flow:
    """What one walk over a model finds.

    Attributes:
        stores: Every stored tensor by name; the model's own come first, in file order.
        weights: Values that are one of them behind views.
        found: Every use, in execution order.
        data_flops: FLOPs of products of activations.
    """

    stores: dict[str, Store] = field(default_factory=dict)
    weights: dict[ir.Value, Weight] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    data_flops: int = 0

    def parameters(self) -> list[Parameter]:
        """Floating tensors that no pass added, and the codes of quantised weights."""
        packed = {f.site.parameter: f.use.stored for f in self.found if f.site.no_fold}
        result = []
        for name, store in self.stores.items():
            dtype = tensor_dtype(store.tensor.dtype)
            if "float" in dtype or name in packed:
                shape = packed.get(name) or tuple(store.tensor.shape.numpy())
                result.append(Parameter(name, shape, dtype))
        return result


def follow(model: ir.Model) -> Flow:
    """Walk a model once."""
    flow = Flow()
    for value in model.graph.initializers.values():
        _store(flow, value)
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and isinstance(node.graph, ir.Graph):
            for value in node.graph.initializers.values():
                if value not in flow.weights:
                    _store(flow, value)
        _visit(flow, node)
    return flow


def _store(flow: Flow, value: ir.Value) -> None:
    if MARK in value.metadata_props or value.name is None:
        return
    name, i = str(value.name), 0
    while name in flow.stores:  # a body may use a name again
        i += 1
        name = f"{value.name}.{i}"
    store = Store(name, value)
    flow.stores[name] = store
    flow.weights[value] = Weight(name, View(), tuple(store.tensor.shape.numpy()))


def _visit(flow: Flow, node: ir.Node) -> None:
    if node.op_type == "Constant" and not node.domain:
        if "value" in node.attributes and len(node.outputs[0].uses()):
            _store(flow, node.outputs[0])
        return
    source = None if not node.inputs or node.inputs[0] is None else node.inputs[0]
    weight = None if source is None else flow.weights.get(source)
    if MARK in node.metadata_props:
        if node.op_type == "Add" and weight is not None:
            flow.weights[node.outputs[0]] = weight  # W + ΔW of the weight form
        elif VIEW in node.metadata_props and weight is not None:
            _through(flow, node, weight)
        return
    if weight is not None and _through(flow, node, weight):
        return
    row = row_of(node)
    if row is not None:
        found = _uses(flow, node, row)
        flow.found += found
        if found:
            return
    flow.data_flops += _data(node)


def _through(flow: Flow, node: ir.Node, weight: Weight) -> bool:
    """Note what a node makes of a weight where it only views it."""
    if node.op_type == "DequantizeLinear" and len(weight.shape) >= 2:
        why = QUANTISED.format("DequantizeLinear")
        flow.weights[node.outputs[0]] = replace(weight, quantised=why)
        return True
    rule = None if node.domain else VIEWS.get(node.op_type)
    if rule is None:
        return False
    for i, out in enumerate(node.outputs):
        steps = rule(node, weight.shape, i)
        if steps is None:
            return False
        view = weight.view.then(*steps)
        flow.weights[out] = replace(weight, view=view, shape=after(weight.shape, steps))
    return True


def shape_of(value: ir.Value | None) -> Shape | None:
    """Sizes of a value: whole numbers, and what stands for a symbol."""
    if value is None or value.shape is None:
        return None
    return tuple(value.shape)


def _uses(flow: Flow, node: ir.Node, row: Row) -> list[Found]:
    def shape(slot: int) -> Shape | None:
        if slot >= len(node.inputs):
            return None
        value = node.inputs[slot]
        known = None if value is None else flow.weights.get(value)
        return shape_of(value) if known is None else known.shape

    result = []
    for use in row.uses(node, shape):
        value = node.inputs[use.weight] if use.weight < len(node.inputs) else None
        weight = None if value is None else flow.weights.get(value)
        if weight is None or not _adaptable(flow.stores[weight.name].tensor.dtype, use, weight):
            continue
        result.append(Found(_site(node, row, use, weight), node, use, row))
    if not row.many and len(result) > 1:
        return []  # both operands are stored: a constant
    return result


def _adaptable(dtype: ir.DataType, use: Use, weight: Weight) -> bool:
    return bool(use.refusal or weight.quantised) or "float" in tensor_dtype(dtype)


def _site(node: ir.Node, row: Row, use: Use, weight: Weight) -> Site:
    quantised = use.refusal if row.packed else weight.quantised
    operand = use.stored or weight.shape
    conv = row.op in ("conv", "conv_transpose")
    scope = scope_of(node)
    return Site(
        id=f"{site_name(node)}:{use.weight}" if row.many else site_name(node),
        op=f"{row.op}{len(operand) - 2}d" if conv else row.op,
        kind=use.kind,
        parameter=weight.name,
        view=weight.view,
        operand=operand,
        scope=scope[0],
        module_class=scope[1],
        flops=_flops(node, use, operand),
        refusal=use.refusal or weight.quantised,
        allowed=use.allowed or (not use.refusal and bool(weight.quantised)),
        no_fold=quantised,
        gain=use.gain,
        behind=(weight.name,),
        slot=(use.weight,),
        root=weight.name,
    )


def site_name(node: ir.Node) -> str:
    """The name that a node's first result had before any pass."""
    value = node.outputs[0]
    return value.metadata_props.get(WAS, str(value.name))


def scope_of(node: ir.Node) -> tuple[str, str]:
    """Path and class of the module that a node was exported from, where the exporter says so.

    torch's exporter keeps them in the node's metadata; the older one in the node's name.
    """
    import ast

    props = node.metadata_props
    try:
        scopes = ast.literal_eval(props.get("pkg.torch.onnx.name_scopes", "[]"))
        classes = ast.literal_eval(props.get("pkg.torch.onnx.class_hierarchy", "[]"))
        if len(scopes) > 1:
            return str(scopes[-2]), str(classes[-2]).rpartition(".")[2]
    except (ValueError, SyntaxError, IndexError):
        pass
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.strip("/").split("/")[:-1]), ""
    return "", ""


def _count(shape: Shape | None) -> int:
    """Number of elements, where a symbol counts once."""
    sizes = [n for n in shape or () if isinstance(n, int)]
    return int(np.prod(sizes, dtype=np.int64)) if shape is not None else 0


def _flops(node: ir.Node, use: Use, operand: tuple[int, ...]) -> int:
    """2 · output elements · in, where every symbolic size counts once; lookups are free."""
    if use.kind.name == "embedding" or len(operand) < 2:
        return 0
    if use.kind.name == "conv_transpose":
        return 2 * _count(shape_of(node.inputs[use.x])) * _count(operand[1:])
    if use.kind.name == "recurrent":
        return 2 * _count(operand) * _count((shape_of(node.inputs[0]) or (1,))[:-1])
    axes = use.kind.axes(operand)
    split = axes.steps[0].shape if axes.steps else operand  # type: ignore[union-attr]
    inner = _count(tuple(split[i] for i in axes.in_))
    y = shape_of(node.outputs[0])
    return 2 * inner * (_count(y) if y is not None else _count(tuple(split[i] for i in axes.out)))


def _data(node: ir.Node) -> int:
    """FLOPs of a product of activations."""
    known = node.op_type in ("MatMul", "Gemm", "Einsum", "FusedMatMul")
    if not known and (node.domain, node.op_type) not in DATA_OPS:
        return 0
    first, y = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if not first or y is None:
        return 0
    inner = first[-1]
    return 2 * _count(y) * (inner if isinstance(inner, int) else 1)
