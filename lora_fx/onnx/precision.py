"""Conversion to a lower precision: float16 with float32 islands, or int8 products.

int8 is onnxruntime's own conversion. For float16, nodes whose values come near the end of its range
stay in float32: on the CPU, where ONNX Runtime computes float16 in float32, nothing else would show
that. The rest is compared: where it differs too much, further nodes go back one by one. The next
one is found by bisection: with only the first k nodes in float16, the smallest k that fails ends
with the node that has to go back.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from lora_fx.compare import STEPS
from lora_fx.errors import LoraFxError, retold, silenced
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.candidate_error import Feeds, WorstError, ends_the_process, peaks
from lora_fx.onnx.rewrites.to_half import ToHalf
from lora_fx.onnx.save import weight_bytes
from lora_fx.progress import stage

PRECISION = "lora_fx.precision"
GATES = {"float16": 8 * 2.0**-10, "int8": STEPS, "level 4": STEPS}
"""max|a − b| / max|b| of an output: eight units in the last place of the precision.

Level 4 is MatMulNBits with its x in int8: what it rounds is what the precision int8 rounds.
"""
MOST = 24
"""The most nodes that may return to float32, in addition to nodes with large values."""
RANGE = 65504.0 / 4
"""The largest value that is safe in float16, because real data may have larger values."""
LARGEST = (1 << 31) - (1 << 24)
"""The largest size of a converted model in bytes: converters work on one protobuf message."""


@dataclass(frozen=True)
class Narrowed:
    """A converted model.

    Attributes:
        model: The model.
        error: Largest difference of an output to the model before.
        islands: Names of nodes that stayed in float32.
    """

    model: ir.Model
    error: float
    islands: tuple[str, ...] = ()

    def said(self, precision: str) -> str:
        """Return a line for the report."""
        text = f"{precision}: outputs differ from float32 by {self.error:.1e}"
        if self.error > GATES[precision]:
            text += f", over the gate of {GATES[precision]:.1e}, but within tol"
        if self.islands:
            text += f"; {len(self.islands)} nodes stay in float32: {', '.join(self.islands[:4])}"
        if len(self.islands) > 4:
            text += " …"
        return text


@dataclass(frozen=True)
class Limit:
    """The difference that a conversion is allowed.

    Attributes:
        precision: float16 or int8.
        tol: The largest max|a - b| / max|b|.
        error: The function that measures a candidate.
        drawn: How many of its inputs, the first ones, are random.
    """

    precision: str
    tol: float
    error: WorstError
    drawn: int

    def refusal(self, candidate: ir.Model, difference: float, islands: int = 0) -> LoraFxError:
        """Return the error of a candidate that differs by more than `tol`."""
        text = f"{self.precision} differs by {difference:.1e}"
        if islands:
            text += f" with {islands} nodes left in float32"
        other = "int8" if self.precision == "float16" else "float16"
        hints = [f"use --precision {other}, or leave --precision out"]
        if math.isfinite(difference):
            text += f" {self.error.place(candidate, self.tol, self.drawn)}"
            accepted = _rounded_up(difference)
            if accepted < 1:
                hints.insert(0, f"--tol {accepted:g} accepts this difference")
            if self.drawn:
                hints.insert(0, "measure on data of your own with --inputs")
        text += f"; the gate is {self.tol:.1e}{self.error.failure}"
        return LoraFxError(text, "; ".join(hints))


def _rounded_up(difference: float) -> float:
    """Return a difference, plus 5 % for what another machine rounds, in two digits.

    >>> _rounded_up(0.0713), _rounded_up(0.25)
    (0.075, 0.27)
    """
    step = 10.0 ** (math.floor(math.log10(difference * 1.05)) - 1)
    return round(math.ceil(difference * 1.05 / step) * step, 9)


def narrow(
    model: ir.Model,
    precision: str,
    feeds: Feeds,
    provider: str,
    tol: float | None = None,
    *,
    drawn: int | None = None,
) -> Narrowed:
    """Convert a clone of a model.

    Args:
        model: In float32.
        precision: float16 or int8.
        feeds: Inputs by name, that candidates are compared on.
        provider: auto, cpu, cuda or webgpu.
        tol: What is accepted where the gate cannot be met.
        drawn: How many of the inputs, the first ones, are random and not a user's; all by default.

    Raises:
        LoraFxError: A model of over 2 GB, or one that differs too much whatever is left out.
    """
    if precision not in GATES:
        raise LoraFxError(
            f"an .onnx file cannot be converted to {precision!r}", "use float16 or int8"
        )
    if weight_bytes(model) > LARGEST:
        raise LoraFxError(
            f"{weight_bytes(model)} bytes of weights; expected less than 2 GB for {precision}",
            "leave the precision out: converters and runtimes take the model in one protobuf "
            "message",
        )
    error = WorstError(model, feeds, provider)
    drawn = len(feeds) if drawn is None else drawn
    limit = Limit(precision, tol or GATES[precision], error, drawn)
    with stage(f"converting to {precision}"):
        if precision == "int8":
            narrowed = _to_int8(model, limit)
        else:
            narrowed = _to_float16(model, limit, peaks(model, feeds, provider))
    narrowed.model.metadata_props[PRECISION] = precision  # the gate of whoever compares it later
    return narrowed


def at_level(model: ir.Model, level: int) -> None:
    """Set whether products with codes of 2, 4 or 8 bits read x unchanged (0) or in int8 (4).

    Raises:
        LoraFxError: The model has none.
    """
    if not level:
        return
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    if not products:
        raise LoraFxError(
            f"accuracy level {level} is for products over int4 or int8 codes, and the file has "
            "none",
            "leave the accuracy level out: nf4 and fp4 are always computed in floats",
        )
    for node in products:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    model.metadata_props[PRECISION] = f"level {level}"


def _to_float16(model: ir.Model, limit: Limit, magnitudes: Mapping[str, float]) -> Narrowed:
    """Convert a model to float16, except the fewest nodes that must stay in float32.

    1. Nodes of values near the end of float16's range stay, the islands.
    2. While the outputs differ by more than the gate, one more node stays, found by bisection.
    3. Once MOST nodes have been added, or bisection can name no further one, a difference up to
       the limit is accepted, and a larger one is an error.

    Args:
        model: In float32; not changed.
        limit: What is accepted where the gate cannot be met.
        magnitudes: Value → the largest that it takes.
    """
    named = _named(model)
    order = [str(node.name) for node in named.graph]
    islands = [str(node.name) for node in named.graph if _comes_near_the_range(node, magnitudes)]
    most_islands = len(islands) + MOST

    def converted(float32_nodes: Collection[str]) -> ir.Model:
        candidate = named.clone()
        ToHalf(frozenset(float32_nodes))(candidate)
        _drop_unread(candidate)
        return candidate

    def fails(count: int) -> bool:
        """Whether the first `count` nodes (without islands) exceed the gate in float16."""
        return not limit.error(converted({*islands, *order[count:]})) <= GATES["float16"]

    if ends_the_process(converted(islands)):
        raise LoraFxError(
            "ONNX Runtime ends the process when it loads this graph in float16",
            "leave --precision out, or use --precision int8",
        )
    while True:
        candidate = converted(islands)
        difference = limit.error(candidate)
        if difference <= GATES["float16"]:
            return Narrowed(candidate, difference, tuple(islands))

        culprit = order[bisect_left(range(1, len(order)), True, key=fails)]
        if culprit not in islands and len(islands) < most_islands:
            islands.append(culprit)
        elif difference <= limit.tol:
            return Narrowed(candidate, difference, tuple(islands))
        else:
            raise limit.refusal(candidate, difference, len(islands))


def _named(model: ir.Model) -> ir.Model:
    """Return a copy in which every node has a unique name and every value a dtype."""
    copy = model.clone()
    names: set[str] = set()
    for i, node in enumerate(copy.graph.all_nodes()):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{i}"
        names.add(node.name)
    if any(_lacks_dtype(node) for node in copy.graph):
        ShapeInferencePass()(copy)
    return copy


def _lacks_dtype(node: ir.Node) -> bool:
    return any(output.dtype is None for output in node.outputs)


def _comes_near_the_range(node: ir.Node, magnitudes: Mapping[str, float]) -> bool:
    """Whether a value that a node reads or makes is larger than RANGE."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and magnitudes.get(str(value.name), 0.0) > RANGE:
            return True
    return False


