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
from lora_fx.lowrank import LowRank
from lora_fx.variant import Rows

_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared|embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TIES = re.compile(
    r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|ForPreTraining"
    r"|EncoderDecoderModel)$"
)
_SCALED = frozenset(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"))
"""model_type of models whose logits are scaled where the head is tied, unless the config says."""


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
    named = config.get("architectures") or []
    generates = any(isinstance(a, str) and _TIES.search(a) for a in named)
    if named and not generates:  # a class without a head, whatever its config was copied from
        return None
    tables = [n for n in tensors if _TABLE.search(n) and len(tensors[n].shape) == 2]
    heads = [n for n in tensors if _HEAD.search(n)]
    if len(tables) != 1:
        return None
    if heads:
        return Tie(tables[0], heads[0], True) if said else None
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


def check_unknown(
    placed: Iterable[Placed],
    tie: Tie | None,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
) -> None:
    """Raise where an update means the lookup of a table that may be the head as well.

    That is a table of all tokens of a model that generates and stores no head, or stores the table
    more than once, under names that are not known here.
    """
    inner = config.get("text_config")
    sizes = {c.get("vocab_size") for c in (config, inner if isinstance(inner, dict) else {})}
    named = config.get("architectures") or []
    generates = any(isinstance(a, str) and _TIES.search(a) for a in named)
    untied = config.get("tie_word_embeddings") is False
    if tie is not None or untied or not generates or any(_HEAD.search(n) for n in tensors):
        return
    for p in placed:
        shape = tensors[p.tensor].shape if p.tensor in tensors else ()
        lookup = isinstance(p.entry, Rows) or getattr(p.entry, "extra", {}).get("op") == "embedding"
        if lookup and len(shape) == 2 and shape[0] in sizes:
            raise LoraFxError(
                f"{where}: {p.tensor!r} is a table of all tokens, the file has no output head of "
                "a known name, and config.json does not say that the two are untied; merged, the "
                "update might change the head too",
                "save the base with tie_word_embeddings false first, then merge",
            )


def both(p: Placed, tie: Tie, placed: Iterable[Placed]) -> bool:
    """True for an update of both uses at once; rows of tokens are PEFT's for table and head."""
    if isinstance(p.entry, Rows):
        return not any(isinstance(q.entry, Rows) and q.tensor == tie.head for q in placed)
    return isinstance(p.entry, LowRank) and bool(p.entry.extra.get("tied"))


def twins(placed: Iterable[Placed], tie: Tie | None) -> list[Placed]:
    """Rows of a table's tokens once more, for a tied head that is stored as well."""
    rows = list(placed)
    if tie is None or not tie.stored:
        return []
    return [
        replace(p, tensor=tie.head)
        for p in rows
        if isinstance(p.entry, Rows) and p.tensor == tie.table and both(p, tie, rows)
    ]


def check_scaled(tie: Tie, config: Mapping[str, Any], where: str) -> None:
    """Raise where untying alone would change what the model computes."""
    if config.get("model_type") in _SCALED and "scale_decoder_outputs" not in config:
        raise LoraFxError(
            f"{where}: a {config['model_type']} scales its logits where {tie.table!r} is also the "
            "head, and its config does not say so apart; untied, they would be too large",
            "save the base once with transformers 5, whose config has scale_decoder_outputs",
        )
