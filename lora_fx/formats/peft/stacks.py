"""target_parameters of PEFT: updates of parameters rather than of modules, mostly expert stacks.

A of a parameter [E, …, …] is stored [r·E, in] and read as [E, r, in]; B is stored [out, r·E] and
read as [out, r, E], the expert fastest. ΔW of expert e is s · B[:, :, e] · A[e]; a 2-D parameter
is E = 1. r is in the config only.

Two parameters of one module are two wrappers, one inside the other, in the order in which the
module defines its parameters, the first innermost; the file does not name them. Where names and
ranks leave one way only to give them out, it is taken. Otherwise the entry gets the key
`MODULE.(P|Q)#DEPTH` and `layer` says what it may be; `lora_fx.adapter.expert_stacks.place` decides
by the base's shapes. Checked against peft 0.21.2, `tuners_utils._inject_parameters` and
`lora.ParamWrapper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.expert_stacks import unpacked
from lora_fx.adapter.lowrank import Factors, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import MERGE, mutation
from lora_fx.formats.peft.names import Group
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.text import JsonView


def candidates(config: JsonView, module: str) -> list[str]:
    """The parameters of a module that target_parameters names, by PEFT's comparison of endings.

    >>> candidates({"target_parameters": ["experts.up", "other.down"]}, "h.0.experts")
    ['up']
    """
    parameters = set[str]()
    for name in config.get("target_parameters") or ():
        leaf = str(name).rpartition(".")[2]
        if f".{module}.{leaf}".endswith(f".{name}"):
            parameters.add(leaf)
    return sorted(parameters)


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
        LoraFxError: Shapes, ranks or the number of wrappers that do not fit each other.
    """
    module = levels[0].module
    names = candidates(source.config, module)
    pairs = [_pair(group, source) for group in levels]
    numbers = {name: _numbers(f"{module}.{name}", ranks, alphas, source) for name in names}
    orders = [order for order in permutations(names, len(levels)) if _fits(order, pairs, numbers)]
    if not orders:
        raise LoraFxError(
            f"{source.name}: {levels[0].names['a']!r} and the layers inside it have "
            f"{[len(a) for a, _ in pairs]} rows; expected multiples of the ranks "
            f"{ {name: rank for name, (rank, _) in numbers.items()} } in {source.config_file}",
            "correct target_parameters, r or rank_pattern",
        )

    updates = {}
    for depth, (group, (a, b)) in enumerate(zip(levels, pairs, strict=True)):
        layer = FileLayer(group.lead, len(levels))
        if len(orders) == 1:
            name = orders[0][depth]
            key = f"{module}.{name}"
            rank, alpha = numbers[name]
            if len(a) != rank:
                a, b = unpacked(a, b, rank)
        else:  # the base's shapes decide
            key = f"{module}.({'|'.join(names)})#{depth}"
            alpha = 0.0
            layer = replace(layer, module=module, depth=depth, candidates=numbers)
        origin = Origin(op="experts", layer=layer)
        updates[key] = LowRank(a, b, alpha, None, variant, origin=origin)
    return updates


def _fits(
    order: Sequence[str], pairs: Sequence[Factors], numbers: Mapping[str, tuple[int, float]]
) -> bool:
    """Whether the wrappers may hold parameters in this order: each A has rank · E rows."""
    for name, (a, _) in zip(order, pairs, strict=True):
        rank, _ = numbers[name]
        if len(a) % rank != 0:
            return False
    return True


def one_stack(key: str, group: Group, source: PeftFile, ranks: Pattern, alphas: Pattern) -> LowRank:
    """The update of a stack whose name is in lora-fx's JSON; [E, r, in] and [E, out, r]."""
    rank, alpha = _numbers(key, ranks, alphas, source)
    a, b = _pair(group, source)
    a, b = unpacked(a, b, rank)
    return LowRank(a, b, alpha)


def packed(update: LowRank) -> Factors:
    """The inverse of `lora_fx.adapter.expert_stacks.unpacked`; a matrix stays one."""
    if update.a.ndim == 2:
        return update.a, update.b
    b = np.ascontiguousarray(update.b.transpose(1, 2, 0))
    return update.a.reshape(-1, update.a.shape[-1]), b.reshape(len(b), -1)


def _pair(group: Group, source: PeftFile) -> Factors:
    """A [r·E, in] and B [out, r·E] of a wrapper; raises for what PEFT cannot do for parameters."""
    a = source.factor(group.names["a"])
    b = source.factor(group.names["b"])
    if group.kind != "linear" or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise LoraFxError(
            f"{source.name}: {group.names['a']!r}: A is {list(a.shape)} and B is {list(b.shape)}; "
            "expected [r·E, in] and [out, r·E] for a parameter",
            "do A and B come from the same file?",
        )
    vectors = {"magnitude", "bias", "diagonal"} & set(group.names)
    if vectors or mutation(source.config) or source.config.get("use_dora"):
        what = group.names[vectors.pop()] if vectors else "use_dora or init_lora_weights"
        raise LoraFxError(
            f"{source.name}: {what!r} together with target_parameters; expected plain lora or "
            "rslora: PEFT has no other method for parameters",
            MERGE,
        )
    return a, b


def _numbers(name: str, ranks: Pattern, alphas: Pattern, source: PeftFile) -> tuple[int, float]:
    """(rank, alpha) of a parameter."""
    rank = ranks.of(name)
    alpha = alphas.of(name)
    if rank is None or rank < 1 or rank != int(rank):
        raise LoraFxError(
            f"{source.config_file}: r of {name!r} is {rank}; expected a whole number above 0, "
            "which gives the number of experts",
            "add the r that the adapter was trained with",
        )
    assert alpha is not None  # check_config saw lora_alpha
    return int(rank), alpha
