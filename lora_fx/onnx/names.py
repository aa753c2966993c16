"""What torch's exporter leaves to mend: names of weights and dimensions, traces, and masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from os import PathLike

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.emitter import add_initialiser
from lora_fx.onnx.graph.flow import follow
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import DATA
from lora_fx.onnx.graph.ops import row_of
from lora_fx.onnx.graph.values import constant, made_by, values_of
from lora_fx.onnx.graph.views import VIEWS
from lora_fx.onnx.load import load
from lora_fx.text import free_name, listed_texts

CHANGED = "lora_fx.changed"
"""Metadata key of a weight that is no longer the parameter whose name it has."""

COPY_OF = "lora_fx.copy_of"
"""Metadata key of a constant that is another copy of a tensor, with that tensor's name."""

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def unfolded(weights: Collection[str]) -> Callable[[ir.Node], bool | None]:
    """A rule for onnxscript's folding of constants: whether it may fold a node, None for its own.

    It computes from tensors of up to 8,192 elements whatever it can, and an update of a weight
    would miss the rows that were looked up, or the part that was cut out. So small weights stay
    as large ones do: products, lookups and views of them are nodes, and only what is the one
    reader of a weight may be turned.
    """
    names = set(weights)

    def rule(node: ir.Node) -> bool | None:
        viewed = node.op_type in VIEWS and node.op_type != "Gather"
        read = [v for v in node.inputs[: 1 if viewed else None] if v is not None and _of(v) & names]
        if not read or (node.op_type == "Transpose" and len(read[0].uses()) == 1):
            return None
        return False if viewed or _is_site(node) else None

    return rule


def _of(value: ir.Value) -> set[str]:
    """The name of a value, and of what it was folded from; none of sizes and other integers."""
    whole = value.dtype is not None and value.dtype.is_integer()
    return set() if whole else {str(value.name), *value.meta.get(FOLDED_FROM, ())}


def _is_site(node: ir.Node) -> bool:
    """Whether a node is a product or a lookup; what picks rows by an index is a reader."""
    known = "aten.embedding" in node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    marked = any(v is not None and DATA in v.metadata_props for v in node.inputs)
    return row_of(node) is not None and (node.op_type != "Gather" or known or marked)


def mark_data(model: ir.Model, weights: Collection[str]) -> None:
    """Mark the constants that weights are multiplied by, or looked up at: they are no weights."""
    flow, names = follow(model), set(weights)
    for node in filter(_is_site, model.graph.all_nodes()):
        known = [flow.stores[w.name] for v in node.inputs if (w := flow.weight_of(v))]
        others = [v for v in known if not _of(v) & names]
        for value in others if len(others) < len(known) else ():
            value.metadata_props[DATA] = node.op_type


def named_graph(path: str | PathLike[str]) -> tuple[OnnxGraph, int]:
    """The graph of a file, and how many tensors got names that the exporter's metadata tells.

    Raises:
        LoraFxError: As load; an opset that is not read.
    """
    model = load(path)
    renamed = restore_weight_names(model)
    return OnnxGraph(model), renamed


def give_own_names(
    model: ir.Model,
    first: Mapping[str, str] | None,
    symbols: Mapping[tuple[str, int], str],
) -> None:
    """Give an exported model the names of its weights and dimensions, and take traces out of it.

    Args:
        model: The model, edited in place.
        first: As in restore_weight_names.
        symbols: As in rename_dimensions.
    """
    restore_weight_names(model, first)
    rename_dimensions(model, symbols)
    strip_traces(model)


def restore_weight_names(model: ir.Model, first: Mapping[str, str] | None = None) -> int:
    """Rename `val_N` initialisers to the parameter that the exporter folded them from.

    torch's exporter transposes the weight of a linear layer into a new constant, and leaves the
    name in its metadata (`pkg.onnxscript.optimizer.folded_from`). So this runs before anything that
    clears metadata.

    Two constants of one parameter (a tied weight and its transpose) get `NAME` and `NAME.1`.
    Returns the number of renamed initialisers.

    Args:
        model: The model, edited in place.
        first: Any name of a tied tensor → the name that it goes by.
    """
    graph, names = model.graph, first or {}
    taken = set(graph.initializers)  # and what nodes make: the exporter may fold from such a name
    taken |= {str(o.name) for n in graph.all_nodes() for o in n.outputs}
    count = 0
    for value in list(graph.initializers.values()):
        old = str(value.name)
        source = _source(value.metadata_props.get(FOLDED_FROM, "")) or old
        source = names.get(source, source)
        if source == old or value.is_graph_output():  # whose name is the file's interface
            continue
        name = free_name(source, taken)
        value.name = name
        if name != source:
            value.metadata_props[COPY_OF] = source
        taken.add(name)
        count += 1
    return count


