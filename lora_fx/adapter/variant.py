"""The registry of variants, and the variant of an update.

=======  ==========================================  ==================  ========================
name     W'                                          trained             in PEFT's files
=======  ==========================================  ==================  ========================
lora     W + s·b·a, s = alpha/rank                   a, b                lora_A, lora_B
rslora   W + s·b·a, s = alpha/√rank                  a, b                … and use_rslora
dora     m/‖V‖ · V, V = W + s·b·a, s as of lora      a, b, magnitude m   … use_dora, magnitude
lora-fa  as lora                                     b                   as lora
lora+    as lora                                     b at 16 × the rate  as lora
qalora   as lora, ΔW constant over 32 inputs;        a of groups, b      … and use_qalora
         qalora:G over G
loha     W + s·(b₁a₁ ∘ b₂a₂), s = alpha/rank         a₁, b₁, a₂, b₂      hada_…, type LOHA
vera     W + diag(λ_b)·B·diag(λ_d)·A                 λ_d, λ_b            vera_…, type VERA
=======  ==========================================  ==================  ========================

The protocol is `lora_fx.adapter.variant_protocol`. A variant composes Kinds and knows no IR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from lora_fx.adapter.dora import Dora
from lora_fx.adapter.loha import Loha
from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import (
    LowRank,
    alpha_of,
)
from lora_fx.adapter.qalora import QaLora
from lora_fx.adapter.runtime_scale import RUNTIME_SCALE
from lora_fx.adapter.scaled_rows import SCALED_ROWS
from lora_fx.adapter.variant_protocol import Variant
from lora_fx.adapter.vera import Vera
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError, expect, expect_name
from lora_fx.text import JsonView, near

VariantName = Literal["lora", "rslora", "dora", "lora-fa", "lora+", "qalora", "loha", "vera"] | str
"""A name from VARIANTS; any text, because qalora can have a group size: qalora:32."""
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Lora("lora"),
        Lora("rslora"),  # its scale falls with √rank, so that high ranks learn as fast as low ones
        Dora("dora"),
        # a stays as it was drawn: neither its gradient nor x has to be kept
        Lora("lora-fa", still=("a",)),
        Lora("lora+", ratio=16.0),
        QaLora("qalora"),
        Loha("loha"),
        Vera("vera", still=("projection_a", "projection_b")),
    )
}
_ROW = frozenset((
    "A", "A0", "B", "B0", "a0", "alpha", "b0", "dense", "extra", "full", "index", "key", "layout",
    "magnitude", "rank", "role", "rows", "scale", "swapped", "use", "variant",
))  # fmt: skip
"""Names already used in files, as tensor names or JSON keys, so no field can have them."""


def register(variant: Variant) -> None:
    """Register a variant, so that every command and file format knows its name.

    Raises:
        MistakeError: Another variant has this name, or a field has a name that files use for
            something else.
    """
    if variant.name in VARIANTS or not variant.name or ":" in variant.name:
        raise MistakeError(
            f"a variant cannot have the name {variant.name!r}: it is taken or not allowed"
        )
    fields = (*variant.made_of, *variant.also)
    for field in fields:
        if field in _ROW or fields.count(field) > 1 or not field.isidentifier():
            raise MistakeError(f"{variant.name}: a tensor cannot have the field {field!r}")
    VARIANTS[variant.name] = variant


def named_variant(name: str) -> Variant:
    """Return the variant for NAME or NAME:ARGUMENT; raise LoraFxError if there is none."""
    expect(name, str, "variant", "a name", _known())
    kind, colon, argument = name.partition(":")
    if colon and kind in VARIANTS:
        variant = VARIANTS[kind].with_argument(argument)
        if variant is not None:
            return variant
    expect_name(name, VARIANTS, "unknown variant", _known())
    return VARIANTS[name]


def expect_variant(name: str, where: str) -> None:
    """Raise if a file has an update of an unknown variant.

    Args:
        name: The variant's name in the file.
        where: The file and the part of it, for the message.
    """
    if name.partition(":")[0] not in VARIANTS:
        raise LoraFxError(
            f"{where} has variant {name!r}, which is not known here; its tensors are not read",
            near(name, VARIANTS, _known()),
        )


def _known() -> str:
    """Return a hint with the names of the variants."""
    return f"use one of {', '.join(VARIANTS)}"


def variant_of(low: LowRank) -> Variant:
    """Return the variant of an update by its tensors; its variant name may give only the scale."""
    named = named_variant(low.variant)
    for variant in (SCALED_ROWS, RUNTIME_SCALE, named, *VARIANTS.values()):
        recognised = variant.of(low)
        if recognised is not None:
            return recognised
    # Its a and b were rewritten, and not the tensors that made them.
    return VARIANTS["lora"] if named.made_of else named


def names_taken(*, reading_weight: bool) -> list[str]:
    """Return the names of variants for messages, with or without the variants that read W."""
    names = []
    for variant in VARIANTS.values():
        differs_in_form = not variant.learns_as_lora and not variant.constant_over
        if differs_in_form and (reading_weight or not variant.reads_weight):
            names.append(variant.name)
    return names


def is_lora_or_dora(low: LowRank) -> bool:
    """Whether other trainers' file formats can store the update: a sum, or PEFT's type LORA."""
    variant = variant_of(low)
    return not variant.reads_weight or bool(variant.peft_type)


def asked(low: LowRank) -> tuple[int, float]:
    """Return the rank and alpha that the update was inserted with: those of the trained ranks."""
    if not low.frozen:
        return variant_of(low).asked(low)
    rank = low.rank - low.frozen
    return rank, alpha_of(low.scale, rank, low.variant)


def fields_of_files() -> tuple[str, ...]:
    """Return the field names that files use for the tensors of updates, over all variants."""
    fields = dict.fromkeys(("a", "b", "a0", "b0"))
    for variant in VARIANTS.values():
        fields |= dict.fromkeys((*variant.made_of, *variant.also))
    return tuple(fields)


def bare(values: Mapping[str, Array], row: JsonView) -> LowRank:
    """Return the update with these tensors from a file, before its JSON is read.

    Args:
        values: Its tensors by field.
        row: Its JSON, for the variant's name.
    """
    variant = named_variant(str(row.get("variant", "lora")))
    empty = np.zeros((1, 1), np.float32)
    low = LowRank(empty, empty, 0.0, variant=variant.name, magnitude=values.get("magnitude"))
    if variant.peft_type:
        return replace(low, a=values["a"], b=values["b"])
    return variant.with_values(low, values)
