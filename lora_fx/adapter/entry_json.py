"""The JSON of an update: everything but its tensors, which each kind of file names in its own way.

`{"layout", "use", "variant", "alpha", "rank", "scale", "frozen", "extra"}`, of which a kind of
file holds those that its tensors and its config do not say. `extra` has what is known of few
updates:

=========================  ================================================================
mutated                    the field of this name
op, kernel                 of `origin`
tied                       true, or the list of `origin.twins`
lead, of                   of `origin.layer`
module, depth, candidates  of `origin.layer`, where the key does not name a parameter
group and the like         what the variant says: see `variant_protocol.Variant.facts`
=========================  ================================================================
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.updates import Change, Dense, Hadamard, Kronecker, Rotation
from lora_fx.adapter.variant import VARIANTS, named_variant, variant_of
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView

Described = TypeVar("Described", bound=Change)


_READ = {"use": str, "variant": str, "alpha": float, "frozen": int}


def to_json(entry: Change, *fields: str) -> Json:
    """These fields of an update, in this order; rank and scale are there for people."""
    return {field: _plain(entry, field) for field in fields}


def from_json(entry: Described, row: JsonView) -> Described:
    """The update with what a row says of it; the rank is that of its tensors.

    Args:
        entry: The update with its tensors. What the row leaves out stays as it is here.
        row: What `to_json` gave; its layout is needed.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: The row was edited.
        LoraFxError: The row is of a variant that is not known here.
    """
    said: Json = {"layout": Layout.from_json(row["layout"]) if row["layout"] else None}
    if isinstance(entry, LowRank):
        said |= {field: read(row[field]) for field, read in _READ.items() if field in row}
    elif "scale" in row and not isinstance(entry, Hadamard):
        said["scale"] = float(row["scale"])
    facts: Json = dict(row.get("extra", {}))
    if "extra" in row and not isinstance(entry, (Dense, Rotation)):
        said |= _facts(entry, facts)
    read = replace(entry, **said)
    return cast(Described, _with_facts(read, facts)) if isinstance(read, LowRank) else read


def _with_facts(low: LowRank, facts: JsonView) -> LowRank:
    """The update with what its variant wrote into `extra`; raises for an unknown variant.

    A format that has a and b alone holds LoRA, whatever variant made them of other tensors.
    """
    named = named_variant(low.variant)
    if not named.peft_type and named.made_of and not named.also and not low.variant_tensors:
        low = replace(low, variant="lora")
    for variant in VARIANTS.values():
        low = variant.with_facts(low, facts)
    return low


def _plain(entry: Change, field: str) -> object:
    if field == "layout":
        return entry.layout.to_json() if entry.layout else None
    if field == "extra":
        return _extra(entry)
    value = getattr(entry, field)
    return float(value) if field in ("alpha", "scale") else value


def _extra(entry: Change) -> Json:
    if isinstance(entry, (Dense, Rotation)):
        return {}
    if not isinstance(entry, LowRank):
        kernel = list(entry.kernel)
        return {"op": f"conv{len(kernel)}d", "kernel": kernel} if kernel else {}
    origin = entry.origin
    facts: Json = {"op": origin.op, "kernel": list(origin.kernel)}
    facts |= {"tied": list(origin.twins) or origin.tied, "mutated": entry.mutated}
    layer = origin.layer or FileLayer("")
    facts |= {"lead": layer.lead, "of": layer.of, **variant_of(entry).facts(entry)}
    found = {name: value for name, value in facts.items() if value}
    if layer.candidates:
        maybe = {name: list(numbers) for name, numbers in layer.candidates.items()}
        found |= {"module": layer.module, "depth": layer.depth, "candidates": maybe}
    return found


def _facts(entry: LowRank | Hadamard | Kronecker, extra: JsonView) -> Json:
    kernel = tuple(int(n) for n in extra.get("kernel", ()))
    if not isinstance(entry, LowRank):
        return {"kernel": kernel}
    tied = extra.get("tied")
    layer = None
    if "lead" in extra:
        lead, module = str(extra["lead"]), str(extra.get("module", ""))
        of, depth = int(extra.get("of", 0)), int(extra.get("depth", 0))
        pairs = extra.get("candidates", {}).items()
        candidates = {str(k): (int(r), float(s)) for k, (r, s) in pairs}
        layer = FileLayer(lead, of, module, depth, candidates)
    twins = tuple(str(name) for name in tied) if isinstance(tied, list) else ()
    origin = Origin(str(extra.get("op", "")), kernel, bool(tied), twins, layer)
    return {"origin": origin, "mutated": str(extra.get("mutated", ""))}