def copies_of(model: ir.Model) -> dict[str, str]:
    """For each initialiser that is another copy of a tensor, the name of that tensor."""
    values = model.graph.initializers.values()
    return {str(v.name): v.metadata_props[COPY_OF] for v in values if COPY_OF in v.metadata_props}


def mark_changed(model: ir.Model, values: Mapping[str, Callable[[], Array]]) -> None:
    """Mark weights that the exporter folded something into, such as a batch norm.

    Args:
        model: The model, edited in place.
        values: Name of a parameter → its value in the model that was exported.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 2:
            continue
        value = node.inputs[1]
        if value is None or value.const_value is None or str(value.name) not in values:
            continue
        ours, theirs = value.const_value.numpy(), values[str(value.name)]()
        same = ours.shape == theirs.shape and np.array_equal(ours, theirs, equal_nan=True)
        if not same and not (ours.ndim == 2 and np.array_equal(ours.T, theirs, equal_nan=True)):
            value.metadata_props[CHANGED] = node.op_type


def _source(text: str) -> str | None:
    """The one name in a folded_from list; None where it has several."""
    names = listed_texts(text)
    return names[0] if len(names) == 1 else None


def rename_dimensions(model: ir.Model, symbols: Mapping[tuple[str, int], str]) -> None:
    """Give the dynamic dimensions of inputs the names the user knows, wherever they appear."""
    mapping: dict[str, str] = {}
    for value in model.graph.inputs:
        for d, size in enumerate(value.shape or ()):
            wanted = symbols.get((str(value.name), d))
            if isinstance(size, ir.SymbolicDim) and size.value and wanted:
                mapping.setdefault(str(size.value), wanted)
    if not mapping:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, mapping)) + r")\b")

    for value in values_of(model):
        if value.shape is not None:
            # sizes of inputs that have to be equal have one symbol, and names of their own
            value.shape = ir.Shape(
                symbols.get((str(value.name), d))
                or pattern.sub(lambda m: mapping[m.group()], str(size.value))
                if isinstance(size, ir.SymbolicDim) and size.value
                else size
                for d, size in enumerate(value.shape)
            )


def strip_traces(model: ir.Model) -> None:
    """Drop the metadata that names source files of the machine the model was exported on.

    What lora-fx wrote stays.
    """
    graph = model.graph
    things: list[ir.Node | ir.Value] = [*graph.all_nodes(), *values_of(model)]
    for thing in things:
        for key in [k for k in thing.metadata_props if not k.startswith("lora_fx")]:
            del thing.metadata_props[key]
    graph.metadata_props.clear()


LOWEST = -6e4
"""Scores are above it: float16's least number is −65504."""


def mask_by_infinity(model: ir.Model) -> None:
    """Let a boolean mask add −∞ to the scores that it leaves out.

    The exporter adds the least number of the dtype. A row that is masked everywhere, as the padding
    before a prompt is, then is the mean of all values. In torch it is 0, which the nodes IsNaN and
    Where behind the softmax make of −∞: its softmax is 0/0.
    """
    for node in list(model.graph.all_nodes()):
        softmax = made_by(node.inputs[0], "Softmax") if node.op_type == "IsNaN" else None
        added = made_by(softmax.inputs[0], "Add") if softmax is not None else None
        for value in added.inputs if added is not None else ():
            where = made_by(value, "Where")
            low = None if where is None else constant(where.inputs[2])
            if where is not None and low is not None and low.size == 1 and low.item() < LOWEST:
                name = f"{where.outputs[0].name}_left_out"
                infinity = np.full(low.shape, -np.inf, low.dtype)
                where.replace_input_with(2, add_initialiser(model.graph, name, infinity))
