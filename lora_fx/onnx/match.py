"""Find the tensor of an ONNX file that an adapter's key means, by rules that read no values.

1. the names in the file, which torch's exporter keeps, or tells in its metadata
2. the module path in a node's name, where the older exporter called the weight `onnx::MatMul_12`
3. a map that the user gives, adapter key → tensor
4. the shape, where no key of the adapter is a name and one key and one target alone have it

What several tensors answer to is refused. Paths and shapes are rules of `lora_fx.targets.names`;
with the paths as further names of its targets, `lora_fx.adapter.adapter.bind` takes the file as any
other graph.

A whole tensor (a bias, a new head) goes by the same names; a matrix lies as its op reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.strict_json import read_json
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import operand
from lora_fx.onnx.names import CHANGED, FOLDED_FROM
from lora_fx.onnx.tensor_copies import copies_of
from lora_fx.onnx.tied_updates import op_of, spread
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name
from lora_fx.targets.names import Names, also_called
from lora_fx.targets.target import Target
from lora_fx.text import near

FOLDED = 8192
"""Elements of the largest tensor that onnxscript computes from."""


@dataclass(frozen=True)
class Matched:
    """An adapter in the keys and layouts of a graph: updates, and tensors that are replaced."""

    updates: dict[str, LowRank]
    whole: dict[str, Array]


def match(
    adapter: Adapter, graph: OnnxGraph, found: Found, given: Mapping[str, str] | None = None
) -> Matched:
    """Find the tensor of every entry.

    Args:
        adapter: An adapter of any format, bound to another model or not at all.
        graph: The graph of the file.
        found: The targets of the graph.
        given: A map of the user's, adapter key → tensor of the file.

    Raises:
        LoraFxError: An entry whose tensor the file does not have, or a shape that does not fit.
    """
    adapter = _renamed(adapter, given or {})
    found = _scoped(adapter, found)
    if not given:
        adapter = _renamed(adapter, _by_shape(adapter, graph, found))
    replacements: dict[str, Array] = {}
    for key, tensor in adapter.full.items():
        name, value = _replacement(key, tensor, graph, found)
        replacements[name] = value

    updates = {key: e for key, e in adapter.entries.items() if not isinstance(e, Full)}
    by_copy = spread(updates, found, copies_of(graph.model))
    for key, entry in by_copy.items():
        if isinstance(entry, LowRank):
            # the layout of another graph says nothing of this one
            origin = replace(entry.origin, op=op_of(entry))
            by_copy[key] = replace(entry, layout=None, origin=origin)
    bound = bind(replace(adapter, entries=by_copy), found)
    for key in bound.lowrank:
        _check_unchanged(key, graph, found)

    changed = {found[key].parameter.name for key in bound.lowrank} | set(replacements)
    graph.notes += _notes_of_derived_constants(graph, changed)
    return Matched(dict(bound.lowrank), replacements)


def _notes_of_derived_constants(graph: OnnxGraph, changed: Collection[str]) -> list[str]:
    """Notes of constants that another exporter computed from a weight that changes.

    Its metadata may tell; else equal rows do, of a weight that onnxscript would fold.
    """
    notes = []
    for name in graph.flow.stores:
        if name in changed:
            continue
        source = _source_of(name, graph, changed)
        if source is not None:
            notes.append(
                f"{name!r} may be computed from {source!r}, and does not get the update: "
                "export again"
            )
    return notes


def _source_of(name: str, graph: OnnxGraph, changed: Collection[str]) -> str | None:
    """The weight among those that change from which a constant may be computed."""
    folded_from = graph.flow.stores[name].metadata_props.get(FOLDED_FROM, "")
    constant = graph.flow.tensor(name)
    for weight in changed:
        if repr(weight) in folded_from or _begins(constant, graph.flow.tensor(weight)):
            return weight
    return None


def _begins(constant: ir.TensorProtocol, weight: ir.TensorProtocol) -> bool:
    """Whether a constant begins with a row or a column of a small matrix, and is not as large."""
    shape = tuple(constant.shape.numpy())
    weight_shape = tuple(weight.shape.numpy())
    if weight.size > FOLDED or len(weight_shape) != 2 or shape == weight_shape:
        return False
    if not constant.size or not shape or shape[-1] < 2:
        return False
    row = constant.numpy().reshape(-1, shape[-1])[0]
    if (row == row[0]).all():
        return False
    matrix = weight.numpy()
    return _has_row(matrix, row) or _has_row(matrix.T, row)


def _has_row(matrix: Array, row: Array) -> bool:
    return matrix.shape[1] == len(row) and bool((matrix == row).all(1).any())


def _check_unchanged(key: str, graph: OnnxGraph, found: Found) -> None:
    """Raise where a weight has a parameter's name and is another matrix.

    An exporter that folds a batch norm into a convolution keeps the name, and calls the bias that
    the convolution did not have `NAME_bias`; files of ours say it in their metadata.
    """
    name = found[key].parameter.name
    value = graph.flow.stores[name]
    biases = [operand(user, 2) for user, _ in value.uses()]
    has_added_bias = any(bias is not None and bias.name == f"{name}_bias" for bias in biases)
    if has_added_bias or CHANGED in value.metadata_props:
        raise LoraFxError(
            f"the update of {key!r} is for the model's own weight, but {name!r} in the file has a "
            "normalisation folded into it",
            "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
        )


def _scoped(adapter: Adapter, found: Found) -> Found:
    """The targets, which then also go by the module path of the nodes that read them."""
    targets = (*found.targets, *found.optional)
    parameters = {target.parameter.name: target.parameter for target in targets}
    paths = _module_paths(targets)

    by_path = Names(parameters, also_called(paths))
    for key in adapter.entries:
        hits = by_path.find(key)
        if len(hits) > 1:
            raise _ambiguous(key, sorted(hits), "nodes of one module read them")
    unique_paths: dict[str, tuple[str, ...]] = {}
    for name, paths_of_name in paths.items():
        unique_paths[name] = tuple(p for p in paths_of_name if len(by_path.find(p)) == 1)

    def with_paths(target: Target) -> Target:
        aliases = (*target.parameter.aliases, *unique_paths[target.parameter.name])
        return replace(target, parameter=replace(target.parameter, aliases=aliases))

    shapes = dict(found.shapes)
    for name, unique in unique_paths.items():
        shapes |= dict.fromkeys(unique, parameters[name].shape)
    return replace(
        found,
        targets=tuple(map(with_paths, found.targets)),
        optional=tuple(map(with_paths, found.optional)),
        shapes=shapes,
    )


def _module_paths(targets: Sequence[Target]) -> dict[str, dict[str, None]]:
    """For each tensor the module paths of the nodes that read it, which are no tensor's names."""
    names: set[str] = set()
    for target in targets:
        names.update(target.parameter.names)

    paths: dict[str, dict[str, None]] = {target.parameter.name: {} for target in targets}
    for target in targets:
        for site in target.sites:
            if not site.scope:
                continue
            for path in (site.scope, f"{site.scope}.weight"):
                if path not in names:
                    paths[target.parameter.name][path] = None
    return paths


