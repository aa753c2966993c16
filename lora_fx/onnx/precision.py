"""The dtype of a graph: float32 for bfloat16, float16 with islands of float32, or int8 products.

ONNX Runtime's CPU has few ops for bfloat16, so a file of such a model is in float32, which has
every bfloat16 number.

int8 is onnxruntime's own conversion. For float16, nodes whose values come near the end of its range
stay in float32: on the CPU, where ONNX Runtime computes float16 in float32, nothing else would show
that. The rest is compared: where it differs too much, further nodes go back one by one. The next
one is found by bisection: with only the first k nodes in float16, the smallest k that fails ends
with the node that has to go back.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from lora_fx.compare import STEPS
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, silenced
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.graph.flow import bodies_of, is_tensor, values_of
from lora_fx.onnx.graph.graph import add_initialiser
from lora_fx.onnx.save import weight_bytes
from lora_fx.onnx.stages import Feeds, WorstError, peaks

PRECISION = "lora_fx.precision"
GATES = {"float16": 8 * 2.0**-10, "int8": STEPS, "level 4": STEPS}
"""max|a − b| / max|b| of an output: eight units in the last place of what is computed with.

Level 4 is MatMulNBits with its x in int8: what it rounds is what the precision int8 rounds.
"""
MOST = 24
"""Nodes that may go back to float32, beside those of large values."""
RANGE = 65504.0 / 4
"""Values above it are too near to float16's largest number: real data may have larger ones."""
LARGEST = (1 << 31) - (1 << 24)
"""Bytes that a converted model may have: the converters work on one protobuf message."""


@dataclass(frozen=True)
class Narrowed:
    """A converted model.

    Attributes:
        model: It.
        error: Largest difference of an output to the model before.
        islands: Names of nodes that stayed in float32.
    """

    model: ir.Model
    error: float
    islands: tuple[str, ...] = ()

    def said(self, precision: str) -> str:
        """A line for the report."""
        text = f"{precision}: outputs differ from float32 by {self.error:.1e}"
        if self.error > GATES[precision]:
            text += f", over the gate of {GATES[precision]:.1e}, which tol widens"
        if self.islands:
            some = ", ".join(self.islands[:4]) + (" …" if len(self.islands) > 4 else "")
            text += f"; {len(self.islands)} nodes stay in float32: {some}"
        return text


def narrow(
    model: ir.Model, precision: str, feeds: Feeds, provider: str, tol: float | None = None
) -> Narrowed:
    """Convert a model; it is not changed.

    Args:
        model: In float32.
        precision: float16 or int8.
        feeds: Inputs by name, that candidates are compared on.
        provider: auto, cpu or cuda.
        tol: What is accepted where the gate cannot be met.

    Raises:
        LoraFxError: A model of over 2 GB, or one that differs too much whatever is left out.
    """
    if precision not in GATES:
        raise LoraFxError(f"a file is not converted to {precision!r}", "float16 or int8")
    if weight_bytes(model) > LARGEST:
        raise LoraFxError(
            f"{weight_bytes(model)} bytes of weights; expected less than 2 GB for {precision}",
            "converters and runtimes take one protobuf message",
        )
    error = WorstError(model, feeds, provider)
    most = tol or GATES[precision]
    if precision == "int8":
        made = _int8(model, error, most)
    else:
        made = _half(model, error, peaks(model, feeds, provider), most)
    made.model.metadata_props[PRECISION] = precision  # the gate of whoever compares it later
    return made


def in_bfloat16(model: ir.Model) -> list[ir.Value]:
    """The values of a model that are in bfloat16, bodies included."""
    return [v for v in values_of(model) if v.dtype is ir.DataType.BFLOAT16]


def at_level(model: ir.Model, level: int) -> None:
    """Let products over codes of 2, 4 or 8 bits take their x as it comes (0) or in int8 (4).

    Raises:
        LoraFxError: The model has none.
    """
    if not level:
        return
    products = [n for n in model.graph.all_nodes() if n.op_type == "MatMulNBits"]
    if not products:
        raise LoraFxError(
            f"accuracy level {level} is of products over int4 or int8 codes, and there is none",
            "nf4 and fp4 are always computed in floats",
        )
    for node in products:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    model.metadata_props[PRECISION] = f"level {level}"


