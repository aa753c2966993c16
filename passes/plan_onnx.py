"""The plan of a merge into an .onnx file: what goes where, read without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapter.adapter import HOWS, mix
from lora_fx.checkpoint.merge import given
from lora_fx.checkpoint.merge_plan import Given
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import restore_weight_names
from lora_fx.onnx.save import weight_bytes
from lora_fx.passes.find import find
from lora_fx.targets.found import Found
from lora_fx.text import table

METADATA = "lora_fx.merge"


@dataclass(frozen=True)
class Plan:
    """A file and the adapters that go into it, in its keys.

    Attributes:
        graph: The file; nothing is folded yet.
        found: Its targets.
        parts: The adapters as given.
        matched: Their sum.
        renamed: Tensors that got the names that the exporter's metadata tells.
    """

    graph: OnnxGraph
    found: Found
    parts: tuple[Given, ...]
    matched: Matched
    renamed: int

    def rows(self) -> list[dict[str, Any]]:
        """One a key: the tensor, its shape, rank and scale, and the bytes that are written."""
        rows = []
        for key, update in self.matched.updates.items():
            p = self.found[key].parameter
            size = self.graph.flow.stores[p.name].tensor.nbytes
            rows.append(
                {"key": key, "tensor": p.name, "shape": list(p.shape), "rank": update.rank,
                 "scale": update.scale, "bytes": size}
            )  # fmt: skip
        for name, value in self.matched.whole.items():
            size = self.graph.flow.stores[name].tensor.nbytes
            rows.append(
                {"key": name, "tensor": name, "shape": list(value.shape), "rank": None,
                 "scale": None, "bytes": size}
            )  # fmt: skip
        return rows

    def to_json(self) -> dict[str, Any]:
        """Fields of `merge --dry-run --json`."""
        return {
            "tensors": self.rows(),
            "bytes": weight_bytes(self.graph.model),
            "warnings": list(self.graph.notes),
        }

    def __str__(self) -> str:
        """A table, and what is written in all."""
        rows: list[tuple[str, ...]] = [("tensor", "shape", "rank", "scale", "bytes")]
        for r in self.rows():
            shape = "×".join(map(str, r["shape"]))
            scale = "whole" if r["scale"] is None else f"{r['scale']:g}"
            rows.append((r["key"], shape, str(r["rank"] or ""), scale, str(r["bytes"])))
        touched = sum(r["bytes"] for r in self.rows())
        total = weight_bytes(self.graph.model)
        return "\n".join([*table(rows), f"{total} bytes of weights, {touched} of them change"])


def plan_onnx(
    base: str | PathLike[str],
    adapters: Any,
    *,
    names: Mapping[str, str] | None = None,
    again: bool = False,
    trust: bool = False,
    how: str = "sum",
    rank: int | None = None,
) -> Plan:
    """See lora_fx.passes.merge_onnx.

    Raises:
        LoraFxError: Every reason not to merge that the files give.
    """
    source = Path(base)
    if how != "sum" and how not in HOWS:
        raise LoraFxError(f"no mix {how!r}", f"sum, {', '.join(HOWS)}")
    parts = given(adapters, trust)
    model = load(source)
    _refuse_again(source, model.metadata_props.get(METADATA), parts, again)
    renamed = restore_weight_names(model)
    graph = OnnxGraph(model)
    found = find(graph)
    matched = _sum(parts, graph, found, names, "cat" if how == "sum" else how, rank)
    return Plan(graph, found, tuple(parts), matched, renamed)


def _sum(
    parts: Sequence[Given],
    graph: OnnxGraph,
    found: Found,
    names: Mapping[str, str] | None,
    how: str,
    rank: int | None,
) -> Matched:
    """All adapters as one, in the graph's keys."""
    each = [match(p.adapter, graph, found, names) for p in parts]
    if len(parts) == 1 and how == "cat":
        (one,) = each
        as_one = replace(parts[0].adapter, entries=dict(one.updates)).weighted(parts[0].weight)
        updates = as_one.lowrank
        if one.whole and parts[0].weight != 1.0:
            raise LoraFxError(
                f"{parts[0].where}: weight {parts[0].weight:g}, and it holds whole tensors",
                "only updates in proportion to their scale can be weighted",
            )
        return Matched(updates, one.whole)
    if any(m.whole for m in each):
        raise LoraFxError("several adapters, and one holds whole tensors", "merge that one alone")
    bound = [
        (replace(p.adapter, entries=dict(m.updates)), p.weight)
        for p, m in zip(parts, each, strict=True)
    ]
    return Matched(dict(mix(bound, how, rank).lowrank), {})


def _refuse_again(source: Path, text: str | None, parts: Sequence[Given], again: bool) -> None:
    folded = {a["hash"] for m in history(text) for a in m["adapters"]}
    for part in parts:
        if part.hash in folded and not again:
            raise LoraFxError(
                f"{source}: {part.where} is merged into it already",
                "start from the original base; --again merges it once more",
            )


def history(text: str | None) -> list[dict[str, Any]]:
    """The merges that a file's metadata tells of; empty where it tells none."""
    try:
        found = json.loads(text or "[]")
        return [m for m in found if all("hash" in a for a in m["adapters"])]
    except (ValueError, TypeError, KeyError):
        return []
