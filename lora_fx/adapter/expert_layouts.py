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

GATE_UP, DOWN = "gate_up_proj", "down_proj"


_LEAVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, DOWN: 2, "w2": 2, GATE_UP: 3}


_EXPERTS = re.compile(
    r"(?P<module>(?:.+\.)?experts)\.(?:(?P<n>\d{1,9})\.)?"
    rf"(?P<leaf>{'|'.join(_LEAVES)})(?:\.weight)?"
)


_TELL = "--base FOLDER has the model; or --model-type TYPE, as its config.json has it"


def upright(entries: Mapping[str, Entry], family: Family | None, version: str) -> dict[str, Entry]:
    """Stacks of PEFT's under their own names, `a` over what their product contracts.

    Where a module has both stacks, in and out of one are those of the other, so their sizes tell
    which is which and which way round PEFT took them. Else the family and the release do.

    Args:
        entries: As a file of PEFT has them, or placed by a base.
        family: That of the model, where it is known.
        version: The release of PEFT that wrote the file; empty where that is not known.

    Raises:
        LoraFxError: Neither tells.
    """
    modules: dict[str, dict[str, LowRank]] = {}
    for key, low in entries.items():
        if isinstance(low, LowRank) and low.origin.op == "experts":
            layer = low.origin.layer
            module = (layer and layer.module) or key.rpartition(".")[0]
            if (set(low.origin.candidates) or {key.rpartition(".")[2]}) <= {GATE_UP, DOWN}:
                modules.setdefault(module, {})[key] = low
    result = dict(entries)
    for module, lows in modules.items():
        shapes, swapped = _way(module, lows, family, version)
        placed = place(lows, shapes.get, turned=False)
        for (old, low), (key, entry) in zip(lows.items(), placed.items(), strict=True):
            del result[old]
            assert isinstance(entry, LowRank)
            origin = replace(entry.origin, op="experts", layer=None)
            entry = replace(entry, layout=low.layout, origin=origin)
            result[key] = turned(entry) if swapped else entry
    return result


