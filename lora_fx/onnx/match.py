"""Which tensor of an ONNX file an adapter's key means, by rules that look at no values.

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
from lora_fx.adapter.updates import Entry, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.strict_json import read_json
from lora_fx.onnx.graph.flow import operand
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.names import CHANGED, FOLDED_FROM, copies_of
from lora_fx.targets.names import Names, also_called
from lora_fx.targets.target import Found, Target, base_name, split_use
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
    whole = dict(_whole(k, e, graph, found) for k, e in adapter.full.items())
    rest = {k: e for k, e in adapter.entries.items() if not isinstance(e, Full)}
    free = spread(rest, found, copies_of(graph.model))
    loose = free | {  # the layout of another graph says nothing of this one
        k: replace(e, layout=None, op="" if e.op == "embedding" and not as_lookup(e) else e.op)
        for k, e in free.items()
        if isinstance(e, LowRank)
    }
    bound = bind(replace(adapter, entries=loose), found)
    for key in bound.lowrank:
        _check_unchanged(key, graph, found)
    changed = {found[k].parameter.name for k in bound.lowrank} | {*whole}
    graph.notes += _left_behind(graph, changed)
    return Matched(dict(bound.lowrank), whole)


def _left_behind(graph: OnnxGraph, changed: Collection[str]) -> list[str]:
    """What has to be said of constants that another exporter computed from a weight that changes.

    Its metadata may tell; else equal rows do, of a weight that onnxscript would fold.
    """
    said, tensor = [], graph.flow.tensor
    for name, value in graph.flow.stores.items():
        meta = value.metadata_props.get(FOLDED_FROM, "")
        alike = (n for n in changed if repr(n) in meta or _begins(tensor(name), tensor(n)))
        if name not in changed and (source := next(alike, "")):
            said.append(
                f"{name!r} may be computed from {source!r} and is not changed: export again"
            )
    return said


def _begins(part: ir.TensorProtocol, whole: ir.TensorProtocol) -> bool:
    """Whether a constant begins with a row or a column of a small matrix, and is not as large."""
    sizes, w = tuple(part.shape.numpy()), tuple(whole.shape.numpy())
    if whole.size > FOLDED or len(w) != 2 or sizes == w or not part.size or sizes[-1:] < (2,):
        return False
    row, both = part.numpy().reshape(-1, sizes[-1])[0], (whole.numpy(), whole.numpy().T)
    same = any(m.shape[1] == len(row) and (m == row).all(1).any() for m in both)
    return bool(same and (row != row[0]).any())


def _check_unchanged(key: str, graph: OnnxGraph, found: Found) -> None:
    """Raise where a weight has a parameter's name and is another matrix.

    An exporter that folds a batch norm into a convolution keeps the name, and calls the bias that
    the convolution did not have `NAME_bias`; files of ours say it in their metadata.
    """
    name = found[key].parameter.name
    value = graph.flow.stores[name]
    beside = (operand(user, 2) for user, _ in value.uses())
    joined = any(bias is not None and bias.name == f"{name}_bias" for bias in beside)
    if joined or CHANGED in value.metadata_props:
        raise LoraFxError(
            f"the update of {key!r} is of the model's own weight, and the file's {name!r} has a "
            "normalisation folded into it",
            "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
        )


def _scoped(adapter: Adapter, found: Found) -> Found:
    """The targets, which then also go by the module path of the nodes that read them."""
    every = (*found.targets, *found.optional)
    parameters = {target.parameter.name: target.parameter for target in every}
    known = {name for parameter in parameters.values() for name in parameter.names}
    paths: dict[str, dict[str, None]] = {name: {} for name in parameters}
    for target in every:
        for site in target.sites:
            if site.scope:
                paths[target.parameter.name] |= dict.fromkeys((site.scope, f"{site.scope}.weight"))
    paths = {name: dict.fromkeys(p for p in ways if p not in known) for name, ways in paths.items()}

    by_path = Names(parameters, also_called(paths))
    for key in adapter.entries:
        hits = by_path.find(key)
        if len(hits) > 1:
            raise _ambiguous(key, sorted(hits), "nodes of one module read them")
    sole = {
        name: tuple(path for path in ways if len(by_path.find(path)) == 1)
        for name, ways in paths.items()
    }

    def with_paths(target: Target) -> Target:
        aliases = (*target.parameter.aliases, *sole[target.parameter.name])
        return replace(target, parameter=replace(target.parameter, aliases=aliases))

    shapes = dict(found.shapes)
    for name, ways in sole.items():
        shapes |= dict.fromkeys(ways, parameters[name].shape)
    return replace(
        found,
        targets=tuple(map(with_paths, found.targets)),
        optional=tuple(map(with_paths, found.optional)),
        shapes=shapes,
    )


def _by_shape(adapter: Adapter, graph: OnnxGraph, found: Found) -> dict[str, str]:
    """For each adapter key the one target of its shape; empty where names lead anywhere."""
    lowrank = adapter.lowrank
    names = {*found.shapes, *graph.flow.stores}
    known = any(base_name(k) in names or found.get(k) is not None for k in adapter.entries)
    if known or len(lowrank) < len(adapter.entries) or adapter.names is not None:
        return {}

    sizes = {t.key: [(t.layout.in_size, t.layout.out_size)] for t in found.targets}
    wanted = {key: [(low.a.shape[-1], low.b.shape[-2])] for key, low in lowrank.items()}
    targets = Names(sizes, also_called(sizes, wanted.__getitem__))
    updates = Names(wanted, also_called(wanted, sizes.__getitem__))
    why = "no name leads from one to the other, and their shapes are equal"
    result: dict[str, str] = {}
    for key in lowrank:
        hits = targets.find(key)
        if not hits:
            return {}
        if len(hits) > 1:
            raise _ambiguous(key, hits, why)
        rivals = updates.find(hits[0])
        if len(rivals) > 1:
            raise _ambiguous(hits[0], rivals, why)
        result[key] = hits[0]
    graph.notes += [f"{k!r} goes to {n!r}, the only one of its shape" for k, n in result.items()]
    return result


def _ambiguous(key: str, some: Sequence[str], why: str) -> LoraFxError:
    return LoraFxError(
        f"{key!r} is no target of the model by name; it may be any of "
        f"{', '.join(map(repr, some[:4]))}: {why}",
        "--names FILE says which: {adapter key: tensor}",
    )


def read_map(path: str | None) -> dict[str, str]:
    """The map of a --names file: one JSON object of adapter keys and tensor names."""
    if path is None:
        return {}
    found = read_json(path, hint="a JSON object")
    if not all(isinstance(v, str) for v in found.values()):
        raise LoraFxError(f"{path}: expected one object of names", '{"adapter key": "tensor"}')
    return found


def _renamed(adapter: Adapter, given: Mapping[str, str]) -> Adapter:
    missing = [k for k in given if k not in adapter.entries]
    if missing:
        raise LoraFxError(
            f"the map names {missing[0]!r}, which the adapter does not have",
            near(missing[0], adapter.entries),
        )
    entries = {given.get(k, k): e for k, e in adapter.entries.items()}
    if len(entries) < len(adapter.entries):
        raise LoraFxError("the map sends two entries to one tensor", "one tensor, one update")
    return replace(adapter, entries=entries)


def _whole(key: str, entry: Full, graph: OnnxGraph, found: Found) -> tuple[str, Array]:
    """The name in the file and the value as it lies there."""
    target = found.get(key)
    name = target.parameter.name if target is not None else key
    stored = graph.flow.stores.get(name)
    if stored is None:
        raise LoraFxError(
            f"adapter tensor {key!r} is not in the model", near(key, graph.flow.stores)
        )
    if len(stored.uses()) > 1:
        raise LoraFxError(
            f"adapter tensor {key!r} is to be replaced, and {len(stored.uses())} nodes read "
            f"{name!r}: the exporter joined equal constants",
            "export a model with the adapter's whole tensors in it, and merge the rest",
        )
    value, shape = entry.value, tuple(graph.flow.tensor(name).shape.numpy())
    turned = target is not None and target.op != "embedding" and target.layout.out == (1,)
    if turned and value.ndim == 2:
        value = value.T  # a file of torch has [out, in]
    if value.shape != shape:
        raise MisfitError(
            f"adapter tensor {key!r} is {list(entry.value.shape)}; the model's is {list(shape)}"
        )
    return name, np.ascontiguousarray(value)


# One tied tensor as several constants: which of them an update of the tensor reaches.
#
# An exporter stores a tied embedding and head apart (the head transposed). The copies say in their
# metadata what they are copies of, so that one update reaches each of them, or those that its use
# names, in the layout that they have.


def spread(given: Mapping[str, Entry], found: Found, copies: Mapping[str, str]) -> dict[str, Entry]:
    """An entry for every copy of a tensor that an update reaches.

    Args:
        given: Entries of an adapter that is bound to a module, or not bound.
        found: The targets of the ONNX graph.
        copies: What `copies_of` gave.

    Raises:
        LoraFxError: The update is of one use, and the file does not tell which copy that is.
    """
    entries: dict[str, Entry] = {}
    for key, entry in given.items():
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
    return entries


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
        keys = t.keys_of([s for s in t.sites if (s.op == "embedding") == lookup])
        meant += [t if k == t.key else t.of_use(split_use(k)[1]) for k in keys]
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
    if variant_of(entry).reads_weight:
        raise LoraFxError(
            f"a {name_of(entry)} update is for both the lookup and the head of a tied tensor, "
            "whose rows are the columns of the other",
            "give the update to one of them",
        )
    turned = variant_of(entry).turned(turned, "")
    return replace(turned, op="embedding" if lookup else "linear")
