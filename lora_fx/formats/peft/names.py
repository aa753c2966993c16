"""Names and shapes of PEFT's tensors, under `base_model.model.`.

============  ===================================  ==========================================
of a module   names                                shapes
============  ===================================  ==========================================
linear        X.lora_A.weight, X.lora_B.weight     A [r, in], B [out, r]; HF Conv1D the same
convolution   X.lora_A.weight, X.lora_B.weight     A [r, C_in, *kernel], B [C_out, r, 1, …]
experts       the same, for SGLang alone           A [E, r, in], B [E, out, r]
embedding     X.lora_embedding_A, …_B              A [r, rows], B [dim, r]
parameter     the first two; see `stacks`      A [r·E, in], B [out, r·E]
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
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError

PREFIX = "base_model.model."
OWN = "lora_fx."
WRAPPER = "base_layer"
OUT_PROJ = f".{WRAPPER}.out_proj"
"""Where PEFT keeps the out_proj of a MultiheadAttention, after the module's name."""
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
