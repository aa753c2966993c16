"""The names of embedding tables and output heads, tied and untied: one table for all commands.

Names are those of transformers' files. A tied head is not stored; untied, the same classes look for
it under `head`, and for whatever else the config's one flag has tied: `lookups` are other names of
the table, `biases` of the head's bias.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_fx.files.safetensors import TensorInfo, Tensors

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
    """Whether this is the name of a token embedding table."""
    return bool(_TABLE.search(name))


def is_head(name: str) -> bool:
    """Whether this is the name of an output head's weight."""
    return bool(_HEAD.search(name))


def generates(classes: Iterable[object]) -> bool:
    """Whether one of a config's `architectures` has an output head over tokens."""
    return any(isinstance(name, str) and _GENERATES.search(name) for name in classes)


@dataclass(frozen=True)
class Tie:
    """An embedding table that is also the output head, and other names tied by the config's flag.

    Attributes:
        table: The table's name; it is stored where the two are tied.
        head: The head's, as stored or as it would be called; empty where it is not known.
        lookups: Other names of the table, in whose modules it is looked up; some may be stored,
            and equal it.
        biases: Another name of the head's bias → the one that is always stored.
        apart: Whether untied models have a tensor of its own for each of `lookups`.
    """

    table: str
    head: str
    lookups: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    apart: bool = True

    def sources(self) -> dict[str, str]:
        """Return every other name → the stored tensor that it stands for."""
        names = [self.head] if self.head else []
        names += self.lookups
        return {**dict.fromkeys(names, self.table), **self.biases}

    def known(self, tensors: Tensors) -> dict[str, TensorInfo]:
        """Return the tensors under every name that an adapter may use."""
        known: dict[str, TensorInfo] = {}
        for name, source in self.sources().items():
            if source in tensors:
                known[name] = tensors[source]
        return known | dict(tensors)

    def new(self, tensors: Collection[str]) -> dict[str, str]:
        """Return the tensors that only an untied file has: name → the tensor to copy."""
        copies: dict[str, str] = {}
        for name, source in self.sources().items():
            if name in tensors or source not in tensors:
                continue
            if self.apart or name not in self.lookups:
                copies[name] = source
        return copies


def _two_lookups(lead: str) -> tuple[str, str]:
    """Return the names of the tables of an encoder and a decoder."""
    return f"{lead}encoder.embed_tokens.weight", f"{lead}decoder.embed_tokens.weight"


def _masked(model: str, head: str) -> Tie:
    """Return the tie of a masked language model: word embeddings and head."""
    return Tie(f"{model}.embeddings.word_embeddings.weight", f"{head}.weight")


def _biased(model: str, head: str) -> Tie:
    """Return the tie of a model with head `HEAD.decoder` and its bias also as `HEAD.bias`."""
    tied = _masked(model, f"{head}.decoder")
    return replace(tied, biases={f"{head}.decoder.bias": f"{head}.bias"})


_LM = r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$"
_DECODER = r"^(OPT|Bart|MBart|Marian|Pegasus|Blenderbot|BlenderbotSmall|PLBart)ForCausalLM$"
_SEQ = r"(ForConditionalGeneration|MTModel)$"
FAMILIES = (
    (_LM, Tie("model.embed_tokens.weight", "lm_head.weight")),
    (r"", Tie("model.language_model.embed_tokens.weight", "lm_head.weight")),
    (_LM, Tie("transformer.wte.weight", "lm_head.weight")),
    (_LM, Tie("transformer.word_embeddings.weight", "lm_head.weight")),
    (_LM, Tie("gpt_neox.embed_in.weight", "embed_out.weight")),
    (_LM, Tie("backbone.embeddings.weight", "lm_head.weight")),
    (_DECODER, Tie("model.decoder.embed_tokens.weight", "lm_head.weight")),
    (r"^Whisper", Tie("model.decoder.embed_tokens.weight", "proj_out.weight")),
    (_SEQ, Tie("model.shared.weight", "lm_head.weight", _two_lookups("model."))),
    (_SEQ, Tie("shared.weight", "lm_head.weight", _two_lookups(""), apart=False)),
    (r"^Bert(ForMaskedLM|ForPreTraining|LMHeadModel)$", _biased("bert", "cls.predictions")),
    (r"(ForMaskedLM|ForCausalLM)$", _biased("roberta", "lm_head")),
    (r"^Albert(ForMaskedLM|ForPreTraining)$", _biased("albert", "predictions")),
    (r"^DistilBertForMaskedLM$", _masked("distilbert", "vocab_projector")),
    (r"^Electra(ForMaskedLM|ForCausalLM)$", _masked("electra", "generator_lm_head")),
)
"""Patterns of the class names in config.json's `architectures`, each with the names of the tie."""


def tie_in(classes: Iterable[object], names: Iterable[str]) -> Tie | None:
    """Return the tie of the family that a checkpoint's classes and tensor names fit; else None."""
    class_names = [str(name) for name in classes] or [""]
    tensor_names = set(names)
    for pattern, tie in FAMILIES:
        if tie.table not in tensor_names:
            continue
        if any(re.search(pattern, name) for name in class_names):
            return tie
    return None
