"""Updates of the experts of a mixture, between the layouts in which files have them.

In memory an update of a stack is `a` [E, r, in] and `b` [E, out, r]; of one expert, or of one
half of gate and up, it is a part of that:

    fused → split    b's rows of gate with all of a, and b's rows of up with all of a
    split → fused    a = [a_gate; a_up], b = diag(b_gate, b_up), the rank of both; where a_gate
                     and a_up are equal, that a and [b_gate; b_up]

Each takes back what the other did, bit by bit: a b that is such a diag is split into its blocks.
Nothing is rounded. What a file does not say, and shapes do not tell, `Family` has by model_type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.expert_families import FAMILIES, Family
from lora_fx.adapter.expert_stacks import place
from lora_fx.adapter.lowrank import LowRank, Updates, alpha_of
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry, is_plain, name_of
from lora_fx.errors import LoraFxError

GATE_UP = "gate_up_proj"
DOWN = "down_proj"
_GATE = "gate_proj"
_UP = "up_proj"
_LEAVES = {
    _GATE: _GATE,
    "w1": _GATE,
    _UP: _UP,
    "w3": _UP,
    DOWN: DOWN,
    "w2": DOWN,
    GATE_UP: GATE_UP,
}
"""The leaf names of experts → what the leaf is."""
_EXPERTS = re.compile(
    r"(?P<module>(?:.+\.)?experts)\.(?:(?P<n>\d{1,9})\.)?"
    rf"(?P<leaf>{'|'.join(_LEAVES)})(?:\.weight)?"
)
_ALL = -1
"""The number that stands for an update of all experts."""
_TELL = "give the model with --base FOLDER; or its model_type with --model-type TYPE"


def upright(entries: Mapping[str, Entry], family: Family | None, version: str) -> dict[str, Entry]:
    """PEFT's stacks under their own names, with `a` over the contracted axis.

    Args:
        entries: As a file of PEFT has them, or placed by a base.
        family: The family of the model, where it is known.
        version: The release of PEFT that wrote the file; empty where that is not known.

    Raises:
        LoraFxError: Nothing tells which side of a stack is in; see `_orientation`.
    """
    result = dict(entries)
    for module, lows in _stacks_by_module(entries).items():
        shapes, swapped = _orientation(module, lows, family, version)
        placed = place(lows, shapes.get, turned=False)
        for (file_key, low), (key, entry) in zip(lows.items(), placed.items(), strict=True):
            del result[file_key]
            assert isinstance(entry, LowRank)
            origin = replace(entry.origin, op="experts", layer=None)
            entry = replace(entry, layout=low.layout, origin=origin)
            result[key] = turned(entry) if swapped else entry
    return result


def _stacks_by_module(entries: Mapping[str, Entry]) -> dict[str, dict[str, LowRank]]:
    """The updates of stacks gate_up_proj and down_proj, by the module that holds the stacks."""
    stacks: dict[str, dict[str, LowRank]] = {}
    for key, low in entries.items():
        if not isinstance(low, LowRank) or low.origin.op != "experts":
            continue
        module, _, leaf = key.rpartition(".")
        leaves = set(low.origin.candidates) or {leaf}
        if not leaves <= {GATE_UP, DOWN}:
            continue
        layer = low.origin.layer
        if layer is not None and layer.module:
            module = layer.module
        stacks.setdefault(module, {})[key] = low
    return stacks


def _orientation(
    module: str, lows: Updates, family: Family | None, version: str
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Decide which axis of a module's stacks is in, and which is out.

    The first of these that has an answer decides:

    1. The sizes, where a module has both stacks: in and out of one are those of the other.
    2. The layout of a stack that a base has placed, beside the model's family.
    3. The release of PEFT that wrote the file, beside the model's family.

    Returns:
        [E, out, in] by name, as the file has in and out, where sizes were needed to tell the
        stacks apart; and True where the file has in and out the other way round.

    Raises:
        LoraFxError: None has an answer.
    """
    for pair in permutations(lows, 2):
        shapes = _shapes_of_pair(module, lows, pair)
        swapped = _is_swapped(shapes)
        if swapped is not None:
            return shapes, swapped

    layout = next(iter(lows.values())).layout
    transposed = None
    if layout is not None:
        transposed = layout.out == (2,)
    elif family is not None:
        transposed = family.peft_turns(version)
    ambiguous = any(low.origin.candidates for low in lows.values())
    if family is None or transposed is None or ambiguous:
        what = (
            f"{', '.join(lows)}: the shapes do not show which axis of the experts is in and which "
            "is out"
        )
        raise LoraFxError(f"{what}, and releases of PEFT differ", _TELL)
    return {}, transposed != family.transposed


