"""The layout of experts in models, by model_type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lora_fx.text import JsonView, is_whole

_SPARSE = "block_sparse_moe"


@dataclass(frozen=True)
class Family:
    """The layout of experts in some model types, as in transformers 5.24 and vLLM 0.33.

    Attributes:
        types: Their model_type; empty for every other.
        transposed: Stacks are [E, in, out], else [E, out, in].
        marked: Their module says so (`is_transposed`), which is what PEFT goes by.
        interleaved: Rows of gate and up alternate in the fused one, else gate's come first.
        whole: vLLM takes the stacks as they are (`is_3d_moe_weight`), else one expert at a time.
        split: Leaf names of gate, up and down where experts are one by one.
        holder: What holds the experts there, where stacks are in `mlp`.
    """

    types: frozenset[str] = frozenset()
    transposed: bool = False
    marked: bool = False
    interleaved: bool = False
    whole: bool = False
    split: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    holder: str = "mlp"

    @property
    def listed(self) -> bool:
        """True for one of FAMILIES; all others keep their experts as most models do."""
        return self in FAMILIES

    def peft_turns(self, version: str) -> bool | None:
        """How a release of PEFT reads a stack [E, …, …]: True for [E, in, out], None if unknown.

        Until 0.18 that was every stack, in 0.19.0 those of modules without `is_transposed`, since
        0.19.1 those with it. `in` is what A [r·E, in] goes over. Sources:
        `lora.ParamWrapper.__init__` of 0.18.1, `update_layer` of 0.19.0, 0.19.1, 0.20.0 and 0.21.2.
        """
        numbers = re.match(r"0\.(\d+)\.?(\d*)", version)
        if numbers is None:  # before 0.18, or edited
            return True if self.marked else None
        release = (int(numbers[1]), int(numbers[2] or 0))
        if release < (19, 0):
            return True
        if release == (19, 0):
            return not self.marked
        return self.marked


FAMILIES = (
    Family(frozenset({"gpt_oss"}), transposed=True, marked=True, interleaved=True, whole=True),
    Family(frozenset({"openai_privacy_filter"}), transposed=True, marked=True),
    Family(frozenset({"aria", "aria_text"}), transposed=True, marked=True),
    Family(frozenset({"llama4", "llama4_text"}), transposed=True),
    Family(
        frozenset({"qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe", "interns1_pro"}), whole=True
    ),
    Family(
        frozenset({"mixtral", "minimax", "minimax_m2", "phimoe"}),
        split=("w1", "w3", "w2"),
        holder=_SPARSE,
    ),
)


_TYPES_IN_OUT = (family.types for family in FAMILIES if family.transposed)
IN_OUT_EXPERTS = frozenset[str]().union(*_TYPES_IN_OUT)
"""model_type of models whose expert stacks are [experts, in, out]."""


def experts_of(config: JsonView) -> int:
    """The number of experts in a layer, from config.json; 0 if it is not given there."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = config.get(name)
        if is_whole(count):
            return count
    return 0


def family_of(types: Iterable[str]) -> Family | None:
    """The family of a model, from its model_type and those of its parts; None if it has none."""
    model_types = frozenset(types)
    for family in FAMILIES:
        if family.types & model_types:
            return family
    return Family(model_types) if model_types else None
