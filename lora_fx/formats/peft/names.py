"""Names and shapes of PEFT's tensors, under `base_model.model.`.

============  ===================================  ==========================================
of a module   names                                shapes
============  ===================================  ==========================================
linear        X.lora_A.weight, X.lora_B.weight     A [r, in], B [out, r]; HF Conv1D the same
convolution   X.lora_A.weight, X.lora_B.weight     A [r, C_in, *kernel], B [C_out, r, 1, …]
experts       the same, for SGLang alone           A [E, r, in], B [E, out, r]
embedding     X.lora_embedding_A, …_B              A [r, rows], B [dim, r]
parameter     the first two; see `peft_stack`      A [r·E, in], B [out, r·E]
DoRA          X.lora_magnitude_vector              [out], [1, C_out, 1, …] or [dim]
lora_bias     X.lora_B.bias                        [out]
KaSA          X.lora_diag                          [r]
bias          X.base_layer.bias, or Y.bias         [out]
tokens        X.token_adapter.trainable_tokens_…   [n, dim]
============  ===================================  ==========================================

X may hold `base_layer` where PEFT has put one wrapper into another: a MultiheadAttention has its
out_proj at `X.base_layer.out_proj`, parameters of one module lie at `X`, `X.base_layer`, ….
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.fused import unpacked
from lora_fx.adapter.lowrank import Factors, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.base import PeftFile
from lora_fx.formats.peft.config import MERGE, Pattern, mutation
from lora_fx.text import JsonView

PREFIX = "base_model.model."
OWN = "lora_fx."
WRAPPER = "base_layer"
TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Modules that PEFT takes for experts of transformers 4 where target_modules has their names, and
doubles the rank of the stacks that it puts in their place; beside stacks they are parameters."""
DELTA = ".token_adapter.trainable_tokens_delta"
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "lora_diag": "diagonal",
}
_PART = re.compile(rf"(.+)\.({'|'.join(re.escape(p) for p in _PARTS)})")
_PARTNERS = (("b", "a"), ("a", "b"), ("magnitude", "a"), ("bias", "b"), ("diagonal", "a"))


@dataclass
class Group:
    """The tensors of one of PEFT's layers, by their full names.

    Attributes:
        lead: Where the layer is, without prefix, with the wrappers.
        kind: linear (or a convolution, told by the shapes) or embedding.
        names: a, b, magnitude, bias → tensor name.
        tied: Parameters that share the layer's weight and so its update (ensure_weight_tying).
    """

    lead: str
    kind: str
    names: dict[str, str]
    tied: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        """The model's own name of the layer."""
        return unwrapped(self.lead)


def unwrapped(lead: str, *others: str) -> str:
    """A name without PEFT's wrappers, and without these other parts.

    >>> unwrapped("mha.base_layer.out_proj")
    'mha.out_proj'
    """
    return ".".join(part for part in lead.split(".") if part not in (WRAPPER, *others))


def split_name(name: str) -> tuple[str, str, str] | None:
    """(lead, kind, part) of a tensor name without prefix; None where it is of no low-rank layer.

    >>> split_name("h.0.fc.lora_A.weight"), split_name("wte.lora_embedding_B")
    (('h.0.fc', 'linear', 'a'), ('wte', 'embedding', 'b'))
    """
    match = _PART.fullmatch(name)
    if match is None:
        return None
    kind = "embedding" if "embedding" in match[2] else "linear"
    return match[1], kind, _PARTS[match[2]]


def groups(names: Iterable[str], where: str) -> dict[str, Group]:
    """{lead: its tensors} of the names under the prefix that belong to low-rank layers.

    Raises:
        LoraFxError: Half a pair, two pairs on one layer, a tensor of another kind of layer.
    """
    result: dict[str, Group] = {}
    for name in names:
        if name.endswith(".lora_E"):
            raise LoraFxError(
                f"{where}: {name!r} is the singular values of AdaLoRA: not supported",
                "merge it into its model with PEFT (merge_and_unload)",
            )
        split = split_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if split is None:
            continue
        lead, kind, part = split
        group = result.setdefault(lead, Group(lead, "", {}))
        if part in group.names or (part in "ab" and group.kind not in ("", kind)):
            raise LoraFxError(
                f"{where}: {name!r} is a second entry for {f'{group.module}.weight'!r}; "
                "expected one",
                "the file was edited; save the adapter again",
            )
        group.names[part] = name
        group.kind = kind if part in "ab" else group.kind
    for group in result.values():
        _check_whole(group, where)
    return result


