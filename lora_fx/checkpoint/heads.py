"""What an embedding table and an output head are called, tied and apart: one table for all verbs.

Names are those of transformers' files. A tied head is not stored; untied, the same classes look for
it under `head`, and for whatever else the config's one flag has tied: `lookups` are other names of
the table, `biases` of the head's bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared|embeddings)\.weight$")
_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output_projection|cls\.predictions\.decoder"
    r"|generator_lm_head|vocab_projector)\.weight$|^(predictions\.decoder|proj_out)\.weight$"
)
_GENERATES = re.compile(
    r"(ForCausalLM|LMHeadModel|DoubleHeadsModel|ForMaskedLM|ForConditionalGeneration"
    r"|ForPreTraining|MTModel|EncoderDecoderModel)$"
)


def is_table(name: str) -> bool:
    """True for the name of a lookup table of tokens."""
    return bool(_TABLE.search(name))


def is_head(name: str) -> bool:
    """True for the name of an output head's weight."""
    return bool(_HEAD.search(name))


def generates(classes: Iterable[object]) -> bool:
    """True where one of a config's `architectures` has an output head over tokens."""
    return any(isinstance(c, str) and _GENERATES.search(c) for c in classes)


@dataclass(frozen=True)
class Family:
    """Models that agree in these names.

    Attributes:
        classes: Pattern of their classes, as config.json's `architectures` has them.
        table: The table, which is stored where the two are tied.
        head: The head's weight.
        lookups: Other names of the table, in whose modules it is looked up.
        biases: Another name of the head's bias → the one that is always stored.
        apart: Whether untied models have a tensor of its own for each of `lookups`.
    """

    classes: str
    table: str
    head: str
    lookups: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    apart: bool = True


def _two(lead: str) -> tuple[str, str]:
    return f"{lead}encoder.embed_tokens.weight", f"{lead}decoder.embed_tokens.weight"


def _masked(classes: str, model: str, head: str) -> Family:
    """An encoder whose head is `HEAD.decoder`, its bias also stored as `HEAD.bias`."""
    biases = {f"{head}.decoder.bias": f"{head}.bias"}
    return Family(
        classes, f"{model}.embeddings.word_embeddings.weight", f"{head}.decoder.weight", (), biases
    )


_LM = r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$"
_SEQ = r"(ForConditionalGeneration|MTModel)$"
FAMILIES = (
    Family(_LM, "model.embed_tokens.weight", "lm_head.weight"),
    Family(r"", "model.language_model.embed_tokens.weight", "lm_head.weight"),
    Family(_LM, "transformer.wte.weight", "lm_head.weight"),
    Family(_LM, "transformer.word_embeddings.weight", "lm_head.weight"),
    Family(_LM, "gpt_neox.embed_in.weight", "embed_out.weight"),
    Family(_LM, "backbone.embeddings.weight", "lm_head.weight"),
    Family(
        r"^(OPT|Bart|MBart|Marian|Pegasus|Blenderbot|BlenderbotSmall|PLBart)ForCausalLM$",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
    Family(r"^Whisper", "model.decoder.embed_tokens.weight", "proj_out.weight"),
    Family(_SEQ, "model.shared.weight", "lm_head.weight", _two("model.")),
    Family(_SEQ, "shared.weight", "lm_head.weight", _two(""), apart=False),
    _masked(r"^Bert(ForMaskedLM|ForPreTraining|LMHeadModel)$", "bert", "cls.predictions"),
    _masked(r"(ForMaskedLM|ForCausalLM)$", "roberta", "lm_head"),
    _masked(r"^Albert(ForMaskedLM|ForPreTraining)$", "albert", "predictions"),
    Family(
        r"^DistilBertForMaskedLM$",
        "distilbert.embeddings.word_embeddings.weight",
        "vocab_projector.weight",
    ),
    Family(
        r"^Electra(ForMaskedLM|ForCausalLM)$",
        "electra.embeddings.word_embeddings.weight",
        "generator_lm_head.weight",
    ),
)


def family_of(classes: Iterable[object], names: Iterable[str]) -> Family | None:
    """The family of a checkpoint, by its classes and the names of its tensors; None if unknown."""
    said, names = [str(c) for c in classes] or [""], set(names)
    for family in FAMILIES:
        if family.table in names and any(re.search(family.classes, c) for c in said):
            return family
    return None
