"""Data flow from stored tensors: which values of an ONNX graph are weights, and through which View.

Tensors are initialisers (of the graph or of a body) or Constant nodes. A body reads the values of
the graphs around it, so one walk over all nodes follows both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import numpy_dtype
from lora_fx.ir.einsum import Shape
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.view import Cast, View
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
from lora_fx.onnx.graph.flops import element_count, flops_of_data, flops_of_use
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
from lora_fx.targets.keys import base_name
from lora_fx.text import free_name, listed_texts


@dataclass(frozen=True)
class OnnxWeight:
    """A value that is one stored tensor seen through a View.

    Attributes:
        name: The tensor's name.
        view: The steps from the tensor to the value.
        shape: The value's shape.
        codes: What the tensor's integers are; None for floats.
        computed: Why the value is not the tensor itself, where it is computed from it; else empty.
        behind: The names of all stored tensors that the value depends on; empty for `name` alone.
    """

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
        reader = self.node
        slot = self.use.x
        if self.source is not None:
            reader = self.source
            slot = 0
        value = reader.inputs[slot]
        assert value is not None
        return value


@dataclass
class OnnxFlow:
    """The result of one walk over a model.

    Attributes:
        stores: The value of every stored tensor, an initialiser's or a Constant's, by name; the
            model's own come first, in file order.
        weights: Values that are a stored tensor seen through views.
        computed: Values that are made of stored tensors alone, or of one that a loop carries.
        uses: Every use of a weight, in execution order.
        data_flops: FLOPs of the products of activations.
        gathered: Values that are picked from one stored tensor by numbers that a run computes.
        gathered_flops: FLOPs of the products of these, by the tensor's name.
    """

    stores: dict[str, ir.Value] = field(default_factory=dict)
    weights: dict[ir.Value, OnnxWeight] = field(default_factory=dict)
    computed: dict[ir.Value, OnnxWeight] = field(default_factory=dict)
    uses: list[OnnxWeightUse] = field(default_factory=list)
    data_flops: int = 0
    gathered: dict[ir.Value, str] = field(default_factory=dict)
    gathered_flops: dict[str, int] = field(default_factory=dict)

    def weight_of(self, value: ir.Value | None) -> OnnxWeight | None:
        """The weight that a value is, or that it is computed from."""
        if value is None:
            return None
        return self.weights.get(value) or self.computed.get(value)

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The tensor that is stored under a name now."""
        tensor = ir.convenience.get_const_tensor(self.stores[name])
        assert tensor is not None
        return tensor

    def put(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Store another tensor under a name that is stored already."""
        value = self.stores[name]
        node = value.producer()
        if node is not None:
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        if node is None or value.const_value is not None:  # passes give a Constant's value one too
            value.const_value = tensor

    def parameters(self) -> list[Parameter]:
        """Floating tensors that no pass added, codes of weights, and tensors that may be codes."""
        coded_uses = {use.site.parameter: use for use in self.uses if use.codes is not None}
        parameters = []
        for name, value in self.stores.items():
            if name in coded_uses:
                parameters.append(self._coded_parameter(name, value, coded_uses[name]))
                continue
            tensor = self.tensor(name)
            dtype = tensor_dtype(tensor.dtype)
            if "float" in dtype or narrow(tensor):
                shape = tuple(tensor.shape.numpy())
                parameters.append(Parameter(name, shape, dtype, _aliases(value)))
        return parameters

    def _coded_parameter(self, name: str, value: ir.Value, use: OnnxWeightUse) -> Parameter:
        """A weight stored as codes, in the shape that its operator reads them in."""
        assert use.codes is not None
        tensor = self.tensor(name)
        shape = use.use.stored or tuple(tensor.shape.numpy())
        dtype = tensor_dtype(tensor.dtype)
        aliases = _aliases(value)
        name_before_quantising = QUANTISER.sub("", name)
        if name_before_quantising not in self.stores:
            aliases += (name_before_quantising,)
        return Parameter(name, shape, dtype, aliases, use.codes.format, use.codes.bits)


def follow(model: ir.Model) -> OnnxFlow:
    """Walk a model once, over all nodes, bodies included, in execution order."""
    flow = OnnxFlow()
    # odd names come last, so that a plain name is the key of its own tensor
    for value in sorted(model.graph.initializers.values(), key=_has_odd_name):
        _note_stored(flow, value)
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and isinstance(node.graph, ir.Graph):
            for value in node.graph.initializers.values():
                if value not in flow.weights:
                    _note_stored(flow, value)
        _visit(flow, node)
    return flow


def _has_odd_name(value: ir.Value) -> bool:
    """Whether a name would read as the key of a part or of a use of another tensor."""
    return base_name(str(value.name)) != value.name


def _aliases(value: ir.Value) -> tuple[str, ...]:
    """The name in the file, where the tensor's key is another one."""
    return (str(value.name),) if _has_odd_name(value) else ()


def _note_stored(flow: OnnxFlow, value: ir.Value) -> None:
    """Note a stored tensor, unless a pass added it; it is a weight unless it is marked as data."""
    if MARK in value.metadata_props or value.name is None:
        return
    key = str(value.name)
    if _has_odd_name(value):
        key = re.sub(r"[@\[\]]", "_", key)
    name = free_name(key, flow.stores)  # a body may use a name again
    flow.stores[name] = value
    if DATA not in value.metadata_props:
        flow.weights[value] = OnnxWeight(name, View(), tuple(flow.tensor(name).shape.numpy()))


def _visit(flow: OnnxFlow, node: ir.Node) -> None:
    """Record how a node uses weights.

    The first of these that applies decides:
    1. a Constant is a stored tensor;
    2. a product or a sum with scales or zero points makes a weight of codes;
    3. a node that a pass added gives W + ΔW, or a view of it, or nothing that counts here;
    4. a view of a weight is a weight;
    5. an op of the table uses a weight;
    6. a node whose operands are all weights computes one;
    7. any other node has FLOPs, and may pick rows of one stored tensor.
    """
    if node.op_type == "Constant" and not node.domain:
        value = node.outputs[0]
        if "value" in node.attributes and (value.uses() or value.is_graph_output()):
            _note_stored(flow, value)
        return

    if node.op_type in SCALING and not node.domain and _note_scaling(flow, node):
        return

    weight = None
    source = operand(node, 0)
    if source is not None:
        weight = flow.weights.get(source)
    if MARK in node.metadata_props:
        if weight is not None:
            _note_added(flow, node, weight)
        return

    if weight is not None and _note_view(flow, node, weight):
        return

    row = row_of(node)
    if row is not None:
        uses = _uses_of(flow, node, row)
        if uses:
            flow.uses += uses
            return

    if _note_computed(flow, node):
        return
    _add_flops(flow, node)
    _note_gathered(flow, node)


def _note_added(flow: OnnxFlow, node: ir.Node, weight: OnnxWeight) -> None:
    """Note the weight that a node of a pass gives: W + ΔW of the weight form, or a view of that."""
    if node.op_type == "Add":
        flow.weights[node.outputs[0]] = weight
    elif VIEW in node.metadata_props:
        _note_view(flow, node, weight)


def _add_flops(flow: OnnxFlow, node: ir.Node) -> None:
    """Add a product's FLOPs to the tensor that its operand is picked from, or to data."""
    flops = flops_of_data(node)
    for value in node.inputs:
        if value is not None and value in flow.gathered:
            name = flow.gathered[value]
            flow.gathered_flops[name] = flow.gathered_flops.get(name, 0) + flops
            return
    flow.data_flops += flops


def _note_gathered(flow: OnnxFlow, node: ir.Node) -> None:
    """Record rows that a node picks from a stored tensor, if it reads only that tensor's floats."""
    names = set()
    for value in node.inputs:
        if value is None or (value.dtype is not None and not value.dtype.is_floating_point()):
            continue
        weight = flow.weight_of(value)
        if weight is None:
            names.add(flow.gathered.get(value, ""))
        elif value.shape is None or element_count(tuple(value.shape)) != 1:
            names.add(weight.name)
        # a weight of one element is a factor, which every row is multiplied by
    if len(names) == 1 and "" not in names:
        name = names.pop()
        flow.gathered |= dict.fromkeys(node.outputs, name)


NORMS = ("LayerNormalization", "RMSNormalization")
"""Ops whose result from a table of positions is data that layers read: they make no weight."""


def _note_computed(flow: OnnxFlow, node: ir.Node) -> bool:
    """Record values computed from stored tensors alone, and the ones that the body of a loop gets.

    True where all its operands are made of stored tensors, so that the node computes a weight.
    """
    weights = {}
    for value in node.inputs:
        weight = flow.weight_of(value)
        if value is not None and weight is not None:
            weights[value] = weight

    floats = [weight for weight in weights.values() if may_weigh(flow.tensor(weight.name))]
    names = _names_behind(floats)
    if not names or node.op_type in NORMS:
        return False

    if not bodies_of(node) and all(v is None or v in weights for v in node.inputs):
        why = _why_computed(node, floats, names)
        for value in node.outputs:
            shape = tuple(size if isinstance(size, int) else 0 for size in shape_of(value) or ())
            flow.computed[value] = OnnxWeight(names[0], View(), shape, computed=why, behind=names)
        return True

    if node.op_type in ("Loop", "Scan"):
        _note_carried(flow, node, weights)
    return False


def _why_computed(node: ir.Node, weights: list[OnnxWeight], names: tuple[str, ...]) -> str:
    """The reason why a weight counts as computed: from its first operand, or this node."""
    for weight in weights:
        if weight.computed:
            return weight.computed
    return f"the weight is computed by {node.op_type} from {' and '.join(names)}"


def _note_carried(flow: OnnxFlow, node: ir.Node, weights: dict[ir.Value, OnnxWeight]) -> None:
    """Note the weights that a loop hands to its body and that no iteration changes."""
    body = bodies_of(node)[0]
    first_input = 0
    first_output = 0
    if node.op_type == "Loop":
        # the trip count and the condition come first, and the condition among the results
        first_input = 2
        first_output = 1

    for i, value in enumerate(node.inputs[first_input:]):
        if value not in weights or first_output + i >= len(body.outputs):
            continue
        carried = body.inputs[first_input + i]
        if _copied_value(body.outputs[first_output + i]) is not carried:
            continue
        weight = weights[value]
        why = weight.computed or f"the weight is carried by a {node.op_type}"
        flow.computed[carried] = replace(weight, computed=why, view=View())


def _copied_value(value: ir.Value | None) -> ir.Value | None:
    """The value that a chain of Identity nodes copies; the value itself if there is no chain."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type != "Identity":
        return value
    return _copied_value(node.inputs[0])


def _note_view(flow: OnnxFlow, node: ir.Node, weight: OnnxWeight) -> bool:
    """Record the result of a node that only views, decodes or quantises a weight.

    False for a node that does none of these.
    """
    tensor = flow.tensor(weight.name)
    if node.op_type == "DequantizeLinear" and len(weight.shape) >= 2:
        axis = node.attributes.get_int("axis", 1)
        block_size = node.attributes.get_int("block_size", 0)
        check_scales(node, 1, weight.shape, axis, block_size)
        codes = Codes(node.op_type, tensor.dtype.bitwidth)
        behind = _names_behind(map(flow.weight_of, node.inputs))
        flow.weights[node.outputs[0]] = replace(weight, codes=codes, behind=behind)
        return True
    if node.op_type == "DynamicQuantizeLinear" and len(weight.shape) >= 2:
        _note_computed(flow, node)  # its scale and zero point
        flow.weights[node.outputs[0]] = replace(weight, codes=Codes(node.op_type, 8, scaled=False))
        return True

    rule = None if node.domain else VIEWS.get(node.op_type)
    if rule is None:
        return False
    if node.op_type == "Cast" and narrow(tensor):
        format = f"{tensor_dtype(tensor.dtype)} cast"
        weight = replace(weight, codes=Codes(format, tensor.dtype.bitwidth, scaled=False))
    for i, value in enumerate(node.outputs):
        steps = rule(node, weight.shape, i)
        if steps is None:
            return False
        shape = after(weight.shape, steps)
        flow.weights[value] = replace(weight, view=weight.view.then(*steps), shape=shape)
    return True


SCALING = {"Mul": True, "Div": True, "Sub": False, "Add": False}
"""Ops that make a weight of codes, and whether they apply its scale."""


def _note_scaling(flow: OnnxFlow, node: ir.Node) -> bool:
    """Record the result of a node that applies scales or zero points to cast codes.

    False for a node that does not apply any to such codes.
    """
    operands = [flow.weights[value] for value in node.inputs if value in flow.weights]
    if len(operands) != 2:
        return False
    weight, factor = sorted(operands, key=_size, reverse=True)
    if weight.codes is None or weight.codes.scaled or len(factor.shape) > len(weight.shape):
        return False
    codes = replace(weight.codes, scaled=SCALING[node.op_type])
    behind = (*(weight.behind or (weight.name,)), factor.name)
    flow.weights[node.outputs[0]] = replace(weight, codes=codes, behind=behind)
    return True


def _size(weight: OnnxWeight) -> int:
    return math.prod(weight.shape)


def _names_behind(weights: Iterable[OnnxWeight | None]) -> tuple[str, ...]:
    """The names of the stored tensors that values are or are computed from, each once."""
    names: dict[str, None] = {}
    for weight in weights:
        if weight is not None:
            names |= dict.fromkeys(weight.behind or (weight.name,))
    return tuple(names)


def _uses_of(flow: OnnxFlow, node: ir.Node, row: OnnxOp) -> list[OnnxWeightUse]:
    """The uses of weights by a node that the op table knows; none where all operands are stored."""

    def shape(slot: int) -> Shape | None:
        value = operand(node, slot)
        weight = flow.weight_of(value)
        if weight is None:
            return shape_of(value) or None  # a scalar counts as unknown
        if weight.view.picked is None:
            return weight.shape
        # of matrices that data picks, there are as many as it picks
        return shape_of(value) or (None,) * len(weight.shape)

    uses = []
    for weight_operand in row.uses(node, shape):
        weight = flow.weight_of(operand(node, weight_operand.weight))
        if weight is not None:
            use = _use_of(flow, node, row, weight_operand, weight)
            if use is not None:
                uses.append(use)

    if row.many:
        return uses
    if all(v is None or v in flow.weights or v in flow.computed for v in node.inputs):
        return []  # a constant
    if len(uses) > 1:
        return [_in_own_slot(use) for use in uses]  # an einsum of several weights
    return uses


def _use_of(
    flow: OnnxFlow, node: ir.Node, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight
) -> OnnxWeightUse | None:
    """The use of one operand of a node; None where it holds integers that are no codes."""
    codes = _codes_of(flow, row, use, weight)
    if codes is not None:
        return _coded_use(flow, node, row, use, weight, codes)
    is_float = "float" in tensor_dtype(flow.tensor(weight.name).dtype)
    if not is_float and not weight.computed and not use.refusal:
        return None
    site = _site(node, row, use, weight)
    if not use.refusal:
        _give_dtypes(flow, node, use, weight)
    return OnnxWeightUse(site, node, use, row, node.outputs[0])


def _codes_of(flow: OnnxFlow, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight) -> Codes | None:
    """The codes of a weight where an op reads it; None for floats."""
    codes = use.codes or weight.codes
    tensor = flow.tensor(weight.name)
    if codes is None and row.op == "embedding" and narrow(tensor):
        return Codes(f"{tensor_dtype(tensor.dtype)} cast", 0, scaled=False)
    return codes


def _in_own_slot(use: OnnxWeightUse) -> OnnxWeightUse:
    """The use with a separate id, since each weight of a node has a separate branch."""
    site = replace(use.site, id=f"{use.site.id}:{use.use.weight}")
    return replace(use, site=site)


def _coded_use(
    flow: OnnxFlow, node: ir.Node, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight, codes: Codes
) -> OnnxWeightUse:
    """A use of a quantised weight: the values that its branch reads and adds to, or its refusal."""
    y = node.outputs[0]
    source = None
    why = ""
    if not codes.bits:
        codes = replace(codes, bits=_bits(flow, weight))
    if row.integer:
        source = quantiser(node.inputs[use.x])
        if source is None:
            why = FOREIGN

    if not codes.scaled and not why and not use.refusal:
        x_scale = None if source is None else source.outputs[1]
        scaled_y = scaled(y, x_scale, lambda value: flow.weight_of(value) is not None)
        if scaled_y is None:
            why = UNSCALED
        else:
            y = scaled_y
        if made_by(y, "DequantizeLinear"):  # of codes that were looked up
            codes = replace(codes, format="DequantizeLinear")

    if isinstance(use.kind, WeightForm):
        why = NO_PLACE.format(node.op_type)
    if why:
        use = replace(use, refusal=use.refusal or why, allowed=False)
    beside_x = [flow.weight_of(value) for i, value in enumerate(node.inputs) if i != use.x]
    weight = replace(weight, behind=(*weight.behind, *_names_behind(beside_x)))
    site = replace(_site(node, row, use, weight, y), no_fold=codes.no_fold)
    return OnnxWeightUse(site, node, use, row, y, codes, source)


def _bits(flow: OnnxFlow, weight: OnnxWeight) -> int:
    """The bits of one code of a weight."""
    if weight.codes is not None:
        return weight.codes.bits
    return flow.tensor(weight.name).dtype.bitwidth


def _give_dtypes(flow: OnnxFlow, node: ir.Node, use: OnnxOperand, weight: OnnxWeight) -> None:
    """Give x and the result the weight's dtype, where the file does not say theirs.

    ONNX's inference knows nothing of other domains; ids are no numbers of that dtype.
    """
    dtype = _dtype_of(flow, weight)
    values = [node.outputs[0]]
    x = node.inputs[use.x]
    if x is not None and use.kind.name != "embedding":
        values.append(x)
    for value in values:
        if value.dtype is None:
            value.type = ir.TensorType(ir.DataType.from_numpy(dtype))


def _dtype_of(flow: OnnxFlow, weight: OnnxWeight) -> np.dtype[Any]:
    """The dtype of a weight's values: of the last cast on its way, or else of its tensor."""
    casts = [step.dtype for step in weight.view.steps if isinstance(step, Cast)]
    if casts:
        return numpy_dtype(casts[-1])
    return flow.tensor(weight.name).dtype.numpy()


def _site(
    node: ir.Node, row: OnnxOp, use: OnnxOperand, weight: OnnxWeight, y: ir.Value | None = None
) -> Site:
    """The use of a weight as passes see it; `y` is its product, by default the node's result."""
    shape = use.stored or weight.shape
    id = site_name(node)
    if row.many:
        id = f"{id}:{use.weight}"
    op = row.op
    if op in ("conv", "conv_transpose"):
        op = f"{op}{len(shape) - 2}d"
    scope, module_class = scope_of(node)
    product = node.outputs[0] if y is None else y
    return Site(
        id=id,
        op=op,
        kind=use.kind,
        parameter=weight.name,
        view=weight.view,
        operand=shape,
        scope=scope,
        module_class=module_class,
        flops=flops_of_use(node, use, shape, product),
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
