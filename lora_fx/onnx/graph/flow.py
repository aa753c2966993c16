"""Data flow from stored tensors: which values of an ONNX graph are weights, and through which View.

Tensors are initialisers (of the graph or of a body) or Constant nodes. A body reads the values of
the graphs around it, so one walk over all nodes follows both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from lora_fx.dtypes import numpy_dtype
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.kinds import Shape, WeightForm
from lora_fx.ir.layout import Cast, View
from lora_fx.onnx.graph.coded_weights import (
    FOREIGN,
    NO_PLACE,
    QUANTISER,
    UNSCALED,
    Codes,
    check_scales,
    may_weigh,
    narrow,
    quantiser,
    scaled,
)
from lora_fx.onnx.graph.flops import count, flops_of_data, flops_of_use
from lora_fx.onnx.graph.marks import DATA, MARK, VIEW, site_name
from lora_fx.onnx.graph.ops import OnnxOp, OnnxOperand, row_of
from lora_fx.onnx.graph.values import (
    bodies_of,
    made_by,
    operand,
    shape_of,
    tensor_dtype,
)
from lora_fx.onnx.graph.views import VIEWS, after
from lora_fx.targets.target import base_name
from lora_fx.text import free_name, listed_texts


@dataclass(frozen=True)
class OnnxWeight:
    """A value that is one stored tensor seen through a View."""

    name: str
    view: View
    shape: tuple[int, ...]
    codes: Codes | None = None
    computed: str = ""
    behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxWeightUse:
    """One use of a weight.

    Attributes:
        site: The use, as passes see it.
        node: The op.
        use: Which of its operands is the weight.
        row: The op table's row.
        y: The product: the node's result, or what that is once codes have their scales.
        codes: What the weight's integers are; None for floats.
        source: The node that makes codes of the activation, where the op multiplies codes.
    """

    site: Site
    node: ir.Node
    use: OnnxOperand
    row: OnnxOp
    y: ir.Value
    codes: Codes | None = None
    source: ir.Node | None = None

    @property
    def x(self) -> ir.Value:
        """The activation as it is now, in floats."""
        node, slot = (self.node, self.use.x) if self.source is None else (self.source, 0)
        value = node.inputs[slot]
        assert value is not None
        return value


@dataclass
class OnnxFlow:
    """What one walk over a model finds.

    Attributes:
        stores: The value of every stored tensor, an initialiser's or a Constant's, by name; the
            model's own come first, in file order.
        weights: Values that are a stored tensor seen through views.
        computed: Values that are made of stored tensors alone, or of one that a loop carries.
        found: Every use of one, in execution order.
        data_flops: FLOPs of the products of activations.
        gathered: Values that are picked from one stored tensor by numbers that a run computes.
        gathered_flops: FLOPs of the products of these, by the tensor's name.
    """

    stores: dict[str, ir.Value] = field(default_factory=dict)
    weights: dict[ir.Value, OnnxWeight] = field(default_factory=dict)
    computed: dict[ir.Value, OnnxWeight] = field(default_factory=dict)
    found: list[OnnxWeightUse] = field(default_factory=list)
    data_flops: int = 0
    gathered: dict[ir.Value, str] = field(default_factory=dict)
    gathered_flops: dict[str, int] = field(default_factory=dict)

    def weight_of(self, value: ir.Value | None) -> OnnxWeight | None:
        """The weight that a value is, or that it is computed from."""
        return None if value is None else self.weights.get(value) or self.computed.get(value)

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The tensor that is stored under a name now."""
        found = ir.convenience.get_const_tensor(self.stores[name])
        assert found is not None
        return found

    def put(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Store another tensor in the place of one."""
        value, node = self.stores[name], self.stores[name].producer()
        if node is not None:
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        if node is None or value.const_value is not None:  # passes give a Constant's value one too
            value.const_value = tensor

    def parameters(self) -> list[Parameter]:
        """Floating tensors that no pass added, codes of weights, and what may be such codes."""
        coded = {f.site.parameter: f for f in self.found if f.codes is not None}
        result = []
        for name, value in self.stores.items():
            tensor, use = self.tensor(name), coded.get(name)
            dtype = tensor_dtype(tensor.dtype)
            if use is None and not ("float" in dtype or narrow(tensor)):
                continue
            shape = (use.use.stored if use else ()) or tuple(tensor.shape.numpy())
            alias, kept = (str(value.name),) * _is_odd(value), use.codes if use else None
            plain = QUANTISER.sub("", name)
            alias += (plain,) * (kept is not None and plain not in self.stores)
            form = (kept.format, kept.bits) if kept else ()
            result.append(Parameter(name, shape, dtype, alias, *form))
        return result


def follow(model: ir.Model) -> OnnxFlow:
    """Walk a model once, over all nodes, bodies included, in execution order."""
    flow = OnnxFlow()
    for value in sorted(model.graph.initializers.values(), key=_is_odd):
        _store(flow, value)
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and isinstance(node.graph, ir.Graph):
            for value in node.graph.initializers.values():
                if value not in flow.weights:
                    _store(flow, value)
        _visit(flow, node)
    return flow


def _is_odd(value: ir.Value) -> bool:
    """Whether a name would read as the key of a part or of a use of another tensor."""
    return base_name(str(value.name)) != value.name


def _store(flow: OnnxFlow, value: ir.Value) -> None:
    if MARK in value.metadata_props or value.name is None:
        return
    own = str(value.name)
    if _is_odd(value):  # such come last, so that a plain name is the key of its own tensor
        own = re.sub(r"[@\[\]]", "_", own)
    name = free_name(own, flow.stores)  # a body may use a name again
    flow.stores[name] = value
    if DATA not in value.metadata_props:
        flow.weights[value] = OnnxWeight(name, View(), tuple(flow.tensor(name).shape.numpy()))


def _visit(flow: OnnxFlow, node: ir.Node) -> None:
    if node.op_type == "Constant" and not node.domain:
        out = node.outputs[0]
        if "value" in node.attributes and (out.uses() or out.is_graph_output()):
            _store(flow, out)
        return
    source = operand(node, 0)
    weight = None if source is None else flow.weights.get(source)
    if node.op_type in SCALING and not node.domain and _scaling(flow, node):
        return
    if MARK in node.metadata_props:
        if node.op_type == "Add" and weight is not None:
            flow.weights[node.outputs[0]] = weight  # W + ΔW of the weight form
        elif VIEW in node.metadata_props and weight is not None:
            _through(flow, node, weight)
        return
    if weight is not None and _through(flow, node, weight):
        return
    row = row_of(node)
    if row is not None and (found := _uses(flow, node, row)):
        flow.found += found
        return
    if _computes(flow, node):
        return
    flops = flops_of_data(node)
    picked = [flow.gathered[v] for v in node.inputs if v is not None and v in flow.gathered]
    if picked:
        flow.gathered_flops[picked[0]] = flow.gathered_flops.get(picked[0], 0) + flops
    else:
        flow.data_flops += flops
    _gather_from(flow, node)


def _gather_from(flow: OnnxFlow, node: ir.Node) -> None:
    """Note what a node picks from one stored tensor, the one float that it reads."""
    names = set()
    for value in node.inputs:
        if value is None or (value.dtype is not None and not value.dtype.is_floating_point()):
            continue
        weight = flow.weight_of(value)
        if weight is not None and value.shape is not None and count(tuple(value.shape)) == 1:
            continue  # a factor, which every row is multiplied by
        names.add(weight.name if weight is not None else flow.gathered.get(value, ""))
    if len(names) == 1 and "" not in names:
        name = names.pop()
        flow.gathered |= {v: name for v in node.outputs}


NORMS = ("LayerNormalization", "RMSNormalization")
"""What they make of a table of positions is data, which layers read; no weight is made by them."""


def _computes(flow: OnnxFlow, node: ir.Node) -> bool:
    """Note what a node makes of stored tensors alone, and what the body of a loop gets of them."""
    known = {v: w for v in node.inputs if (w := flow.weight_of(v))}
    floats = [w for w in known.values() if may_weigh(flow.tensor(w.name))]
    names = _names(floats)
    if not names or node.op_type in NORMS:
        return False
    why = next((w.computed for w in floats if w.computed), "")
    why = why or f"the weight is computed by {node.op_type} from {' and '.join(names)}"
    bodies = bodies_of(node)
    made = OnnxWeight(names[0], View(), (), computed=why, behind=names)
    if not bodies and all(v is None or v in known for v in node.inputs):
        for out in node.outputs:
            sizes = (n if isinstance(n, int) else 0 for n in shape_of(out) or ())
            flow.computed[out] = replace(made, shape=tuple(sizes))
        return True
    if node.op_type in ("Loop", "Scan"):
        into, back = (2, 1) if node.op_type == "Loop" else (0, 0)
        for i, value in enumerate(node.inputs[into:]):
            inner = bodies[0].inputs[into + i]
            same = i + back < len(bodies[0].outputs) and _root(bodies[0].outputs[i + back]) is inner
            if value in known and same:
                why = known[value].computed or f"the weight is carried by a {node.op_type}"
                flow.computed[inner] = replace(known[value], computed=why, view=View())
    return False


def _root(value: ir.Value | None) -> ir.Value | None:
    """What a value is a copy of."""
    node = None if value is None else value.producer()
    return _root(node.inputs[0]) if node is not None and node.op_type == "Identity" else value


def _through(flow: OnnxFlow, node: ir.Node, weight: OnnxWeight) -> bool:
    """Note what a node makes of a weight where it only views it."""
    tensor = flow.tensor(weight.name)
    if node.op_type == "DequantizeLinear" and len(weight.shape) >= 2:
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        check_scales(node, 1, weight.shape, axis, block)
        codes = Codes(node.op_type, tensor.dtype.bitwidth)
        behind = _names(map(flow.weight_of, node.inputs))
        flow.weights[node.outputs[0]] = replace(weight, codes=codes, behind=behind)
        return True
    if node.op_type == "DynamicQuantizeLinear" and len(weight.shape) >= 2:
        _computes(flow, node)  # its scale and zero point
        flow.weights[node.outputs[0]] = replace(weight, codes=Codes(node.op_type, 8, scaled=False))
        return True
    rule = None if node.domain else VIEWS.get(node.op_type)
    if rule is None:
        return False
    if node.op_type == "Cast" and narrow(tensor):
        name = f"{tensor_dtype(tensor.dtype)} cast"
        weight = replace(weight, codes=Codes(name, tensor.dtype.bitwidth, scaled=False))
    for i, out in enumerate(node.outputs):
        steps = rule(node, weight.shape, i)
        if steps is None:
            return False
        shape = after(weight.shape, steps)
        flow.weights[out] = replace(weight, view=weight.view.then(*steps), shape=shape)
    return True


SCALING = {"Mul": True, "Div": True, "Sub": False, "Add": False}
"""Ops that make a weight of codes, and whether they apply its scale."""


def _scaling(flow: OnnxFlow, node: ir.Node) -> bool:
    """Note what a node makes of codes that were cast, with scales or zero points."""
    known = [flow.weights[v] for v in node.inputs if v in flow.weights]
    if len(known) != 2:
        return False
    weight, other = sorted(known, key=lambda w: -math.prod(w.shape))
    if weight.codes is None or weight.codes.scaled or len(other.shape) > len(weight.shape):
        return False
    codes = replace(weight.codes, scaled=SCALING[node.op_type])
    behind = (*(weight.behind or (weight.name,)), other.name)
    flow.weights[node.outputs[0]] = replace(weight, codes=codes, behind=behind)
    return True


def _names(weights: Iterable[OnnxWeight | None]) -> tuple[str, ...]:
    """The names of the stored tensors that values are, or that lie behind them."""
    return tuple(dict.fromkeys(n for w in weights if w for n in w.behind or (w.name,)))


def _uses(flow: OnnxFlow, node: ir.Node, row: OnnxOp) -> list[OnnxWeightUse]:
    def shape(slot: int) -> Shape | None:
        value = operand(node, slot)
        known = flow.weight_of(value)
        if known is not None and known.view.picked is None:
            return known.shape
        # of matrices that data picks, there are as many as it picks
        return shape_of(value) or (None if known is None else (None,) * len(known.shape))

    result = []
    for use in row.uses(node, shape):
        weight = flow.weight_of(operand(node, use.weight))
        if weight is None:
            continue
        tensor = flow.tensor(weight.name)
        codes = use.codes or weight.codes
        if codes is None and row.op == "embedding" and narrow(tensor):
            codes = Codes(f"{tensor_dtype(tensor.dtype)} cast", 0, scaled=False)
        if not (codes or use.refusal or weight.computed or "float" in tensor_dtype(tensor.dtype)):
            continue
        if codes is not None:
            result.append(_coded(flow, node, row, use, weight, codes))
            continue
        site = _site(node, row, use, weight)
        result.append(OnnxWeightUse(site, node, use, row, node.outputs[0]))
        if not use.refusal:
            _tell(flow, node, use, weight)
    stored = (v is None or v in flow.weights or v in flow.computed for v in node.inputs)
    if not row.many and all(stored):
        return []  # a constant
    if not row.many and len(result) > 1:  # an einsum of several weights: each has its own branch
        result = [replace(f, site=replace(f.site, id=f"{f.site.id}:{f.use.weight}"))
                  for f in result]  # fmt: skip
    return result


def _coded(
    flow: OnnxFlow, node: ir.Node, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight, codes: Codes
) -> OnnxWeightUse:
    """A use of a quantised weight: what its branch reads and adds to, or why it has none."""
    y, source, why = node.outputs[0], None, ""
    made = weight.codes.bits if weight.codes else flow.tensor(weight.name).dtype.bitwidth
    codes = replace(codes, bits=codes.bits or made)
    if row.integer:
        source = quantiser(node.inputs[use.x])
        why = "" if source is not None else FOREIGN
    if not (codes.scaled or why or use.refusal):
        x_scale = None if source is None else source.outputs[1]
        found = scaled(y, x_scale, lambda v: flow.weight_of(v) is not None)
        y, why = (y, UNSCALED) if found is None else (found, "")
        if made_by(y, "DequantizeLinear"):  # of codes that were looked up
            codes = replace(codes, format="DequantizeLinear")
    if isinstance(use.kind, WeightForm):
        why = NO_PLACE.format(node.op_type)
    use = replace(use, refusal=use.refusal or why, allowed=use.allowed and not why)
    others = (flow.weight_of(v) for i, v in enumerate(node.inputs) if i != use.x)
    weight = replace(weight, behind=(*weight.behind, *_names(others)))
    site = replace(_site(node, row, use, weight, y), no_fold=codes.no_fold)
    return OnnxWeightUse(site, node, use, row, y, codes, source)


def _tell(flow: OnnxFlow, node: ir.Node, use: OnnxOperand, weight: OnnxWeight) -> None:
    """Give x and the result the weight's dtype, where the file does not say theirs.

    ONNX's inference knows nothing of other domains; ids are no numbers of that dtype.
    """
    cast = [s.dtype for s in weight.view.steps if isinstance(s, Cast)]
    dtype = numpy_dtype(cast[-1]) if cast else flow.tensor(weight.name).dtype.numpy()
    ids = use.kind.name == "embedding"
    for value in (None if ids else node.inputs[use.x], node.outputs[0]):
        if value is not None and value.dtype is None:
            value.type = ir.TensorType(ir.DataType.from_numpy(dtype))


def _site(
    node: ir.Node, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight, y: ir.Value | None = None
) -> Site:
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
        flops=flops_of_use(node, use, operand, node.outputs[0] if y is None else y),
        refusal=weight.computed or use.refusal,
        allowed=use.allowed and not weight.computed,
        gain=use.gain,
        behind=weight.behind or (weight.name,),
        slot=(use.weight,),
        root=weight.name,
    )


def scope_of(node: ir.Node) -> tuple[str, str]:
    """Path and class of the module that a node was exported from, where the exporter says so.

    torch's exporter keeps them in the node's metadata; the older one in the node's name.
    """
    props = node.metadata_props
    scopes = listed_texts(props.get("pkg.torch.onnx.name_scopes", "[]"))
    classes = listed_texts(props.get("pkg.torch.onnx.class_hierarchy", "[]"))
    if len(scopes) > 1:
        module_class = classes[-2] if len(classes) > 1 else ""
        return scopes[-2], module_class.rpartition(".")[2]
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.strip("/").split("/")[:-1]), ""
    return "", ""