def _drop_unread(model: ir.Model) -> None:
    """Remove float32 weights that were converted; the new weights take their names."""
    initialisers = model.graph.initializers
    for name, value in list(initialisers.items()):
        full_name = name.removesuffix("_half")
        full = initialisers.get(full_name)
        if full_name != name and full is not None and not full.uses():
            del initialisers[full_name]
            value.name = full_name


def _to_int8(model: ir.Model, limit: Limit) -> Narrowed:
    """Quantise weights to int8 by channel and activations dynamically; biases and the rest stay.

    Weights take seven bits: processors without VNNI add pairs of 8-bit products in 16 bits, which
    saturate, so that a file that is right on one machine would be wrong on another.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # the converter logs advice that is not for our users
    with scratch_folder() as folder, silenced(levels={"": logging.ERROR}):
        before = Path(folder) / "before.onnx"
        after = Path(folder) / "after.onnx"
        copy = model.clone()
        ir.external_data.load_to_model(copy)
        proto = ir.to_proto(copy)
        del proto.graph.value_info[:]  # the converter turns weights and keeps the shapes they had
        onnx.save(proto, before)
        refused = "ONNX Runtime cannot make int8 of this graph"  # such as a computed bias
        with retold(refused, "use --precision float16, or leave --precision out"):
            quantize_dynamic(
                before, after, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
            )
        quantised = ir.load(after)
        ir.external_data.load_to_model(quantised)

    difference = limit.error(quantised)
    if not difference <= limit.tol:
        raise limit.refusal(quantised, difference)
    return Narrowed(quantised, difference)