def _check_whole(group: Group, where: str) -> None:
    """Raise unless both halves are there."""
    for have, missing in _PARTNERS:
        if have in group.names and missing not in group.names:
            half = missing.upper()
            end = f"embedding_{half}" if group.kind == "embedding" else f"{half}.weight"
            other = f"{PREFIX}{group.lead}.lora_{end}"
            raise LoraFxError(
                f"{where}: {group.names[have]!r} has no partner; expected {other!r} beside it",
                "the file is incomplete; save or fetch it again",
            )


def from_tensors(
    kind: str, a: Array, b: Array, where: str
) -> tuple[Array, Array, str, tuple[int, ...]]:
    """A [r, in], b [out, r], the op and its kernel of a pair in PEFT's shapes.

    Raises:
        LoraFxError: The two do not fit each other.
    """
    shapes = f"A is {list(a.shape)} and B is {list(b.shape)}"
    stacked = a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[1] == b.shape[2]
    if stacked and (len(a) != b.shape[1] or b.shape[2] != 1):  # else a convolution of rank E
        return a, b, "experts", ()
    if a.ndim != b.ndim or (kind == "embedding" and a.ndim != 2) or a.ndim > 5:
        raise LoraFxError(
            f"{where}: {shapes}; expected A [r, in, *kernel] and B [out, r, 1, …]",
            "is the file complete?",
        )
    if a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
        grouped = a.ndim > 2 and a.shape[0] % b.shape[1] == 0
        raise LoraFxError(
            f"{where}: {shapes}; expected the rank as first size of A and second size of B",
            "PEFT's update of a grouped convolution mixes the groups, so no weight can hold it"
            if grouped
            else "do A and B come from the same file?",
        )
    op = f"conv{a.ndim - 2}d" if a.ndim > 2 else "embedding" if kind == "embedding" else ""
    flat = np.ascontiguousarray(a.reshape(a.shape[0], -1))
    return flat, np.ascontiguousarray(b.reshape(b.shape[:2])), op, a.shape[2:]


def unknown_name(name: str, where: str) -> LoraFxError:
    """What to raise for a tensor that PEFT would not have written."""
    at, hint = name.find(PREFIX), "was the file saved with save_pretrained?"
    if at > 0:
        hint = f"PEFT's name is {name[at:]!r}: take the prefix {name[:at]!r} off every name"
    elif at < 0 and ".lora_" in name:
        core = name.removeprefix("base_model.").removeprefix("module.")
        hint = f"the nearest name is {PREFIX + core!r}; {hint}"
    return LoraFxError(
        f"{where}: {name!r} is not a name that PEFT gives; expected {PREFIX}X.lora_A.weight, "
        "X.lora_B.weight, X.lora_embedding_A, X.lora_embedding_B, X.lora_magnitude_vector or a "
        "module of modules_to_save",
        hint,
    )


# target_parameters of PEFT: updates of parameters rather than of modules, mostly expert stacks.
#
# A of a parameter [E, …, …] is stored [r·E, in] and read as [E, r, in]; B is stored [out, r·E] and
# read as [out, r, E], the expert fastest. ΔW of expert e is s · B[:, :, e] · A[e]; a 2-D parameter
# is E = 1. r is in the config only.
#
# Two parameters of one module are two wrappers, one inside the other, in the order in which the
# module defines its parameters, the first innermost; the file does not name them. Where names and
# ranks leave one way only to give them out, it is taken. Otherwise the entry gets the key
# `MODULE.(P|Q)#DEPTH` and `layer` says what it may be; `lora_fx.adapter.fused.place` decides by the
# base's shapes. Checked against peft 0.21.2, `tuners_utils._inject_parameters` and
# `lora.ParamWrapper`.


def candidates(config: JsonView, module: str) -> list[str]:
    """The parameters of a module that target_parameters names, by PEFT's comparison of endings.

    >>> candidates({"target_parameters": ["experts.up", "other.down"]}, "h.0.experts")
    ['up']
    """
    named = ((n, str(n).rpartition(".")[2]) for n in config.get("target_parameters") or ())
    return sorted({leaf for name, leaf in named if f".{module}.{leaf}".endswith(f".{name}")})


