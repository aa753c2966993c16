"""qalora: a reads means of groups of inputs, so that ΔW is constant in each group.

Xu et al. 2023 (arXiv:2309.14717). The zero points of a quantised weight are constant in each block
of inputs too, so they can hold such a ΔW. PEFT's QALoraLinearVariant takes in/group times the mean
of each group, so that

    ΔW[o, i] = alpha/rank · in/group² · (b @ a)[o, i // group]

`LowRank.a` has a column for each input. The tensor in a model has one for each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant_protocol import Beginning, Read, Variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import Ops, V
from lora_fx.text import Json, JsonView


@dataclass(frozen=True)
class QaLora(Lora):
    """Each column of a is that of a group of inputs.

    Attributes:
        group: Inputs of a group; one or more blocks of the codes that ΔW shall be folded into.
    """

    title = "QA-LoRA"
    made_of = ("a", "b")
    group: int = 32

    @property
    def constant_over(self) -> int:
        """The inputs of a group."""
        return self.group

    def with_argument(self, text: str) -> Variant | None:
        """qalora:G, of groups of G inputs."""
        if text.isascii() and text.isdigit() and int(text):
            return replace(self, group=int(text))
        return None

    def of(self, low: LowRank) -> Variant | None:
        """Any update with groups; `a` may have been changed, so its values are checked."""
        group = int(low.variant_tensors.get("group", 0))
        if not group or pooled(low.a, group) is None:
            return None
        return replace(self, group=group)

    def check_init(self, init: str) -> None:
        """Only what is drawn has no number for a single input."""
        if init != "kaiming":
            raise LoraFxError(
                f"init {init!r} needs one column of A for each input; qalora has one for each "
                "group",
                "leave --init out",
            )

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """An a [*batch, rank, in/group] within ±1/√(in/group), as PEFT draws it.

        Raises:
            LoraFxError: The groups do not divide the inputs.
        """
        width = low.a.shape[-1]
        if width % self.group:
            raise LoraFxError(
                f"{beginning.key!r}: {width} inputs cannot be divided into groups of {self.group}",
                f"exclude it, or pass --variant qalora:{math.gcd(width, self.group)}",
            )
        # Drawn within ±1/√in, for in inputs; a group counts as one.
        a = low.a[..., :: self.group] * np.float32(self.group**0.5)
        return grouped(replace(low, a=a, variant="lora"), self.group)

    def tensors(self, low: LowRank) -> Mapping[str, Array]:
        """See Variant."""
        return {"a": low.a[..., :: self.group], "b": low.b}

    def with_values(self, low: LowRank, values: Mapping[str, Array]) -> LowRank:
        """See Variant."""
        return replace(low, a=np.repeat(values["a"], self.group, -1), b=values["b"])

    def rows(self, low: LowRank, rows: slice | Array) -> LowRank:
        """The update of some rows: its ΔW is constant over the same groups of inputs."""
        return replace(low, b=low.b[rows])

    def alpha(self, low: LowRank) -> float:
        """The alpha as PEFT has it, which multiplies this one by in/group²."""
        # Rounded, so that it is as a person wrote it, whatever the gain is.
        alpha = low.alpha / _gain(low.a.shape[-1], self.group)
        return float(f"{alpha:.15g}")

    def a(self, e: Ops[V], read: Read[V]) -> V:
        """Each column of a once for each input of its group."""
        return e.op("repeat", read("a"), times=self.group)

    def drawn(self, low: LowRank, key: str, seed: int) -> Mapping[str, Array]:
        """See Variant."""
        values = super().drawn(low, key, seed)
        return {**values, "a": np.ascontiguousarray(values["a"][..., :: self.group])}

    def facts(self, low: LowRank) -> Json:
        """The group."""
        return {"group": self.group}

    def with_facts(self, low: LowRank, facts: JsonView) -> LowRank:
        """The update with the group of `facts`; an a of groups gets a column for each input."""
        group = int(facts.get("group", 0))
        if not group or self.of(low) is not None:
            return low
        a = low.a
        if low.layout is not None and a.shape[-1] * group == low.layout.in_size:
            a = np.repeat(a, group, -1)
        return replace(low, a=a, variant_tensors={"group": np.asarray(group)})


def grouped(low: LowRank, group: int) -> LowRank:
    """The update of which QA-LoRA is given an a [*batch, rank, in/group]; see above."""
    a = np.repeat(low.a, group, -1)
    alpha = low.alpha * _gain(a.shape[-1], group)
    return replace(low, a=a, alpha=alpha, variant_tensors={"group": np.asarray(group)})


def pooled(a: Array, group: int) -> Array | None:
    """One column of a for each group; None if the columns of a group differ."""
    if group < 1 or a.shape[-1] % group:
        return None
    by_group = a.reshape(*a.shape[:-1], -1, group)
    if not (by_group == by_group[..., :1]).all():
        return None
    return by_group[..., 0]


def _gain(width: int, group: int) -> float:
    return width / group**2