def _way(
    module: str, lows: Updates, family: Family | None, version: str
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """[E, out, in] by name as the file has in and out, and True where it has them swapped."""
    for pair in permutations(lows, 2):
        shapes = {}
        for key, leaf in zip(pair, (GATE_UP, DOWN), strict=True):
            low, name = lows[key], f"{module}.{leaf}"
            candidates = low.origin.candidates
            rank = candidates.get(leaf, (low.rank, 0.0))[0]
            if key == name or leaf in candidates:
                shapes[name] = (low.a.size // low.a.shape[-1] // rank, *low.shape[-2:])
        for step in (1, -1) if len(shapes) == 2 else ():
            (wide, hidden), (out, inner) = (shape[1:][::step] for shape in shapes.values())
            if (wide, hidden) == (2 * inner, out):
                return shapes, step < 0
    bound = next(iter(lows.values())).layout
    said = bound.out == (2,) if bound else family.peft_turns(version) if family else None
    if family is None or said is None or any(low.origin.candidates for low in lows.values()):
        what = f"{', '.join(lows)}: shapes alone do not tell which side of the experts is in"
        raise LoraFxError(f"{what}, and PEFT's releases differ in that", _TELL)
    return {}, said != family.transposed


def turned(low: LowRank) -> LowRank:
    """The same ΔW with in and out exchanged: a is bᵀ and b is aᵀ."""
    layout = low.layout and replace(low.layout, out=low.layout.in_, in_=low.layout.out)
    a, b = (np.ascontiguousarray(np.swapaxes(side, -1, -2)) for side in (low.b, low.a))
    return replace(low, a=a, b=b, layout=layout)


def gathered(entries: Mapping[str, Entry], family: Family | None) -> dict[str, Entry]:
    """Every module's experts as stacks gate_up_proj and down_proj; other entries as they are.

    Args:
        entries: Experts one by one, their parts as stacks `M.gate_proj.weight` [E, …], or both.
        family: That of the model.

    Raises:
        LoraFxError: An expert or a half is missing, or is not like the others, so that there is
            no stack of them.
    """
    result: dict[str, Entry] = {}
    modules: dict[str, dict[int, dict[int, LowRank]]] = {}
    for key, low in entries.items():
        match = _EXPERTS.fullmatch(_moved(key, family, apart=False))
        if match and isinstance(low, LowRank) and low.a.ndim == (2 if match["n"] else 3):
            if not is_plain(low):
                raise _odd(f"{key!r} is {name_of(low)}, which no stack has")
            lows = modules.setdefault(match["module"], {}).setdefault(_LEAVES[match["leaf"]], {})
            if lows.setdefault(int(match["n"] or -1), low) is not low:
                raise _odd(f"{key!r} is a second update of the same experts")
        else:
            result[_moved(key, family, apart=False)] = low
    for module, kinds in modules.items():
        parts = {kind: _stack(module, lows) for kind, lows in kinds.items()}
        gate, up = parts.pop(0, None), parts.pop(1, None)
        if gate and up and 3 not in parts and _like(gate) == _like(up):
            parts[3] = _fused(gate, up, _known(family).interleaved)
        elif gate or up:
            raise _odd(f"{module}: gate and up of a stack have one rank and scale, and one update")
        if len({len(low.a) for low in parts.values()}) > 1:
            raise _odd(f"{module}: its stacks do not have as many experts")
        names = {3: GATE_UP, 2: DOWN}
        result |= {f"{module}.{names[kind]}": parts[kind] for kind in (3, 2) if kind in parts}
    return result


def _odd(what: str) -> LoraFxError:
    return LoraFxError(what, "lora-fx merge folds it into its base as it is")


def _moved(key: str, family: Family | None, *, apart: bool) -> str:
    """A name under the module that holds the experts: of one by one, or of stacks."""
    names = ("mlp", family.holder) if family else ("", "")
    old, new = names if apart else names[::-1]
    return key.replace(f".{old}.", f".{new}.")


def _known(family: Family | None, what: str = "rows of gate and up alternate") -> Family:
    if family is None:
        raise LoraFxError(f"whether {what} is up to the model; no shape tells it", _TELL)
    return family


def _stack(module: str, lows: Mapping[int, LowRank]) -> LowRank:
    if lows.keys() == {-1}:
        return lows[-1]
    first = lows[min(lows)]
    for n in range(max(lows) + 1):
        if n not in lows or _like(lows[n]) != _like(first):
            what = "is missing" if n not in lows else "has another shape or scale than the first"
            raise _odd(f"{module}.{n} {what}; a stack has all experts, at one rank and scale")
    a, b = (np.stack([getattr(lows[n], half) for n in sorted(lows)]) for half in "ab")
    return LowRank(a, b, first.alpha, None, first.variant, origin=Origin(op="experts"))


def _like(low: LowRank) -> tuple[object, ...]:
    return low.a.shape, low.b.shape, low.alpha, low.variant


def _fused(gate: LowRank, up: LowRank, woven: bool) -> LowRank:
    """The update of gate and up as one; rows of b alternate where `woven`."""
    a, pair = gate.a, (gate.b, up.b)
    if not np.array_equal(gate.a, up.a):
        a, none = np.concatenate([gate.a, up.a], axis=-2), np.zeros_like(gate.b)
        pair = np.concatenate([gate.b, none], -1), np.concatenate([none, up.b], -1)
    b = np.stack(pair, axis=-2 if woven else -3).reshape(len(a), -1, a.shape[-2])
    return replace(gate, a=a, b=b, alpha=_alpha(gate, a.shape[-2]))


def _alpha(low: LowRank, rank: int) -> float:
    """The alpha of another rank at the same scale: the shortest near it, so that √2 twice is 2."""
    exact = alpha_of(low.scale, rank, low.variant)
    short = (float(f"{exact:.{digits}g}") for digits in (6, 9, 12))
    return next((a for a in short if math.isclose(a, exact, rel_tol=1e-11)), exact)


def _split(low: LowRank, woven: bool) -> tuple[LowRank, LowRank]:
    """The updates of gate and of up."""
    half, odd = divmod(low.b.shape[-2], 2)
    if odd:
        raise _odd(f"{GATE_UP} has {low.b.shape[-2]} rows, which gate and up cannot share")
    rows = low.b[..., ::2, :], low.b[..., 1::2, :]
    gate, up = rows if woven else (low.b[..., :half, :], low.b[..., half:, :])
    k, odd = divmod(low.rank, 2)
    if odd or gate[..., k:].any() or up[..., :k].any():
        return replace(low, b=gate), replace(low, b=up)
    low = replace(low, alpha=_alpha(low, k))
    return (
        replace(low, a=low.a[..., :k, :], b=gate[..., :k]),
        replace(low, a=low.a[..., k:, :], b=up[..., k:]),
    )


@dataclass(frozen=True)
class ExpertLayout:
    """How a file has experts.

    Attributes:
        apart: One by one, else as stacks.
        split: gate and up are two updates, else one.
        server: vllm or sglang where it is for that alone.
        version: The release of PEFT whose way round the file has.
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
        family: That of the model, where it is known.
        version: The release of PEFT that wrote the file; empty where that is not known.

    Raises:
        LoraFxError: What the layout needs to know is not known, or it cannot say the update.
    """
    stacks = gathered(upright(entries, family, version), family)
    names = [match for key in stacks if (match := _EXPERTS.fullmatch(key)) and not match["n"]]
    if layout.server == "vllm" and names:
        for module in (match["module"] for match in names):
            if not {f"{module}.{GATE_UP}", f"{module}.{DOWN}"} <= stacks.keys():
                raise _odd(f"{module}: vLLM takes no experts without {GATE_UP} and {DOWN} both")
        whole = _known(family, "vLLM takes stacks").whole
        layout = replace(layout, apart=not whole, split=not whole)
    # SGLang goes by target_modules, of which it knows these names and no others.
    named = Family() if layout.server == "sglang" or not family else family
    gate, up, down = named.split
    result: dict[str, Entry] = {}
    for key, low in stacks.items():
        match = _EXPERTS.fullmatch(key)
        if not match or not isinstance(low, LowRank) or low.a.ndim != 3:
            result[_moved(key, family, apart=layout.apart)] = low
            continue
        parts = {match["leaf"]: low}
        if layout.split:
            wide = match["leaf"] == GATE_UP
            halves = _split(low, _known(family).interleaved) if wide else (low,)
            parts = dict(zip((gate, up) if wide else (down,), halves, strict=True))
        module = _moved(match["module"], family, apart=layout.apart)
        for name, part in parts.items():
            if layout.apart:
                for n, (a, b) in enumerate(zip(part.a, part.b, strict=True)):
                    one = LowRank(a, b, part.alpha, None, part.variant)
                    result[f"{module}.{n}.{name}.weight"] = one
            elif layout.split:
                origin = replace(part.origin, op="experts")
                result[f"{module}.{name}.weight"] = replace(part, layout=None, origin=origin)
            else:
                result[key] = _for_peft(low, layout.version, family)
    return _one_scale(result) if layout.server == "sglang" else result


def _for_peft(low: LowRank, version: str, family: Family | None) -> LowRank:
    """A stack the way round in which a release of PEFT takes it."""
    if low.layout and family not in FAMILIES:
        way = low.layout.out == (2,)
        family = Family(transposed=way, marked=way)
    elif version == LAYOUTS["peft"].version:  # the same for every family that is marked
        family = family or Family()
    family = _known(family, "stacks are [E, out, in] or [E, in, out]")
    return low if family.peft_turns(version) == family.transposed else turned(low)


def _one_scale(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries for SGLang, whose scale is lora_alpha / r of the config for every module."""
    lows = {k: v for k, v in entries.items() if isinstance(v, LowRank)}
    kinds = {(low.rank, float(f"{low.scale:.9g}")): key for key, low in lows.items()}
    if len(kinds) > 1:
        said = (f"{k!r} has rank {r} and scale {s:g}" for (r, s), k in [*kinds.items()][:2])
        raise _odd(f"{', '.join(said)}; SGLang has one of each for a whole adapter")
    plain = {k: replace(v, alpha=v.scale * v.rank, variant="lora") for k, v in lows.items()}
    return {**entries, **plain}
