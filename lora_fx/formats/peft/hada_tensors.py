"""Adapters of the variant loha as PEFT's type LOHA.

==================================  ===============  ======
tensor, under base_model.model.X.   shape            is
==================================  ===============  ======
hada_w1_a, hada_w2_a                [out, r]         b₁, b₂
hada_w1_b, hada_w2_b                [r, in]          a₁, a₂
==================================  ===============  ======

`in` of a convolution is C_in·∏kernel. Facts: peft 0.21.2, tuners/loha/layer.py. Reading is in
`lora_fx.formats.peft.loha_lokr_oft`.
"""

from __future__ import annotations

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import asked, variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import stamp
from lora_fx.formats.peft.build_config import build_config
from lora_fx.formats.peft.form import form_of
from lora_fx.formats.peft.names import PREFIX
from lora_fx.text import Json, JsonView

_FIELDS = {
    "peft_type": "LOHA",
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "use_effective_conv2d": False,
    "init_weights": True,
}
_OF_LORA = ("lora_alpha", "lora_dropout", "bias", "init_lora_weights")
"""Fields of LoraConfig that LoHaConfig does not have."""


def refusal(key: str, entry: object) -> str:
    """Return why PEFT's type LOHA cannot hold an entry; empty if it can."""
    if not isinstance(entry, LowRank) or variant_of(entry).name != "loha":
        return "PEFT's type LOHA is read here with updates of variant loha alone"
    form = form_of(key, entry)
    if form.kind == "own":
        return form.why
    if form.kind not in ("linear", "conv") or form.transposed:
        return "PEFT's LoHa has no such layer"
    return ""


def encode(adapter: Adapter, metadata: JsonView) -> tuple[dict[str, Array], Json, Json]:
    """Return the tensors, the config, and lora-fx's JSON of an adapter that LOHA can hold.

    Args:
        adapter: `refusal` is empty for its entries.
        metadata: What is kept of its metadata.
    """
    tensors: dict[str, Array] = {}
    numbers = {}
    for key, update in adapter.lowrank.items():
        module = form_of(key, update).module
        numbers[module] = asked(update)
        factors = update.variant_tensors
        for end, field in (
            ("w1_a", "hada_b1"),
            ("w1_b", "hada_a1"),
            ("w2_a", "hada_b2"),
            ("w2_b", "hada_a2"),
        ):
            tensors[f"{PREFIX}{module}.hada_{end}"] = np.ascontiguousarray(factors[field])
    config = build_config(numbers, numbers, (), metadata, _FIELDS)
    config["alpha"] = config["lora_alpha"]
    for field in _OF_LORA:
        del config[field]
    return tensors, config, {**stamp(), "metadata": dict(metadata)}
