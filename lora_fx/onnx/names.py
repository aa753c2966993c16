"""Names in an exported graph: weights get their torch names back, dimensions their symbols."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.copies import COPY_OF

CHANGED = "lora_fx.changed"
"""On a weight that is no longer the parameter whose name it has."""

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def restore_weight_names(model: ir.Model, first: Mapping[str, str] | None = None) -> int:
    """Rename `val_N` initialisers to the parameter that the exporter folded them from.

    Two constants of one parameter (a tied weight and its transpose) get `NAME` and `NAME.1`.
    Returns the number of renamed initialisers.

    Args:
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
        if source == old:
            continue
        name, i = source, 0
        while name in taken:
            i += 1
            name = f"{source}.{i}"
        del graph.initializers[old]
        value.name = name
        if name != source:
            value.metadata_props[COPY_OF] = source
        if value.const_value is not None:
            value.const_value.name = name
        graph.initializers[name] = value
        taken.add(name)
        count += 1
    return count


def mark_changed(model: ir.Model, values: Mapping[str, Callable[[], Array]]) -> None:
    """Mark weights that the exporter folded something into, such as a batch norm.

    Args:
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
    """The one name in a folded_from list, or None."""
    try:
        names = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return None
    return str(names[0]) if isinstance(names, list) and len(names) == 1 else None


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

    def renamed(shape: ir.Shape) -> ir.Shape:
        return ir.Shape(
            pattern.sub(lambda m: mapping[m.group()], str(size.value))
            if isinstance(size, ir.SymbolicDim) and size.value
            else size
            for size in shape
        )

    for value in _values(model):
        if value.shape is not None:
            value.shape = renamed(value.shape)


def _values(model: ir.Model) -> list[Any]:
    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values += [v for v in node.outputs if v is not None]
    return values


def strip_traces(model: ir.Model) -> None:
    """Drop the metadata that names source files of the machine the model was exported on.

    What lora-fx wrote stays.
    """
    for node in model.graph.all_nodes():
        _strip(node)
        for out in node.outputs:
            if out is not None:
                _strip(out)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        _strip(value)
    model.graph.metadata_props.clear()


def _strip(thing: ir.Node | ir.Value) -> None:
    for key in [k for k in thing.metadata_props if not k.startswith("lora_fx")]:
        del thing.metadata_props[key]
