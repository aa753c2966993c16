"""The JSON of an update: everything except its tensors, which each file format names itself.

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
    return {field: _field_json(entry, field) for field in fields}


def _field_json(entry: Change, field: str) -> object:
    if field == "layout":
        return entry.layout.to_json() if entry.layout else None
    if field == "extra":
        return _extra(entry)
    value = getattr(entry, field)
    return float(value) if field in ("alpha", "scale") else value


def _extra(entry: Change) -> Json:
    """The field `extra`: see the table above. Facts that are empty are left out."""
    if isinstance(entry, (Dense, Rotation)):
        return {}
    if not isinstance(entry, LowRank):
        kernel = list(entry.kernel)
        if not kernel:
            return {}
        return {"op": f"conv{len(kernel)}d", "kernel": kernel}

    origin = entry.origin
    layer = origin.layer or FileLayer("")
    facts: Json = {
        "op": origin.op,
        "kernel": list(origin.kernel),
        "tied": list(origin.twins) or origin.tied,
        "mutated": entry.mutated,
        "lead": layer.lead,
        "of": layer.of,
        **variant_of(entry).facts(entry),
    }
    extra = {name: value for name, value in facts.items() if value}
    if layer.candidates:
        extra["module"] = layer.module
        extra["depth"] = layer.depth
        extra["candidates"] = {name: list(pair) for name, pair in layer.candidates.items()}
    return extra


def from_json(entry: Described, row: JsonView) -> Described:
    """The update with the fields of its JSON row; the rank comes from its tensors.

    Args:
        entry: The update with its tensors. What the row leaves out stays as it is here.
        row: What `to_json` gave; its layout is needed.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: The row was edited.
        LoraFxError: The row is of a variant that is not known here.
    """
    fields: Json = {"layout": Layout.from_json(row["layout"]) if row["layout"] else None}
    if isinstance(entry, LowRank):
        fields |= {field: read(row[field]) for field, read in _READ.items() if field in row}
    elif "scale" in row and not isinstance(entry, Hadamard):
        fields["scale"] = float(row["scale"])

    extra: Json = dict(row.get("extra", {}))
    if "extra" in row and not isinstance(entry, (Dense, Rotation)):
        fields |= _extra_fields(entry, extra)
    update = replace(entry, **fields)
    if not isinstance(update, LowRank):
        return update
    return cast(Described, _with_facts(update, extra))


def _extra_fields(entry: LowRank | Hadamard | Kronecker, extra: JsonView) -> Json:
    """The fields of an update that `extra` has."""
    kernel = tuple(int(size) for size in extra.get("kernel", ()))
    if not isinstance(entry, LowRank):
        return {"kernel": kernel}
    tied = extra.get("tied")  # True, or the list of twins
    twins = tied if isinstance(tied, list) else []
    origin = Origin(
        op=str(extra.get("op", "")),
        kernel=kernel,
        tied=bool(tied),
        twins=tuple(str(name) for name in twins),
        layer=_layer(extra) if "lead" in extra else None,
    )
    return {"origin": origin, "mutated": str(extra.get("mutated", ""))}


def _layer(extra: JsonView) -> FileLayer:
    candidates = {}
    for name, (rank, alpha) in extra.get("candidates", {}).items():
        candidates[str(name)] = (int(rank), float(alpha))
    return FileLayer(
        lead=str(extra["lead"]),
        of=int(extra.get("of", 0)),
        module=str(extra.get("module", "")),
        depth=int(extra.get("depth", 0)),
        candidates=candidates,
    )


def _with_facts(low: LowRank, facts: JsonView) -> LowRank:
    """The update with the fields that its variant wrote into `extra`; raises if unknown.

    A format that has a and b alone holds LoRA, whatever variant made them of other tensors.
    """
    variant = named_variant(low.variant)
    is_made_of_others = bool(variant.made_of) and not variant.also
    if is_made_of_others and not variant.peft_type and not low.variant_tensors:
        low = replace(low, variant="lora")
    for each_variant in VARIANTS.values():
        low = each_variant.with_facts(low, facts)
    return low