def widen(model: ir.Model) -> bool:
    """Make bfloat16 float32 in place, in inputs and outputs too; whether there was any."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    found = in_bfloat16(model)
    for value in found:
        value.dtype = wide
        if value.const_value is not None:
            value.const_value = _float32(value.const_value)
    for node in model.graph.all_nodes():
        for name, a in list(node.attributes.items()):
            if name in ("to", "dtype") and a.value == narrow:
                node.attributes[name] = ir.AttrInt64(name, int(wide))
            elif a.type is ir.AttributeType.TENSOR and a.as_tensor().dtype is narrow:
                node.attributes[name] = ir.AttrTensor(name, _float32(a.as_tensor()))
    return bool(found)


def unround(
    model: ir.Model, exact: Mapping[str, Callable[[], Array]], copies: Mapping[str, str]
) -> frozenset[str]:
    """Give weights that hold numbers of bfloat16 the float32 that these were rounded from.

    A weight that does not hold those numbers, as stored or transposed, is left as it is.

    Args:
        model: Of a bfloat16 model, widened; edited in place.
        exact: Name of a weight → what gives its value before it was rounded.
        copies: Name of another copy of a tensor → the name of that tensor.

    Returns:
        The names of `exact` of which every copy could be replaced.
    """
    kept: dict[str, bool] = {}
    for name, value in model.graph.initializers.items():
        source = copies.get(name, name)
        held = value.const_value
        if source not in exact or held is None or value.dtype is not ir.DataType.FLOAT:
            continue
        wide = exact[source]().astype(np.float32, copy=False)
        rounded, stored = wide.astype(ml_dtypes.bfloat16).astype(np.float32), held.numpy()
        if stored.shape != wide.shape or not np.array_equal(rounded, stored):
            wide, rounded = wide.T, rounded.T
        same = stored.shape == wide.shape and np.array_equal(rounded, stored)
        if same:
            value.const_value = ir.tensor(np.ascontiguousarray(wide), name=held.name)
        kept[source] = same and kept.get(source, True)
    return frozenset(name for name, same in kept.items() if same)


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _half(
    model: ir.Model, error: Callable[[ir.Model], float], high: Mapping[str, float], tol: float
) -> Narrowed:
    named = _named(model)
    order = [str(n.name) for n in named.graph]
    islands = [
        str(n.name)
        for n in named.graph
        if any(v and high.get(str(v.name), 0.0) > RANGE for v in (*n.inputs, *n.outputs))
    ]
    most = len(islands) + MOST

    def tried(kept: Collection[str]) -> tuple[ir.Model, float]:
        made = named.clone()
        ToHalf(frozenset(kept))(made)
        _drop_unread(made)
        return made, error(made)

    def fails(count: int) -> bool:
        """Whether the first so many nodes, islands among them left out, are too many in float16."""
        return not tried({*islands, *order[count:]})[1] <= GATES["float16"]

    while True:
        made, found = tried(islands)
        if found <= GATES["float16"]:
            return Narrowed(made, found, tuple(islands))
        name = order[bisect_left(range(1, len(order)), True, key=fails)]
        if name in islands or len(islands) >= most:
            if found <= tol:
                return Narrowed(made, found, tuple(islands))
            raise LoraFxError(
                f"float16 differs by {found:.1e} with {len(islands)} nodes left in float32; the "
                f"gate is {tol:.1e}{getattr(error, 'failure', '')}",
                "the model needs float32's range or precision in too many places; --tol accepts "
                "more",
            )
        islands.append(name)


def _named(model: ir.Model) -> ir.Model:
    """A copy whose nodes have names of their own and whose values have dtypes."""
    copy = model.clone()
    taken: set[str] = set()
    for i, node in enumerate(copy.graph.all_nodes()):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{i}"
        taken.add(node.name)
    if any(v.dtype is None for n in copy.graph for v in n.outputs):
        ShapeInferencePass()(copy)
    return copy


def _drop_unread(model: ir.Model) -> None:
    """Float32 weights that were converted go, and the new ones take their names."""
    stored = model.graph.initializers
    for name, value in list(stored.items()):
        if name.endswith("_half") and (old := stored.get(name[:-5])) is not None and not old.uses():
            del stored[name[:-5]]
            value.name = name[:-5]


def _int8(model: ir.Model, error: WorstError, tol: float) -> Narrowed:
    """Weights by channel, activations as they come; biases and everything else stay.

    Weights take seven bits: processors without VNNI add pairs of 8-bit products in 16 bits, which
    saturate, so that a file that is right on one machine would be wrong on another.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # the converter logs advice that is not for our users
    with scratch_folder() as folder, silenced(levels={"": logging.ERROR}):
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        copy = model.clone()
        ir.external_data.load_to_model(copy)
        proto = ir.to_proto(copy)
        del proto.graph.value_info[:]  # the converter turns weights and keeps the shapes they had
        onnx.save(proto, before)
        kind = QuantType.QInt8
        quantize_dynamic(before, after, weight_type=kind, per_channel=True, reduce_range=True)
        made = ir.load(after)
        ir.external_data.load_to_model(made)
    found = error(made)
    if not found <= tol:
        raise LoraFxError(
            f"int8 differs by {found:.1e}; the gate is {tol:.1e}{error.failure}",
            "float16, or a model that was trained for int8; --tol accepts more",
        )
    return Narrowed(made, found)


