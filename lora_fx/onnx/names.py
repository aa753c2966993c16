"""Names in an exported graph: weights get their torch names back, dimensions their symbols."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.flow import free_name
from lora_fx.targets.found import Found
from lora_fx.targets.regions import keys_of, of_use
from lora_fx.targets.target import Target, base_name, split_use

CHANGED = "lora_fx.changed"
"""Metadata key of a weight that is no longer the parameter whose name it has."""

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


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


def _values(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values += [v for v in node.outputs if v is not None]
    return values


def strip_traces(model: ir.Model) -> None:
    """Drop the metadata that names source files of the machine the model was exported on.

    What lora-fx wrote stays.
    """
    graph = model.graph
    things: list[ir.Node | ir.Value] = [*graph.all_nodes(), *_values(model)]
    for thing in [*things, *graph.initializers.values()]:
        for key in [k for k in thing.metadata_props if not k.startswith("lora_fx")]:
            del thing.metadata_props[key]
    graph.metadata_props.clear()


# One tied tensor as several constants: which of them an update of the tensor reaches.
#
# An exporter stores a tied embedding and head apart (the head transposed). The copies say in their
# metadata what they are copies of, so that one update reaches each of them, or those that its use
# names, in the layout that they have.


COPY_OF = "lora_fx.copy_of"


def copies_of(model: ir.Model) -> dict[str, str]:
    """For each initialiser that is another copy of a tensor, the name of that tensor."""
    values = model.graph.initializers.values()
    return {str(v.name): v.metadata_props[COPY_OF] for v in values if COPY_OF in v.metadata_props}


def spread(adapter: Adapter, found: Found, copies: Mapping[str, str]) -> Adapter:
    """The adapter with an entry for every copy of a tensor that its update reaches.

    Args:
        adapter: An adapter that is bound to a module, or not bound.
        found: The targets of the ONNX graph.
        copies: What `copies_of` gave.

    Raises:
        LoraFxError: The update is of one use, and the file does not tell which copy that is.
    """
    entries: dict[str, Entry] = {}
    for key, entry in adapter.entries.items():
        name = base_name(key)
        twins = [c for c, source in copies.items() if source == name]
        stored = [t for c in (name, *twins) if (t := found.get(c)) is not None]
        call = not twins and split_use(key)[1].startswith("call:")  # the order of nodes is kept
        if not stored or call or not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        reached = _reached(key, entry, stored)
        if not twins and not (entry.use or split_use(key)[1]):
            entries[key] = entry
            continue
        for target in reached:
            entries[target.key] = _turned(entry, target.op == "embedding")
    return replace(adapter, entries=entries)


def _reached(key: str, entry: LowRank, stored: Sequence[Target]) -> Sequence[Target]:
    """The copies that an update is for: all of them, or the lookup's, or the head's."""
    use = entry.use or split_use(key)[1]
    if not use:
        if entry.tied and entry.op != "embedding" and {t.op for t in stored} == {"embedding"}:
            raise LoraFxError(
                f"the update of {key!r} is for a lookup and for another product ({entry.op}), and "
                "the file has only the lookup by this name",
                "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
            )
        return stored
    lookup = (use if use.startswith("op:") else f"op:{entry.op}") == "op:embedding"
    meant = []
    for t in stored:
        keys = keys_of(t, [s for s in t.sites if (s.op == "embedding") == lookup])
        meant += [t if k == t.key else of_use(t, split_use(k)[1]) for k in keys]
    reached = [t for t in meant if t is not None]
    if use != "op:embedding" and sum(len(t.sites) for t in reached) != 1:
        raise LoraFxError(  # which of the file's nodes is that use, nothing tells
            f"the update of {key!r} acts on its use {use!r}, and the file reads the tensor as "
            f"{', '.join(f'{t.key} ({len(t.sites)} uses)' for t in stored)}",
            "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
        )
    return reached


def as_lookup(entry: LowRank) -> bool:
    """True where in of an update is the rows of a table; a bound one may lie as the head does."""
    return entry.op == "embedding" and (entry.layout is None or entry.layout.in_ == (0,))


def _turned(entry: LowRank, lookup: bool) -> LowRank:
    """The update as a copy's op reads it: a lookup's in and out are the head's swapped."""
    was_lookup = as_lookup(entry)
    turned = replace(entry, use="", layout=None, tied=False, twins=())
    if lookup == was_lookup:
        return turned
    if entry.magnitude is not None:
        raise LoraFxError(
            "a DoRA update is for both the lookup and the head of a tied tensor, whose rows are "
            "the columns of the other",
            "give the update to one of them",
        )
    a, b = np.swapaxes(entry.b, -1, -2), np.swapaxes(entry.a, -1, -2)
    return replace(turned, a=a, b=b, op="embedding" if lookup else "linear")