def _shapes_of_pair(
    module: str, lows: Updates, pair: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """[E, out, in] by name, if the first key is one of gate_up_proj and the second of down_proj.

    A key that cannot be one of that leaves its name out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for key, leaf in zip(pair, (GATE_UP, DOWN), strict=True):
        low = lows[key]
        name = f"{module}.{leaf}"
        candidates = low.origin.candidates
        if key != name and leaf not in candidates:
            continue
        rank, _ = candidates.get(leaf, (low.rank, 0.0))
        experts = low.a.size // low.a.shape[-1] // rank
        shapes[name] = (experts, *low.shape[-2:])
    return shapes


def _is_swapped(shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether two stacks fit each other with in and out exchanged; None where they do not fit.

    gate_up_proj is [E, 2·inner, hidden], and down_proj [E, hidden, inner].
    """
    if len(shapes) != 2:
        return None
    (_, gate_up_out, gate_up_in), (_, down_out, down_in) = shapes.values()
    if (gate_up_out, gate_up_in) == (2 * down_in, down_out):
        return False
    if (gate_up_in, gate_up_out) == (2 * down_out, down_in):
        return True
    return None


def turned(low: LowRank) -> LowRank:
    """The same ΔW with in and out exchanged: a is bᵀ and b is aᵀ."""
    layout = low.layout
    if layout is not None:
        layout = replace(layout, out=layout.in_, in_=layout.out)
    a = np.ascontiguousarray(np.swapaxes(low.b, -1, -2))
    b = np.ascontiguousarray(np.swapaxes(low.a, -1, -2))
    return replace(low, a=a, b=b, layout=layout)


def gathered(entries: Mapping[str, Entry], family: Family | None) -> dict[str, Entry]:
    """Every module's experts as stacks gate_up_proj and down_proj; other entries as they are.

    Args:
        entries: Experts one by one, their parts as stacks `M.gate_proj.weight` [E, …], or both.
        family: The family of the model.

    Raises:
        LoraFxError: An expert or a half is missing, or is not like the others, so that there is
            no stack of them.
    """
    result: dict[str, Entry] = {}
    modules: dict[str, dict[str, dict[int, LowRank]]] = {}
    for key, entry in entries.items():
        name = _under_holder(key, family, one_by_one=False)
        match = _EXPERTS.fullmatch(name)
        axes = 2 if match and match["n"] else 3
        if match is None or not isinstance(entry, LowRank) or entry.a.ndim != axes:
            result[name] = entry
            continue
        if not is_plain(entry):
            raise _unsayable(
                f"{key!r} is {name_of(entry)}; expected lora or rslora in a stack of experts"
            )
        leaf = _LEAVES[match["leaf"]]
        number = int(match["n"] or _ALL)
        lows = modules.setdefault(match["module"], {}).setdefault(leaf, {})
        if lows.setdefault(number, entry) is not entry:
            raise _unsayable(f"{key!r} is a second update of the same experts")

    for module, by_leaf in modules.items():
        result |= _stacks_of(module, by_leaf, family)
    return result


def _stacks_of(
    module: str, by_leaf: Mapping[str, Mapping[int, LowRank]], family: Family | None
) -> dict[str, LowRank]:
    """The stacks of one module, by name, from updates by leaf and number of the expert."""
    stacks = {leaf: _stack(module, lows) for leaf, lows in by_leaf.items()}
    gate = stacks.pop(_GATE, None)
    up = stacks.pop(_UP, None)
    if gate is not None or up is not None:
        if gate is None or up is None or GATE_UP in stacks or _like(gate) != _like(up):
            raise _unsayable(
                f"{module}: gate and up of a stack need one update each, with the same rank and "
                "scale"
            )
        stacks[GATE_UP] = _fused(gate, up, _known(family).interleaved)
    if len({len(low.a) for low in stacks.values()}) > 1:
        raise _unsayable(f"{module}: its stacks have different numbers of experts")
    return {f"{module}.{leaf}": stacks[leaf] for leaf in (GATE_UP, DOWN) if leaf in stacks}


def _unsayable(message: str) -> LoraFxError:
    """The error for an update that a layout of files cannot store."""
    return LoraFxError(message, "fold the adapter into its base with lora-fx merge")


def _under_holder(key: str, family: Family | None, *, one_by_one: bool) -> str:
    """A name under the module that holds the experts: of one by one, or of stacks."""
    if family is None:
        return key
    if one_by_one:
        return key.replace(".mlp.", f".{family.holder}.")
    return key.replace(f".{family.holder}.", ".mlp.")


def _known(family: Family | None, what: str = "rows of gate and up alternate") -> Family:
    """The family; raises LoraFxError if it is unknown, because `what` depends on it."""
    if family is None:
        raise LoraFxError(f"whether {what} depends on the model; the shapes do not show it", _TELL)
    return family


def _stack(module: str, lows: Mapping[int, LowRank]) -> LowRank:
    """The updates of single experts, by number, as one of their stack."""
    if lows.keys() == {_ALL}:
        return lows[_ALL]
    first = lows[min(lows)]
    for number in range(max(lows) + 1):
        if number in lows and _like(lows[number]) == _like(first):
            continue
        what = "is missing"
        if number in lows:
            what = "has another shape or scale than the first"
        raise _unsayable(
            f"{module}.{number} {what}; a stack needs all experts with one rank and scale"
        )
    numbers = sorted(lows)
    a = np.stack([lows[number].a for number in numbers])
    b = np.stack([lows[number].b for number in numbers])
    return LowRank(a, b, first.alpha, None, first.variant, origin=Origin(op="experts"))


def _like(low: LowRank) -> tuple[object, ...]:
    """The facts that the updates of one stack have in common."""
    return low.a.shape, low.b.shape, low.alpha, low.variant


def _fused(gate: LowRank, up: LowRank, interleaved: bool) -> LowRank:
    """The update of gate and up as one; rows of b alternate where `interleaved`."""
    a = gate.a
    gate_b = gate.b
    up_b = up.b
    if not np.array_equal(gate.a, up.a):
        a = np.concatenate([gate.a, up.a], axis=-2)
        zeros = np.zeros_like(gate.b)
        gate_b = np.concatenate([gate.b, zeros], axis=-1)
        up_b = np.concatenate([zeros, up.b], axis=-1)
    rank = a.shape[-2]
    # The halves become an axis after that of rows, or before it.
    b = np.stack([gate_b, up_b], axis=-2 if interleaved else -3).reshape(len(a), -1, rank)
    return replace(gate, a=a, b=b, alpha=_alpha(gate, rank))


def _alpha(low: LowRank, rank: int) -> float:
    """The alpha of another rank at the same scale: the shortest near it, so that √2 twice is 2."""
    exact = alpha_of(low.scale, rank, low.variant)
    for digits in (6, 9, 12):
        rounded = float(f"{exact:.{digits}g}")
        if math.isclose(rounded, exact, rel_tol=1e-11):
            return rounded
    return exact


def _split(low: LowRank, interleaved: bool) -> tuple[LowRank, LowRank]:
    """The updates of gate and of up, from one of both.

    Where b is diag(b_gate, b_up), each takes its half of the ranks; else both have all of a.
    """
    rows = low.b.shape[-2]
    if rows % 2:
        raise _unsayable(
            f"{GATE_UP} has {rows} rows; expected an even number, half for gate and half for up"
        )
    if interleaved:
        gate_b = low.b[..., ::2, :]
        up_b = low.b[..., 1::2, :]
    else:
        gate_b = low.b[..., : rows // 2, :]
        up_b = low.b[..., rows // 2 :, :]

    half = low.rank // 2
    if low.rank % 2 or gate_b[..., half:].any() or up_b[..., :half].any():
        return replace(low, b=gate_b), replace(low, b=up_b)
    low = replace(low, alpha=_alpha(low, half))
    gate = replace(low, a=low.a[..., :half, :], b=gate_b[..., :half])
    up = replace(low, a=low.a[..., half:, :], b=up_b[..., half:])
    return gate, up


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of experts in a file.

    Attributes:
        apart: It has an update for each expert, else one for each stack.
        split: It has an update of gate and one of up, else one of both.
        server: vllm or sglang where it is for that server alone.
        version: The release of PEFT by which in and out of a stack are told.
    """

    apart: bool = False
    split: bool = False
    server: str = ""
    version: str = "0.21.2"


LAYOUTS = {
    "peft": ExpertLayout(),
    "peft-0.18": ExpertLayout(version="0.18.1"),
    "per-expert": ExpertLayout(apart=True, split=True),
    "per-expert-fused": ExpertLayout(apart=True),
    "vllm": ExpertLayout(apart=True, split=True, server="vllm"),
    "sglang": ExpertLayout(apart=True, split=True, server="sglang"),
    "sglang-3d": ExpertLayout(split=True, server="sglang"),
}
"""The names of `convert --format`; all are files of PEFT otherwise."""


def laid(
    entries: Mapping[str, Entry], layout: ExpertLayout, family: Family | None, version: str = ""
) -> dict[str, Entry]:
    """Entries with every module's experts in a layout of files; other entries as they are.

    Args:
        entries: As a file has them, whatever its layout, or placed by a base.
        layout: One of LAYOUTS.
        family: The family of the model, where it is known.
        version: The release of PEFT that wrote the file; empty where that is not known.

    Raises:
        LoraFxError: A fact that the layout needs is unknown, or the layout cannot store the update.
    """
    stacks = gathered(upright(entries, family, version), family)
    if layout.server == "vllm":
        layout = _layout_for_vllm(layout, stacks, family)
    result: dict[str, Entry] = {}
    for key, low in stacks.items():
        match = _EXPERTS.fullmatch(key)
        if match is None or not isinstance(low, LowRank) or low.a.ndim != 3:
            result[_under_holder(key, family, one_by_one=layout.apart)] = low
        elif layout.apart or layout.split:
            module = _under_holder(match["module"], family, one_by_one=layout.apart)
            parts = _parts_by_leaf(match["leaf"], low, layout, family)
            result |= _laid_parts(module, parts, layout)
        else:
            result[key] = _for_peft(low, layout.version, family)
    if layout.server == "sglang":
        return _one_scale(result)
    return result


def _layout_for_vllm(
    layout: ExpertLayout, stacks: Mapping[str, Entry], family: Family | None
) -> ExpertLayout:
    """The layout in which vLLM takes the experts of a model: as stacks, or one by one."""
    matches = [_EXPERTS.fullmatch(key) for key in stacks]
    modules = [match["module"] for match in matches if match is not None and not match["n"]]
    if not modules:
        return layout
    for module in modules:
        if not {f"{module}.{GATE_UP}", f"{module}.{DOWN}"} <= stacks.keys():
            raise _unsayable(f"{module}: vLLM needs both {GATE_UP} and {DOWN} of experts")
    takes_stacks = _known(family, "vLLM reads stacks").whole
    return replace(layout, apart=not takes_stacks, split=not takes_stacks)


def _parts_by_leaf(
    leaf: str, low: LowRank, layout: ExpertLayout, family: Family | None
) -> dict[str, LowRank]:
    """The updates that a layout makes of a stack, by their leaf names."""
    if not layout.split:
        return {leaf: low}
    names = family or Family()
    if layout.server == "sglang":
        # SGLang goes by target_modules, of which it knows these names and no others.
        names = Family()
    gate_leaf, up_leaf, down_leaf = names.split
    if leaf != GATE_UP:
        return {down_leaf: low}
    gate, up = _split(low, _known(family).interleaved)
    return {gate_leaf: gate, up_leaf: up}


def _laid_parts(
    module: str, parts: Mapping[str, LowRank], layout: ExpertLayout
) -> dict[str, LowRank]:
    """The parts of a stack under the names of files: one expert at a time, or as stacks."""
    entries = {}
    for leaf, part in parts.items():
        if not layout.apart:
            origin = replace(part.origin, op="experts")
            entries[f"{module}.{leaf}.weight"] = replace(part, layout=None, origin=origin)
            continue
        for number, (a, b) in enumerate(zip(part.a, part.b, strict=True)):
            low = LowRank(a, b, part.alpha, None, part.variant)
            entries[f"{module}.{number}.{leaf}.weight"] = low
    return entries


def _for_peft(low: LowRank, version: str, family: Family | None) -> LowRank:
    """A stack with its axes in the order that a release of PEFT reads."""
    if low.layout is not None and family not in FAMILIES:
        transposed = low.layout.out == (2,)
        family = Family(transposed=transposed, marked=transposed)
    elif version == LAYOUTS["peft"].version:  # the same for every family that is marked
        family = family or Family()
    family = _known(family, "stacks are [E, out, in] or [E, in, out]")
    if family.peft_turns(version) == family.transposed:
        return low
    return turned(low)


def _one_scale(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries for SGLang, whose scale is lora_alpha / r of the config for every module."""
    lows = {key: entry for key, entry in entries.items() if isinstance(entry, LowRank)}
    key_by_numbers: dict[tuple[int, float], str] = {}
    for key, low in lows.items():
        key_by_numbers[low.rank, float(f"{low.scale:.9g}")] = key
    if len(key_by_numbers) > 1:
        texts = [
            f"{key!r} has rank {rank} and scale {scale:g}"
            for (rank, scale), key in key_by_numbers.items()
        ]
        raise _unsayable(
            f"{', '.join(texts[:2])}; SGLang uses one rank and scale for the whole adapter"
        )
    plain: dict[str, Entry] = {}
    for key, low in lows.items():
        plain[key] = replace(low, alpha=low.scale * low.rank, variant="lora")
    return {**entries, **plain}