def read_stacks(
    levels: Sequence[Group], source: PeftFile, ranks: Pattern, alphas: Pattern, variant: str
) -> dict[str, LowRank]:
    """The updates of the parameters of one module.

    Args:
        levels: Its wrappers, outermost first.
        source: The file.
        ranks: r and rank_pattern, which PEFT compares with the parameter's whole name.
        alphas: lora_alpha and alpha_pattern.
        variant: lora or rslora.

    Raises:
        LoraFxError: Shapes, ranks or the number of wrappers that do not go together.
    """
    module = levels[0].module
    named = candidates(source.config, module)
    pairs = [_pair(group, source) for group in levels]
    told = {leaf: _numbers(f"{module}.{leaf}", ranks, alphas, source) for leaf in named}
    ways = [
        way
        for way in permutations(named, len(levels))
        if all(len(a) % told[leaf][0] == 0 for leaf, (a, _) in zip(way, pairs, strict=True))
    ]
    if not ways:
        raise LoraFxError(
            f"{source.name}: {levels[0].names['a']!r} and the layers inside it have "
            f"{[len(a) for a, _ in pairs]} rows; expected multiples of the ranks "
            f"{ {k: v[0] for k, v in told.items()} } that {source.config_file} gives",
            "correct target_parameters, r or rank_pattern",
        )
    entries = {}
    for depth, (group, (a, b)) in enumerate(zip(levels, pairs, strict=True)):
        layer = FileLayer(group.lead, len(levels))
        if len(ways) == 1:
            rank, alpha = told[ways[0][depth]]
            key = f"{module}.{ways[0][depth]}"
            a, b = (a, b) if len(a) == rank else unpacked(a, b, rank)
        else:
            key, alpha = f"{module}.({'|'.join(named)})#{depth}", 0.0
            layer = replace(layer, module=module, depth=depth, candidates=told)
        origin = Origin(op="experts", layer=layer)
        entries[key] = LowRank(a, b, alpha, None, variant, origin=origin)
    return entries


def one_stack(key: str, group: Group, source: PeftFile, ranks: Pattern, alphas: Pattern) -> LowRank:
    """The update of a stack whose name our own JSON says; always [E, r, in] and [E, out, r]."""
    rank, alpha = _numbers(key, ranks, alphas, source)
    return LowRank(*unpacked(*_pair(group, source), rank), alpha)


def packed(low: LowRank) -> Factors:
    """The inverse of `lora_fx.adapter.fused.unpacked`; a matrix stays one."""
    if low.a.ndim == 2:
        return low.a, low.b
    b = np.ascontiguousarray(low.b.transpose(1, 2, 0))
    return low.a.reshape(-1, low.a.shape[-1]), b.reshape(len(b), -1)


def _pair(group: Group, source: PeftFile) -> Factors:
    a, b = source.factor(group.names["a"]), source.factor(group.names["b"])
    if group.kind != "linear" or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise LoraFxError(
            f"{source.name}: {group.names['a']!r}: A is {list(a.shape)} and B is {list(b.shape)}; "
            "expected [r·E, in] and [out, r·E] of a parameter",
            "do A and B come from the same file?",
        )
    more = {"magnitude", "bias", "diagonal"} & set(group.names)
    if more or mutation(source.config) or source.config.get("use_dora"):
        what = group.names[more.pop()] if more else "use_dora or init_lora_weights"
        raise LoraFxError(
            f"{source.name}: {what!r} beside target_parameters; expected plain lora or rslora: "
            "PEFT has no other for parameters",
            MERGE,
        )
    return a, b


def _numbers(name: str, ranks: Pattern, alphas: Pattern, source: PeftFile) -> tuple[int, float]:
    rank, alpha = ranks.of(name), alphas.of(name)
    if rank is None or rank < 1 or rank != int(rank):
        raise LoraFxError(
            f"{source.config_file}: r of {name!r} is {rank}; expected a whole number above 0: the "
            "number of experts follows from it",
            "add the r that the adapter was trained with",
        )
    assert alpha is not None  # check_config saw lora_alpha
    return int(rank), alpha
