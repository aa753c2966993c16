"""The JSON of an update: everything but its tensors, which each kind of file names in its own way.

`{"layout", "use", "variant", "alpha", "rank", "scale", "frozen", "extra"}`, of which a kind of file
holds those that its tensors and its config do not say. `extra` has what is known of few updates:

=========================  ================================================================
op, kernel, mutated        the fields of these names
tied                       true, or the list of `twins`
lead, of                   of `layer`
module, depth, candidates  of `layer`, where the key does not name a parameter
=========================  ================================================================
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from lora_fx.adapter.lowrank import FileLayer, LowRank
from lora_fx.adapter.updates import Dense, Hadamard, Kronecker
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView

Described = TypeVar("Described", bound=LowRank | Hadamard | Kronecker | Dense)
_READ = {"use": str, "variant": str, "alpha": float, "frozen": int}


def to_json(entry: LowRank | Hadamard | Kronecker | Dense, *fields: str) -> Json:
    """These fields of an update, in this order; rank and scale are there for people."""
    return {field: _plain(entry, field) for field in fields}


def from_json(entry: Described, row: JsonView) -> Described:
    """The update with what a row says of it; the rank is that of its tensors.

    Args:
        entry: With its tensors. What the row leaves out stays as it is here.
        row: Of `to_json`; its layout is needed.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: The row was edited.
    """
    said: Json = {"layout": Layout.from_json(row["layout"]) if row["layout"] else None}
    if isinstance(entry, LowRank):
        said |= {field: read(row[field]) for field, read in _READ.items() if field in row}
    elif "scale" in row and not isinstance(entry, Hadamard):
        said["scale"] = float(row["scale"])
    if "extra" in row and not isinstance(entry, Dense):
        said |= _facts(entry, dict(row["extra"]))
    return replace(entry, **said)


def _plain(entry: LowRank | Hadamard | Kronecker | Dense, field: str) -> object:
    if field == "layout":
        return entry.layout.to_json() if entry.layout else None
    if field == "extra":
        return _extra(entry)
    value = getattr(entry, field)
    return float(value) if field in ("alpha", "scale") else value


def _extra(entry: LowRank | Hadamard | Kronecker | Dense) -> Json:
    if isinstance(entry, Dense):
        return {}
    if not isinstance(entry, LowRank):
        kernel = list(entry.kernel)
        return {"op": f"conv{len(kernel)}d", "kernel": kernel} if kernel else {}
    facts: Json = {"op": entry.op, "kernel": list(entry.kernel)}
    facts |= {"tied": list(entry.twins) or entry.tied, "mutated": entry.mutated}
    layer = entry.layer or FileLayer("")
    facts |= {"lead": layer.lead, "of": layer.of}
    found = {name: value for name, value in facts.items() if value}
    if layer.candidates:
        maybe = {name: list(numbers) for name, numbers in layer.candidates.items()}
        found |= {"module": layer.module, "depth": layer.depth, "candidates": maybe}
    return found


def _facts(entry: LowRank | Hadamard | Kronecker, extra: JsonView) -> Json:
    kernel = tuple(int(n) for n in extra.get("kernel", ()))
    if not isinstance(entry, LowRank):
        return {"kernel": kernel}
    tied, layer = extra.get("tied"), None
    if "lead" in extra:
        layer = FileLayer(
            str(extra["lead"]),
            int(extra.get("of", 0)),
            str(extra.get("module", "")),
            int(extra.get("depth", 0)),
            {str(k): (int(r), float(s)) for k, (r, s) in extra.get("candidates", {}).items()},
        )
    return {
        "op": str(extra.get("op", "")),
        "kernel": kernel,
        "tied": bool(tied),
        "twins": tuple(str(name) for name in tied) if isinstance(tied, list) else (),
        "mutated": str(extra.get("mutated", "")),
        "layer": layer,
    }