def _by_shape(adapter: Adapter, graph: OnnxGraph, found: Found) -> dict[str, str]:
    """For each adapter key the one target of its shape; empty where names lead anywhere."""
    lowrank = adapter.lowrank
    if len(lowrank) < len(adapter.entries) or adapter.names is not None:
        return {}
    names = {*found.shapes, *graph.flow.stores}
    if any(base_name(key) in names or found.get(key) is not None for key in adapter.entries):
        return {}

    target_sizes = {t.key: [(t.layout.in_size, t.layout.out_size)] for t in found.targets}
    update_sizes = {key: [(low.a.shape[-1], low.b.shape[-2])] for key, low in lowrank.items()}
    targets = Names(target_sizes, also_called(target_sizes, update_sizes.__getitem__))
    updates = Names(update_sizes, also_called(update_sizes, target_sizes.__getitem__))
    why = "no name connects the key with one of them, and their shapes are equal"
    target_of: dict[str, str] = {}
    for key in lowrank:
        hits = targets.find(key)
        if not hits:
            return {}
        if len(hits) > 1:
            raise _ambiguous(key, hits, why)
        rivals = updates.find(hits[0])
        if len(rivals) > 1:
            raise _ambiguous(hits[0], rivals, why)
        target_of[key] = hits[0]
    for key, name in target_of.items():
        graph.notes.append(f"{key!r} is merged into {name!r}, the only tensor of its shape")
    return target_of


def _ambiguous(key: str, candidates: Sequence[str], why: str) -> LoraFxError:
    return LoraFxError(
        f"{key!r} is not a target of the model; it may be any of "
        f"{', '.join(map(repr, candidates[:4]))}: {why}",
        "say which with --names FILE: {adapter key: tensor}",
    )


def read_map(path: str | None) -> dict[str, str]:
    """The map of a --names file: one JSON object of adapter keys and tensor names."""
    if path is None:
        return {}
    names = read_json(path, hint="a JSON object")
    if not all(isinstance(name, str) for name in names.values()):
        raise LoraFxError(f"{path}: expected one object of names", '{"adapter key": "tensor"}')
    return names


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter under other keys; those that the map does not name stay."""
    for key in names:
        if key not in adapter.entries:
            raise LoraFxError(
                f"the map of names has {key!r}, which the adapter does not have",
                near(key, adapter.entries),
            )
    entries = {names.get(key, key): entry for key, entry in adapter.entries.items()}
    if len(entries) < len(adapter.entries):
        raise LoraFxError(
            "the map of names gives one tensor two updates", "give each tensor only one update"
        )
    return replace(adapter, entries=entries)


def _replacement(key: str, entry: Full, graph: OnnxGraph, found: Found) -> tuple[str, Array]:
    """The name of a replaced tensor in the file, and its value in the file's layout."""
    target = found.get(key)
    name = target.parameter.name if target is not None else key
    stored = graph.flow.stores.get(name)
    if stored is None:
        raise LoraFxError(
            f"adapter tensor {key!r} is not in the model", near(key, graph.flow.stores)
        )
    if len(stored.uses()) > 1:
        raise LoraFxError(
            f"adapter tensor {key!r} replaces a whole tensor, but {len(stored.uses())} nodes read "
            f"{name!r}: the exporter joined equal constants",
            "put the adapter's whole tensors into the model and export it, then merge the rest",
        )
    value = entry.value
    shape = tuple(graph.flow.tensor(name).shape.numpy())
    lies_in_out = target is not None and target.op != "embedding" and target.layout.out == (1,)
    if lies_in_out and value.ndim == 2:
        value = value.T  # a file of torch has [out, in]
    if value.shape != shape:
        raise MisfitError(
            f"adapter tensor {key!r} is {list(entry.value.shape)}; the model's is {list(shape)}"
        )
    return name, np.ascontiguousarray(value)
