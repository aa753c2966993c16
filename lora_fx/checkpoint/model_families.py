"""What an embedding table and an output head are called, tied and apart: one table for all verbs.

Names are those of transformers' files. A tied head is not stored; untied, the same classes look for
it under `head`, and for whatever else the config's one flag has tied: `lookups` are other names of
the table, `biases` of the head's bias.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_fx.adapter.expert_families import IN_OUT_EXPERTS
from lora_fx.adapter.fused import QKV
from lora_fx.dtypes import FLOATING
from lora_fx.files.checkpoint import model_config, says_tied, tensors, text_config
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.ir.graph import Parameter
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.targets.found import Found, Refusal
from lora_fx.targets.plan import HEAD_ROWS, default_plan
from lora_fx.targets.target import Target
from lora_fx.targets.target_roles import role_of
from lora_fx.text import JsonView, is_whole

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
class Tie:
    """A table that is the head too, and what one flag of the config ties besides.

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
        """Every other name → the stored tensor that it is."""
        heads = (self.head,) if self.head else ()
        return {**dict.fromkeys((*heads, *self.lookups), self.table), **self.biases}

    def known(self, tensors: Tensors) -> dict[str, TensorInfo]:
        """The tensors under every name that an adapter may use."""
        more = {n: tensors[s] for n, s in self.sources().items() if s in tensors}
        return more | dict(tensors)

    def new(self, tensors: Collection[str]) -> dict[str, str]:
        """What an untied file has and this one lacks: name → the tensor it is a copy of."""
        names = {n: s for n, s in self.sources().items() if n not in tensors and s in tensors}
        return {n: s for n, s in names.items() if self.apart or n not in self.lookups}


def _two(lead: str) -> tuple[str, str]:
    return f"{lead}encoder.embed_tokens.weight", f"{lead}decoder.embed_tokens.weight"


def _masked(model: str, head: str) -> Tie:
    """The tie of an encoder."""
    return Tie(f"{model}.embeddings.word_embeddings.weight", f"{head}.weight")


def _biased(model: str, head: str) -> Tie:
    """The tie of an encoder whose head is `HEAD.decoder`, its bias also stored as `HEAD.bias`."""
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
    (_SEQ, Tie("model.shared.weight", "lm_head.weight", _two("model."))),
    (_SEQ, Tie("shared.weight", "lm_head.weight", _two(""), apart=False)),
    (r"^Bert(ForMaskedLM|ForPreTraining|LMHeadModel)$", _biased("bert", "cls.predictions")),
    (r"(ForMaskedLM|ForCausalLM)$", _biased("roberta", "lm_head")),
    (r"^Albert(ForMaskedLM|ForPreTraining)$", _biased("albert", "predictions")),
    (r"^DistilBertForMaskedLM$", _masked("distilbert", "vocab_projector")),
    (r"^Electra(ForMaskedLM|ForCausalLM)$", _masked("electra", "generator_lm_head")),
)
"""Pattern of classes, as config.json's `architectures` has them, and the names of their tie."""


def tie_in(classes: Iterable[object], names: Iterable[str]) -> Tie | None:
    """The names of a checkpoint's family, by its classes and those of its tensors, if known."""
    said, names = [str(c) for c in classes] or [""], set(names)
    for pattern, tie in FAMILIES:
        if tie.table in names and any(re.search(pattern, c) for c in said):
            return tie
    return None


# What the tensors of a checkpoint are for, by names, shapes and config.json: no graph is read.
#
# ==========  ========================================  =======================================
# linear      [out, in]                                 the rule for two dimensions
# conv1d      [in, out]                                 Conv1D of the GPT-2 family
# embedding   [rows, width], a lookup                   out is the width
# conv        [out, in, *kernel]                        three dimensions and more
# stack       [experts, out, in], or [experts, in, out] of some models
# whole       biases, norms and other vectors           no low-rank update
# ==========  ========================================  =======================================


CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
"""model_type of models whose linear layers store [in, out]."""

CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
"""What such layers are called."""
_STACK = re.compile(r"(^|\.)\w*(experts|moe)(\.|$)")
_POSITION = re.compile(r"(^|\.)(wpe|\w*position\w*)\.")
_LANGUAGE = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration")


@dataclass(frozen=True)
class TensorUse:
    """How one tensor is read as matrices.

    Attributes:
        layout: None for a tensor that has no low-rank update.
        op: As an update names it.
        tied: The tensor is an embedding table and the output head.
    """

    layout: Layout | None
    op: str = ""
    tied: bool = False

    @property
    def lead(self) -> int:
        """How many leading axes count matrices."""
        return len(self.layout.batch) if self.layout else 0

    @property
    def swapped(self) -> bool:
        """True where the rows of the stored matrix are in."""
        return self.layout is not None and self.layout.out == (self.lead + 1,)


def config_of(path: str | Path) -> JsonView:
    """The config.json of a folder, or beside a file; empty where there is none."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    return model_config(file) if file.is_file() else {}


def uses(
    tensors: Tensors, found: Found, config: JsonView, fan_in_fan_out: bool | None, table: str | None
) -> dict[str, TensorUse]:
    """How every tensor is read.

    Args:
        tensors: The checkpoint's tensors.
        found: Its targets, whose roles are taken.
        config: Its config.json, or empty.
        fan_in_fan_out: True: two-dimensional weights are [in, out], except embeddings and heads;
            False: none is; None: config.json says.
        table: The one that is the output head too; empty: there is none; None: roles say.
    """
    roles = {t.key: t.role for t in found.targets}
    kinds = {config.get("model_type"), text_config(config).get("model_type")}
    one_table = _tied(roles, config) if table is None else bool(table)
    result = {}
    for name, info in tensors.items():
        shape, role = info.shape, roles.get(name)
        if role is None or name.endswith("bias"):
            use = TensorUse(None)
        elif len(shape) == 3 and _STACK.search(name):
            out, in_ = ((2,), (1,)) if kinds & IN_OUT_EXPERTS else ((1,), (2,))
            use = TensorUse(Layout(shape, (0,), out, in_, shape), "bmm")
        elif role == "embedding" and len(shape) == 2:
            tied = one_table and not _POSITION.search(name) and table in (None, name)
            layout = plain_layout(shape) if tied else Layout(shape, (), (1,), (0,), shape)
            use = TensorUse(layout, "linear" if tied else "embedding", tied)
        elif len(shape) == 2:
            turned = fan_in_fan_out and role != "head"
            if fan_in_fan_out is None:
                turned = bool(kinds & CONV1D_MODELS and CONV1D_NAMES.search(name))
            layout = Layout(shape, (), (1,), (0,), shape) if turned else plain_layout(shape)
            use = TensorUse(layout, "addmm" if turned else "linear")
        else:
            use = TensorUse(plain_layout(shape), f"conv{len(shape) - 2}d")
        flat = use.layout is not None and use.layout.max_rank == 1
        result[name] = TensorUse(None) if flat else use
    return result


def _tied(roles: Mapping[str, str], config: JsonView) -> bool:
    """True when the file has no head of its own and the config says that there is one."""
    if "head" in roles.values():
        return False
    names = config.get("architectures") or ()
    return says_tied(config) is not False and any(_LANGUAGE.search(str(n)) for n in names)


# Which rows of a fused weight are whose, where the names of its parts do not say.
#
# ================================  ==================================================
# all others                        q, then k, then v; gate, then up
# query_key_value of these models   a group of heads after the other: its q, its k, its v
# CodeGen's qkv_proj                the same in four parts, q, v, k
# ================================  ==================================================
#
# Facts of transformers 5.24; the tests compare them with its models.

_GROUPED = {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode"}


def part_rows(name: str, out: int, in_: int, config: JsonView) -> dict[str, str]:
    """Role → its rows, `LOW:HIGH`, or `LOW:HIGH:PERIOD` for such rows of every so many.

    Args:
        name: Of a fused weight [out, in], of q, k and v or of gate and up.
        out: Its rows.
        in_: Its columns.
        config: config.json.

    Returns:
        Nothing where the order of the rows, or how many they are, is not known.
    """
    config = {**config, **text_config(config)}
    kinds = {config.get("model_type"), text_config(config).get("model_type")}
    if "minimax" in kinds or ("phi4_multimodal" in kinds and "audio" in name):
        return {}  # MiniMax has two kinds of attention, and Phi-4's audio has up first
    if ".conv.in_proj" in f".{name}":
        return {}  # LFM2's gates
    if "gate_up" in name:
        return {} if out % 2 else {"gate": f"0:{out // 2}", "up": f"{out // 2}:{out}"}
    if "codegen" in kinds:
        n = out // 12
        return {r: f"{i * n}:{i * n + n}:{3 * n}" for i, r in enumerate("qvk")}
    count = {n: v for n, v in config.items() if is_whole(v) and v > 0}
    heads = next((count[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in count), 1)
    groups = next((count[n] for n in ("num_key_value_heads", "num_kv_heads") if n in count), heads)
    if kinds & {"falcon", "gpt_bigcode"} and not config.get("new_decoder_architecture"):
        groups = 1 if config.get("multi_query", True) else heads
    head = count.get("head_dim", in_ // heads)
    fits = (heads + 2 * groups) * head == out and heads % groups == 0
    if QKV in name or (kinds & _GROUPED and groups == heads):
        q, period = heads // groups * head, out // groups
        ends = {"q": (0, q), "k": (q, q + head), "v": (q + head, period)}
        known = fits and kinds & _GROUPED
        return {r: f"{i}:{j}:{period}" for r, (i, j) in ends.items()} if known else {}
    sizes = {(heads * head, groups * head)} if fits else set()
    sizes |= {(in_, in_)} if out == 3 * in_ else set()
    if len(sizes) != 1:
        return {}
    q, k = sizes.pop()
    return {"q": f"0:{q}", "k": f"{q}:{q + k}", "v": f"{q + k}:{out}"}


# The tensors of a file or folder that an adapter can take. Only headers are read, and every one
# strictly (see lora_fx.files.safetensors).


EMPTY = "it is empty: saved under ZeRO-3 or FSDP without gathering the shards?"
_LOOKUP = re.compile(r"(^|\.)(\w*embed(ding)?s?(_tokens|_in)?|wte|wpe|shared)$")


def file_targets(path: str | Path) -> Found:
    """The targets of a file or folder; see `targets_of`."""
    return targets_of(tensors(path))


def targets_of(every: Tensors) -> Found:
    """The targets of tensors without a graph: every float tensor of two or more dimensions.

    Axis 0 is taken as out, the rest as in; roles come from names.
    """
    # An empty one of one axis is what ZeRO-3 leaves of a weight of any shape.
    found = {k: v for k, v in every.items() if len(v.shape) >= 2 or 0 in v.shape}
    tables = [v.shape for k, v in found.items() if _LOOKUP.search(k.removesuffix(".weight"))]
    vocabularies = [(s[0], s[1]) for s in tables if len(s) == 2 and s[0] >= HEAD_ROWS]
    targets, refusals = [], []
    for key, info in found.items():
        if info.dtype not in FLOATING or 0 in info.shape:
            why = EMPTY if 0 in info.shape else f"{info.dtype} is no dtype of plain weights"
            refusals.append(Refusal(key, "tensor", why))
            continue
        layout, name = plain_layout(info.shape), key.removesuffix(".weight")
        role = "head" if is_head(key) else "embedding" if _LOOKUP.search(name) else ""
        role = role or role_of([name], (), layout, vocabularies)
        region = tuple((0, n) for n in info.shape)
        parameter = Parameter(key, info.shape, info.dtype)
        targets.append(Target(key, parameter, region, layout, "tensor", (), role))
    note = "no graph was read: targets come from names and shapes, and their FLOPs are not known"
    return Found(default_plan(targets), tuple(refusals), notes=(note,))