# float16 for every node but the islands: weights converted, casts where the two meet.
#
# A value has one cast to the other dtype, however many nodes read it. Inputs and outputs of the
# graph stay float32. Bodies of If, Loop and Scan stay as they are, and what they read is cast for
# them.


KEPT = frozenset({
    "Resize", "Upsample", "NonMaxSuppression", "TopK", "RoiAlign", "Range", "CumSum", "Min", "Max",
    "ConstantOfShape", "Constant", "RandomNormal", "RandomUniform", "RandomNormalLike",
    "RandomUniformLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
})  # fmt: skip
"""Ops with operands or kernels that are float32 only, or whose dtype is an attribute."""
MICROSOFT = "com.microsoft"
FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class ToHalf(ir.passes.InPlacePass):
    """Convert a model in place.

    Attributes:
        islands: Names of nodes that stay in float32.
    """

    islands: Collection[str] = ()
    _casts: dict[tuple[int, ir.DataType], ir.Value] = field(default_factory=dict, compare=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        graph = model.graph
        nodes = [n for n in graph if self._converts(n)]
        taken = set(nodes)
        mine = {o for n in nodes for o in n.outputs if o.dtype == FULL}
        outputs = {o for o in graph.outputs if o in mine}
        for node in graph.all_nodes():
            to = HALF if node in taken else FULL
            for i, value in enumerate(node.inputs):
                now = HALF if value in mine else None if value is None else value.dtype
                if value is not None and {now, to} == {FULL, HALF}:
                    node.replace_input_with(i, self._as(graph, value, to))
        for node in nodes:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == FULL:
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
        for value in mine:
            value.type = ir.TensorType(HALF)
        for value in outputs:
            self._end(graph, value)
        return ir.passes.PassResult(model, bool(nodes))

    def _converts(self, node: ir.Node) -> bool:
        """True for a node that computes with floats, and may do so with fewer bits."""
        if node.op_type in KEPT or node.name in self.islands or node.domain not in ("", MICROSOFT):
            return False
        if bodies_of(node):
            return False
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        known = all(v.dtype is not None and is_tensor(v) for v in values)
        return known and any(v.dtype == FULL for v in values)

    def _as(self, graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
        """A value in another dtype: a converted initialiser, or one cast of its own."""
        known = self._casts.get((id(value), to))
        if known is not None:
            return known
        stem = "half" if to == HALF else "full"
        if value.const_value is not None and value.name in graph.initializers:
            array = value.const_value.numpy().astype(to.numpy())
            made = add_initialiser(graph, f"{value.name}_{stem}", array)
            made.metadata_props.update(value.metadata_props)
        else:
            node = ir.node("Cast", [value], {"to": int(to)}, name=f"{value.name}_to_{stem}")
            made = node.outputs[0]
            made.name, made.type = f"{value.name}_{stem}", ir.TensorType(to)
            made.shape = value.shape
            maker = value.producer()
            if maker is None:
                graph[0].prepend(node)
            else:
                maker.append(node)
        self._casts[id(value), to] = made
        return made

    def _end(self, graph: ir.Graph, value: ir.Value) -> None:
        """An output of the graph keeps its name and dtype, and a cast makes it."""
        name, value.name = value.name, f"{value.name}_half"
        full = self._as(graph, value, FULL)
        full.name = name
        graph.outputs[graph.outputs.index(value)] = full
