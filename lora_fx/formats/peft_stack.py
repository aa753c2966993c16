"""target_parameters of PEFT: updates of parameters rather than of modules, mostly expert stacks.

A of a parameter [E, …, …] is stored [r·E, in] and read as [E, r, in]; B is stored [out, r·E] and
read as [out, r, E], the expert fastest. ΔW of expert e is s · B[:, :, e] · A[e]; a 2-D parameter
is E = 1. r is in the config only.

Two parameters of one module are two wrappers, one inside the other, in the order in which the
module defines its parameters, the first innermost; the file does not name them. Where names and
ranks leave one way only to give them out, it is taken. Otherwise the entry gets the key
`MODULE.(P|Q)#DEPTH` and `extra` says what it may be; `lora_fx.adapter.fused.place` decides by the
base's shapes. Checked against peft 0.21.2, `tuners_utils._inject_parameters` and
`lora.ParamWrapper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft_config import MERGE, Pattern, mutation
from lora_fx.formats.peft_names import Group
from lora_fx.formats.peft_source import Source


def candidates(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that target_parameters names, by PEFT's comparison of endings.

    >>> candidates({"target_parameters": ["experts.up", "other.down"]}, "h.0.experts")
    ['up']
    """
    result = set()
    for name in config.get("target_parameters") or ():
        leaf = str(name).rpartition(".")[2]
        if f".{module}.{leaf}".endswith(f".{name}"):
            result.add(leaf)
    return sorted(result)


def read_stacks(
    levels: Sequence[Group], source: Source, ranks: Pattern, alphas: Pattern, variant: str
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
            f"{source.file}: {levels[0].names['a']!r} and the layers inside it have "
            f"{[len(a) for a, _ in pairs]} rows; expected multiples of the ranks "
            f"{ {k: v[0] for k, v in told.items()} } that {source.config_file} gives",
            "correct target_parameters, r or rank_pattern",
        )
    entries = {}
    for depth, (group, (a, b)) in enumerate(zip(levels, pairs, strict=True)):
        extra: dict[str, Any] = {"op": "experts", "lead": group.lead, "of": len(levels)}
        if len(ways) == 1:
            rank, alpha = told[ways[0][depth]]
            key = f"{module}.{ways[0][depth]}"
            entries[key] = LowRank(*unpacked(a, b, rank), alpha, None, variant, "", extra)
            continue
        extra |= {
            "module": module,
            "depth": depth,
            "candidates": {k: list(v) for k, v in told.items()},
        }
        key = f"{module}.({'|'.join(named)})#{depth}"
        entries[key] = LowRank(a, b, 0.0, None, variant, "", extra)
    return entries


def unpacked(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Factors [E, r, in] and [E, out, r] from PEFT's [r·E, in] and [out, r·E]; 2-D where E is 1."""
    experts = len(a) // rank
    if experts == 1:
        return a, b
    stack = a.reshape(experts, rank, -1)
    return stack, np.ascontiguousarray(b.reshape(len(b), rank, experts).transpose(2, 0, 1))


def packed(low: LowRank) -> tuple[Array, Array]:
    """The inverse of unpacked."""
    if low.a.ndim == 2:
        return low.a, low.b
    b = np.ascontiguousarray(low.b.transpose(1, 2, 0))
    return low.a.reshape(-1, low.a.shape[-1]), b.reshape(len(b), -1)


def _pair(group: Group, source: Source) -> tuple[Array, Array]:
    a, b = source.factor(group.names["a"]), source.factor(group.names["b"])
    if group.kind != "linear" or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise LoraFxError(
            f"{source.file}: {group.names['a']!r}: A is {list(a.shape)} and B is {list(b.shape)}; "
            "expected [r·E, in] and [out, r·E] of a parameter",
            "do A and B come from the same file?",
        )
    extra = {"magnitude", "bias"} & set(group.names)
    if extra or mutation(source.config) or source.config.get("use_dora"):
        what = group.names[extra.pop()] if extra else "use_dora or init_lora_weights"
        raise LoraFxError(
            f"{source.file}: {what!r} beside target_parameters; expected plain lora or rslora: "
            "PEFT has no other for parameters",
            MERGE,
        )
    return a, b


def _numbers(name: str, ranks: Pattern, alphas: Pattern, source: Source) -> tuple[int, float]:
    rank, alpha = ranks.of(name), alphas.of(name)
    if rank is None or rank < 1 or rank != int(rank):
        raise LoraFxError(
            f"{source.config_file}: r of {name!r} is {rank}; expected a whole number above 0: the "
            "number of experts follows from it",
            "add the r that the adapter was trained with",
        )
    assert alpha is not None  # check_config saw lora_alpha
    return int(rank), alpha
