"""What torch's exporter leaves to mend: names of weights and dimensions, and traces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.flow import values_of
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.tensor_copies import COPY_OF
from lora_fx.text import free_name, listed_texts

CHANGED = "lora_fx.changed"
"""Metadata key of a weight that is no longer the parameter whose name it has."""


FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


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
