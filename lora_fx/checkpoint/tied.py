"""A checkpoint whose output head is its embedding: one tensor, two uses.

An adapter on one of the two must not reach the other. The file holds the tensor once, or twice
with config.json tying them again when it is loaded, so the two are untied or the merge is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_fx.checkpoint.match import Placed, use_of
from lora_fx.checkpoint.strict import TensorInfo
from lora_fx.errors import LoraFxError

_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared|embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TIES = re.compile(
    r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|ForPreTraining)$"
)


_NAMES = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "transformer.word_embeddings.weight": "lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
}
"""Table → what transformers calls the head when it is not tied."""
_OPT = ("OPTForCausalLM", "model.decoder.embed_tokens.weight")


@dataclass(frozen=True)
class Tie:
    """The table's name; the head's, as stored or as it would be called; whether it is stored.

    The head's name is empty where it is not known.
    """

    table: str
    head: str
    stored: bool


def tie_of(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], keys: Iterable[str] = ()
) -> Tie | None:
    """The tie of a checkpoint by its names and config; None where there is none.

    `keys` are an adapter's: one of them may say what the head would be called.

    Without a word in the config a model that generates and has no head of its own is tied: that
    is the default of its class.
    """
    text = config.get("text_config")
    said = config.get("tie_word_embeddings")
    if said is None and isinstance(text, dict):
        said = text.get("tie_word_embeddings")
    if said is False:
        return None
    tables = [n for n in tensors if _TABLE.search(n) and len(tensors[n].shape) == 2]
    heads = [n for n in tensors if _HEAD.search(n)]
    if len(tables) != 1:
        return None
    if heads:
        return Tie(tables[0], heads[0], True) if said else None
    named = config.get("architectures") or []
    generates = any(isinstance(a, str) and _TIES.search(a) for a in named)
    head = next((k for k in keys if _HEAD.search(k)), "")
    generator = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in named)
    if not head and (generator or tables[0] == "model.language_model.embed_tokens.weight"):
        head = "lm_head.weight" if (*named, tables[0]) == _OPT else _NAMES.get(tables[0], "")
    return Tie(tables[0], head, False) if said or generates else None


def at_its_use(p: Placed, tie: Tie | None, where: str) -> Placed:
    """An update of one use of a tensor, at the tensor that this use will read.

    Raises:
        LoraFxError: The base stores one tensor for this use and others.
    """
    use = use_of(p.key, p.entry)
    if not use or use == p.tensor:
        return p
    if tie is not None and p.tensor == tie.table:
        if use == "op:embedding":
            return p
        if use.startswith("op:") and tie.head:
            return replace(p, tensor=tie.head)
    raise LoraFxError(
        f"{where}: the update of {p.key!r} means one use of {p.tensor!r} ({use}), which the base "
        "stores once for several; merged, it would change all of them",
        "train one update for all uses, or export the model itself: fold keeps uses apart",
    )
