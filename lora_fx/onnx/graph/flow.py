"""Data flow from stored tensors: which values of an ONNX graph are weights, and through which View.

Tensors are initialisers (of the graph or of a body) or Constant nodes. A body reads the values of
the graphs around it, so one walk over all nodes follows both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.ir.einsum import Shape
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step, View
from lora_fx.onnx.graph.ops import (
    DATA_OPS,
    FOREIGN,
    NO_PLACE,
    QUANTISER,
    UNSCALED,
    Codes,
    OnnxOp,
    OnnxOperand,
    check_scales,
    may_weigh,
    narrow,
    quantiser,
    row_of,
    scaled,
)
from lora_fx.targets.target import base_name
from lora_fx.text import free_name, listed_texts

MARK = "lora_fx"
VIEW = "lora_fx.view"
"""Metadata key of the views of a use in weight form, which start at a sum, not at the weight."""
WAS = "lora_fx.was"
"""Metadata key of a site's value whose own name went to the sum with its branches."""
DATA = "lora_fx.data"
"""Metadata key of a constant that a product or a lookup has for its input: no weight."""


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
    flops = _data(node)
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
        if weight is not None and value.shape is not None and _count(tuple(value.shape)) == 1:
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


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs that an If, a Loop or a Scan runs; empty for other ops."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            bodies += attribute.as_graphs()
    return bodies


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


def shape_of(value: ir.Value | None) -> Shape | None:
    """The sizes of a value, whole numbers or symbols; None where the file does not say."""
    return None if value is None or value.shape is None else tuple(value.shape)


def values_of(model: ir.Model) -> list[ir.Value]:
    """Inputs, initialisers and what nodes make, bodies included."""
    stored = [v for g in model.graphs() for v in (*g.inputs, *g.initializers.values())]
    return [*dict.fromkeys(stored), *(v for n in model.graph.all_nodes() for v in n.outputs)]


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions of a value; None where it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


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
        flops=_flops(node, use, operand, node.outputs[0] if y is None else y),
        refusal=weight.computed or use.refusal,
        allowed=use.allowed and not weight.computed,
        gain=use.gain,
        behind=weight.behind or (weight.name,),
        slot=(use.weight,),
        root=weight.name,
    )


def site_name(node: ir.Node) -> str:
    """The name that a node's first result had before any pass."""
    # by the result, since node names may be empty or repeated
    value = node.outputs[0]
    return value.metadata_props.get(WAS, str(value.name))


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


def _count(shape: Shape | None) -> int:
    """The number of elements, where a symbolic size counts once."""
    sizes = [n for n in shape or () if isinstance(n, int) and n >= 0]  # some files say -1 for free
    return int(np.prod(sizes, dtype=np.int64)) if shape is not None else 0


def _flops(node: ir.Node, use: OnnxOperand, operand: tuple[int, ...], result: ir.Value) -> int:
    """FLOPs of one use, 2 · elements of the result · in; a symbolic size counts once."""
    if use.kind.name == "embedding" or len(operand) < 2:
        return 0
    if use.kind.name == "conv_transpose":
        return 2 * _count(shape_of(node.inputs[use.x])) * _count(operand[1:])
    if use.kind.name == "recurrent":
        return 2 * _count(operand) * _count((shape_of(node.inputs[0]) or (1,))[:-1])
    axes = use.kind.axes(operand)
    split = axes.steps[0].shape if axes.steps else operand  # type: ignore[union-attr]
    inner = _count(tuple(split[i] for i in axes.in_))
    y = shape_of(result)
    return 2 * inner * (_count(y) if y is not None else _count(tuple(split[i] for i in axes.out)))


def _data(node: ir.Node) -> int:
    """FLOPs of one product of activations; 0 for everything else."""
    first, y = shape_of(operand(node, 0)), shape_of(node.outputs[0])
    if (node.domain, node.op_type) not in DATA_OPS or not first or y is None:
        return 0
    return 2 * _count(y) * _count(first[-1:])


# The ONNX ops that may stand between a weight and its use, as View steps.


Steps = list[Step] | None
Rule = Callable[[ir.Node, tuple[int, ...], int], Steps]
"""A rule takes the node, the shape of its first operand, and which of its results is meant; it
gives the steps, or None where the node is no view."""


