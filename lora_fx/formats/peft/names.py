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
"""The place of the out_proj of a MultiheadAttention in PEFT, after the module's name."""
TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Modules that PEFT takes for experts of transformers 4 where target_modules has their names, and
doubles the rank of the stacks that it puts in their place; beside stacks they are parameters."""
DELTA = ".token_adapter.trainable_tokens_delta"
_FACTORS_AND_VECTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "lora_diag": "diagonal",
}
"""The end of a tensor's name → the tensor's role in its layer."""
_ENDS = "|".join(re.escape(end) for end in _FACTORS_AND_VECTORS)
_NAME = re.compile(rf"(.+)\.({_ENDS})")
_PARTNERS = (("b", "a"), ("a", "b"), ("magnitude", "a"), ("bias", "b"), ("diagonal", "a"))
"""(tensor that a layer has, tensor that must come with it)."""


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
    left_out = (WRAPPER, *others)
    return ".".join(name for name in lead.split(".") if name not in left_out)


def split_name(name: str) -> tuple[str, str, str] | None:
    """(lead, kind, what it is of the layer) of a tensor's name without prefix.

    None where the name is of no low-rank layer.

    >>> split_name("h.0.fc.lora_A.weight"), split_name("wte.lora_embedding_B")
    (('h.0.fc', 'linear', 'a'), ('wte', 'embedding', 'b'))
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    lead, end = match.groups()
    kind = "embedding" if "embedding" in end else "linear"
    return lead, kind, _FACTORS_AND_VECTORS[end]


def groups(names: Iterable[str], where: str) -> dict[str, Group]:
    """{lead: its tensors} of the names under the prefix that belong to low-rank layers.

    Raises:
        LoraFxError: Half a pair, two pairs on one layer, a tensor of another kind of layer.
    """
    layers: dict[str, Group] = {}
    for name in names:
        if name.endswith(".lora_E"):
            raise LoraFxError(
                f"{where}: {name!r} holds singular values of AdaLoRA, which is not supported",
                "merge it into its model with PEFT (merge_and_unload)",
            )
        if not name.startswith(PREFIX):
            continue
        split = split_name(name.removeprefix(PREFIX))
        if split is None:
            continue
        lead, kind, role = split
        group = layers.setdefault(lead, Group(lead, "", {}))
        _add_name(group, name, kind, role, where)
    for group in layers.values():
        _check_whole(group, where)
    return layers


def _add_name(group: Group, name: str, kind: str, role: str, where: str) -> None:
    """Add a tensor to its layer; raise for a second one, and for a factor of another kind."""
    is_factor = role in ("a", "b")
    is_of_other_kind = is_factor and group.kind not in ("", kind)
    if role in group.names or is_of_other_kind:
        raise LoraFxError(
            f"{where}: {name!r} is a second entry for {f'{group.module}.weight'!r}; expected one",
            "the file was edited; save the adapter again",
        )
    group.names[role] = name
    if is_factor:
        group.kind = kind


def _check_whole(group: Group, where: str) -> None:
    """Raise unless both halves are there."""
    for present, needed in _PARTNERS:
        if present not in group.names or needed in group.names:
            continue
        half = needed.upper()
        end = f"embedding_{half}" if group.kind == "embedding" else f"{half}.weight"
        partner = f"{PREFIX}{group.lead}.lora_{end}"
        raise LoraFxError(
            f"{where}: {group.names[present]!r} has no partner; expected {partner!r} too",
            "the file is incomplete; save or fetch it again",
        )


def from_tensors(
    kind: str, a: Array, b: Array, where: str
) -> tuple[Array, Array, str, tuple[int, ...]]:
    """A [r, in], b [out, r], the op and its kernel of a pair in PEFT's shapes.

    Raises:
        LoraFxError: The two do not fit each other.
    """
    if _are_experts(a, b):
        return a, b, "experts", ()
    _check_shapes(kind, a, b, where)
    if a.ndim > 2:
        op = f"conv{a.ndim - 2}d"
    else:
        op = "embedding" if kind == "embedding" else ""
    rows_of_a = np.ascontiguousarray(a.reshape(a.shape[0], -1))
    rows_of_b = np.ascontiguousarray(b.reshape(b.shape[:2]))
    return rows_of_a, rows_of_b, op, a.shape[2:]


def _are_experts(a: Array, b: Array) -> bool:
    """True for A [E, r, in] and B [E, out, r]; a Conv1d of rank E may have these shapes as well."""
    if a.ndim != 3 or b.ndim != 3:
        return False
    is_stack = len(a) == len(b) and a.shape[1] == b.shape[2]
    is_convolution = len(a) == b.shape[1] and b.shape[2] == 1
    return is_stack and not is_convolution


def _check_shapes(kind: str, a: Array, b: Array, where: str) -> None:
    """Raise for A and B whose shapes are not [r, in, *kernel] and [out, r, 1, …]."""
    shapes = f"A is {list(a.shape)} and B is {list(b.shape)}"
    if a.ndim != b.ndim or (kind == "embedding" and a.ndim != 2) or a.ndim > 5:
        raise LoraFxError(
            f"{where}: {shapes}; expected A [r, in, *kernel] and B [out, r, 1, …]",
            "is the file complete?",
        )
    if a.shape[0] == b.shape[1] and all(size == 1 for size in b.shape[2:]):
        return
    hint = "do A and B come from the same file?"
    if a.ndim > 2 and a.shape[0] % b.shape[1] == 0:
        hint = "PEFT's update of a grouped convolution mixes the groups, so no weight can hold it"
    raise LoraFxError(
        f"{where}: {shapes}; expected the rank as the first size of A and the second size of B",
        hint,
    )


def unknown_name(name: str, where: str) -> LoraFxError:
    """The error about a tensor that PEFT would not have written."""
    return LoraFxError(
        f"{where}: {name!r} is not a name that PEFT writes; expected {PREFIX}X.lora_A.weight, "
        "X.lora_B.weight, X.lora_embedding_A, X.lora_embedding_B, X.lora_magnitude_vector or a "
        "module of modules_to_save",
        _hint_for_name(name),
    )


def _hint_for_name(name: str) -> str:
    """The nearest name that PEFT would have given."""
    hint = "was the file saved with save_pretrained?"
    start = name.find(PREFIX)
    if start > 0:
        return (
            f"PEFT's name is {name[start:]!r}: remove the prefix {name[:start]!r} from every name"
        )
    if start < 0 and ".lora_" in name:
        module_and_end = name.removeprefix("base_model.").removeprefix("module.")
        return f"the nearest name is {PREFIX + module_and_end!r}; {hint}"
    return hint
