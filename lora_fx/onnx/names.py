"""Mend what torch's exporter leaves: names of weights and dimensions, and traces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import values_of
from lora_fx.onnx.load import load
from lora_fx.onnx.tensor_copies import COPY_OF
from lora_fx.text import free_name, listed_texts

CHANGED = "lora_fx.changed"
"""Metadata key of a weight that is no longer the parameter whose name it has."""


FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def named_graph(path: str | PathLike[str]) -> tuple[OnnxGraph, int]:
    """The graph of a file, and the number of tensors that got names from the exporter's metadata.

    Raises:
        LoraFxError: As load; an opset that is not read.
    """
    model = load(path)
    renamed = restore_weight_names(model)
    return OnnxGraph(model), renamed


def give_own_names(
    model: ir.Model,
    aliases: Mapping[str, str] | None,
    symbols: Mapping[tuple[str, int], str],
) -> None:
    """Give an exported model the names of its weights and dimensions, and take traces out of it.

    Args:
        model: The model, edited in place.
        aliases: As in restore_weight_names.
        symbols: As in rename_dimensions.
    """
    restore_weight_names(model, aliases)
    rename_dimensions(model, symbols)
    strip_traces(model)


def restore_weight_names(model: ir.Model, aliases: Mapping[str, str] | None = None) -> int:
    """Rename `val_N` initialisers to the parameter that the exporter folded them from.

    torch's exporter transposes the weight of a linear layer into a new constant, and leaves the
    name in its metadata (`pkg.onnxscript.optimizer.folded_from`). So this runs before anything that
    clears metadata.

    Two constants of one parameter (a tied weight and its transpose) get `NAME` and `NAME.1`.

    Args:
        model: The model, edited in place.
        aliases: Any name of a tied tensor → the name that it goes by.

    Returns:
        The number of renamed initialisers.
    """
    graph = model.graph
    used_names = set(graph.initializers)
    for node in graph.all_nodes():  # the exporter may fold from a name that a node's result has
        used_names |= {str(value.name) for value in node.outputs}

    count = 0
    for value in list(graph.initializers.values()):
        stored_name = str(value.name)
        source = _source(value.metadata_props.get(FOLDED_FROM, "")) or stored_name
        if aliases is not None:
            source = aliases.get(source, source)
        if source == stored_name or value.is_graph_output():  # whose name is the file's interface
            continue
        name = free_name(source, used_names)
        value.name = name
        if name != source:
            value.metadata_props[COPY_OF] = source
        used_names.add(name)
        count += 1
    return count


def _source(text: str) -> str | None:
    """The one name in a folded_from list; None where it has several."""
    names = listed_texts(text)
    return names[0] if len(names) == 1 else None


def mark_changed(model: ir.Model, values: Mapping[str, Callable[[], Array]]) -> None:
    """Mark weights that the exporter folded something into, such as a batch norm.

    Args:
        model: The model, edited in place.
        values: Name of a parameter → its value in the model that was exported.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or str(weight.name) not in values:
            continue
        stored = weight.const_value.numpy()
        parameter = values[str(weight.name)]()
        if np.array_equal(stored, parameter, equal_nan=True):
            continue
        if stored.ndim == 2 and np.array_equal(stored.T, parameter, equal_nan=True):
            continue
        weight.metadata_props[CHANGED] = node.op_type


def rename_dimensions(model: ir.Model, symbols: Mapping[tuple[str, int], str]) -> None:
    """Give the dynamic dimensions of inputs the names the user knows, wherever they appear.

    Args:
        model: The model, edited in place.
        symbols: Name of an input and a dimension → the name of its size.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            name = symbols.get((str(value.name), axis))
            if name and isinstance(size, ir.SymbolicDim) and size.value:
                names.setdefault(str(size.value), name)
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(
        value: ir.Value, axis: int, size: int | ir.SymbolicDim
    ) -> int | ir.SymbolicDim | str:
        if not isinstance(size, ir.SymbolicDim) or not size.value:
            return size
        # sizes of inputs that have to be equal have one symbol, and names of their own
        name = symbols.get((str(value.name), axis))
        return name or pattern.sub(lambda match: names[match.group()], str(size.value))

    for value in values_of(model):
        if value.shape is not None:
            sizes = [renamed(value, axis, size) for axis, size in enumerate(value.shape)]
            value.shape = ir.Shape(sizes)


def strip_traces(model: ir.Model) -> None:
    """Drop the metadata that names source files of the machine the model was exported on.

    What lora-fx wrote stays.
    """
    graph = model.graph
    owners: list[ir.Node | ir.Value] = [*graph.all_nodes(), *values_of(model)]
    for owner in owners:
        traces = [key for key in owner.metadata_props if not key.startswith("lora_fx")]
        for key in traces:
            del owner.metadata_props[key]
    graph.metadata_props.clear()