def operand(node: ir.Node, slot: int) -> ir.Value | None:
    """The operand in a slot; None where the node leaves it out."""
    return node.inputs[slot] if slot < len(node.inputs) else None


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes a value, where it is this op of ONNX."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def remove_unread(node: ir.Node | None) -> None:
    """Remove a node that nothing reads, and those before it that nothing reads then."""
    if node is None or node.graph is None:  # it may have been removed as what is before another
        return
    if any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    before = [v.producer() for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for maker in before:
        remove_unread(maker)


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initialiser or a Constant; None for anything else."""
    # an initialiser that is an input too can be overridden in every run: no constant
    if value is None or value.is_graph_input():
        return None
    found = ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def numbers(
    node: ir.Node, name: str, slot: int, absent: list[int] | None = None
) -> list[int] | None:
    """The whole numbers that an op takes as an attribute, or as an operand in later opsets.

    None where they are not known, and `absent` where the node leaves them out.
    """
    if name in node.attributes:
        found = node.attributes[name].value
        return [int(found)] if isinstance(found, int) else [int(n) for n in found]
    given = operand(node, slot)
    value = constant(given)
    if value is None:
        return absent if given is None else None
    return [int(n) for n in value.reshape(-1)]


def is_tensor(value: ir.Value) -> bool:
    """Whether a value is a tensor, as far as the model says, and no sequence or option of some."""
    return not isinstance(value.type, (ir.SequenceType, ir.OptionalType))


def dtype_name(value: ir.Value | None) -> str:
    """The name of a tensor's dtype; empty where the model does not say, and of a sequence."""
    dtype = None if value is None or not is_tensor(value) else value.dtype
    if dtype is None and value is not None and value.const_value is not None:
        dtype = value.const_value.dtype
    return "" if dtype is None else tensor_dtype(dtype)


def tensor_dtype(dtype: ir.DataType) -> str:
    """The name of a dtype as numpy has it, or ONNX's own where numpy has none."""
    try:
        return str(dtype.numpy().name)
    except (TypeError, KeyError):
        return dtype.name.lower()


def _transpose(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    perm = node.attributes.get("perm")
    return [Permute(tuple(perm.as_ints()) if perm else tuple(range(len(shape)))[::-1])]


def _cast(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    to = tensor_dtype(ir.DataType(node.attributes["to"].as_int()))
    if "float" not in to:
        return None
    return [] if to == dtype_name(node.inputs[0]) else [Cast(to)]


def _reshape(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    wanted = numbers(node, "shape", 1)
    if wanted is None:
        return None
    # Reshape: a size of 0 copies that of the input, unless allowzero says that it is 0.
    keep_zero = node.attributes.get_int("allowzero", 0)
    sizes = [shape[k] if n == 0 and not keep_zero else n for k, n in enumerate(wanted)]
    rest = math.prod(n for n in sizes if n != -1)
    whole = math.prod(shape)
    return [Reshape(tuple(whole // rest if n == -1 else n for n in sizes))] if rest else None


def _squeeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1, [k for k, n in enumerate(shape) if n == 1])
    if axes is None:
        return None
    gone = {a % len(shape) for a in axes}
    return [Reshape(tuple(n for k, n in enumerate(shape) if k not in gone))]


def _unsqueeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1)
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(shape)
    return [Reshape(tuple(1 if k in new else next(rest) for k in range(rank)))]


def _flatten(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    at = node.attributes.get_int("axis", 1)
    return [Reshape((math.prod(shape[:at]), math.prod(shape[at:])))]


def _expand(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    wanted = numbers(node, "shape", 1)
    if wanted is None:
        return None
    out = np.broadcast_shapes(shape, tuple(wanted))
    return [Reshape(out)] if math.prod(out) == math.prod(shape) else None


def _slice(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    starts, stops = numbers(node, "starts", 1), numbers(node, "ends", 2)
    if starts is None or stops is None:
        return None
    axes = numbers(node, "axes", 3, list(range(len(starts))))
    if axes is None or set(numbers(node, "steps", 4, [1]) or ()) != {1}:
        return None
    steps: list[Step] = []
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        # Python's slices clamp as ONNX does: ends are often INT64_MAX
        lo, hi, _ = slice(start, stop).indices(shape[axis])
        steps.append(Slice(axis % len(shape), lo, hi))
    return steps


def _split(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    # without sizes, all parts are equal and the last may be shorter
    part = -(-shape[axis] // len(node.outputs))
    equal = [min(part, shape[axis] - part * k) for k in range(len(node.outputs))]
    sizes = numbers(node, "split", 1, equal)
    if sizes is None:
        return None
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def _gather(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    """The slice of one entry of an axis that a constant picks; ids from data pick matrices."""
    value = node.inputs[1]
    ids = None if value is None or DATA in value.metadata_props else constant(value)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    if ids is None or ids.ndim:
        return _picked(node, shape, 1) if ids is None and axis == 0 else None
    k = int(ids) % shape[axis]
    return [Slice(axis, k, k + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _gather_nd(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    batched = node.attributes.get_int("batch_dims", 0)
    one = (shape_of(node.inputs[1]) or (0,))[-1] == 1
    return _picked(node, shape, 2) if one and not batched else None


def _picked(node: ir.Node, shape: tuple[int, ...], dims: int) -> Steps:
    """Stacked matrices that data picks along the first axis; ids of other ranks make new axes."""
    return [Gather(0)] if rank(node.inputs[1]) == dims and len(shape) > 2 else None


VIEWS: Mapping[str, Rule] = {
    "Identity": lambda node, shape, i: [],
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
}


def after(shape: tuple[int, ...], steps: list[Step]) -> tuple[int, ...]:
    """The shape that a tensor has after some steps."""
    for step in steps:
        if isinstance(step, Permute):
            shape = tuple(shape[d] for d in step.perm)
        elif isinstance(step, Reshape):
            shape = step.shape
        elif isinstance(step, Slice):
            shape = (*shape[: step.axis], step.stop - step.start, *shape[step.axis + 1 :])
    return shape
