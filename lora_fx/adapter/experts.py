"""Updates of the experts of a mixture, between the layouts in which files have them.

In memory an update of a stack is `a` [E, r, in] and `b` [E, out, r]; of one expert, or of one half
of gate and up, it is a part of that:

    fused → split    b's rows of gate with all of a, and b's rows of up with all of a
    split → fused    a = [a_gate; a_up], b = diag(b_gate, b_up), the rank of both; where a_gate and
                     a_up are equal, that a and [b_gate; b_up]

Each takes back what the other did, bit by bit: a b that is such a diag is split into its blocks.
Nothing is rounded. What a file does not say, and shapes do not tell, `Family` has by model_type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.fused import place
from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.adapter.updates import Entry, is_plain, name_of
from lora_fx.errors import LoraFxError

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_LEAVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, DOWN: 2, "w2": 2, GATE_UP: 3}
_EXPERTS = re.compile(
    rf"(?P<module>(?:.+\.)?experts)\.(?:(?P<n>\d+)\.)?(?P<leaf>{'|'.join(_LEAVES)})(?:\.weight)?"
)


@dataclass(frozen=True)
class Family:
    """How models of some types keep their experts: facts of transformers 5.24 and vLLM 0.33.

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


FAMILIES = (
    Family(frozenset({"gpt_oss"}), transposed=True, marked=True, interleaved=True, whole=True),
    Family(
        frozenset({"openai_privacy_filter"}), transposed=True, marked=True, interleaved=True
    ),
    Family(frozenset({"aria", "aria_text"}), transposed=True, marked=True),
    Family(frozenset({"llama4", "llama4_text"}), transposed=True),
    Family(
        frozenset({"qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
                   "interns1_pro"}),
        whole=True,
    ),
    Family(
        frozenset({"mixtral", "minimax", "phimoe"}),
        split=("w1", "w3", "w2"), holder="block_sparse_moe",
    ),
)  # fmt: skip


IN_OUT_EXPERTS = frozenset(t for family in FAMILIES if family.transposed for t in family.types)
"""model_type of models whose expert stacks are [experts, in, out]."""


def family_of(types: Iterable[str]) -> Family | None:
    """The family of a model by its model_type and those of its parts; None where it has none."""
    kinds = frozenset(types)
    named = (family for family in FAMILIES if family.types & kinds)
    return next(named, Family(kinds) if kinds else None)


def peft_turns(family: Family, version: str) -> bool | None:
    """How a release of PEFT takes a stack [E, …, …]: True for [E, in, out], None if not known.

    Until 0.18 that was every stack, in 0.19.0 those of modules without `is_transposed`, since
    0.19.1 those with it. `in` is what A [r·E, in] goes over. Sources: `lora.ParamWrapper.__init__`
    of 0.18.1, `update_layer` of 0.19.0, 0.19.1, 0.20.0 and 0.21.2.
    """
    found = re.match(r"0\.(\d+)\.?(\d*)", version)
    if found is None:  # before 0.18, or edited
        return True if family.marked else None
    release = int(found[1]), int(found[2] or 0)
    return release < (19, 0) or family.marked != (release == (19, 0))


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
        if isinstance(low, LowRank) and low.op == "experts" and not low.kernel:
            module = low.layer.module if low.layer else ""
            names = set(low.candidates) or {key.rpartition(".")[2]}
            if names <= {GATE_UP, DOWN}:
                modules.setdefault(module or key.rpartition(".")[0], {})[key] = low
    result = dict(entries)
    for module, lows in modules.items():
        shapes, swapped = _way(module, lows, family, version)
        placed = place(lows, shapes.get, turned=False)
        for (old, low), (key, entry) in zip(lows.items(), placed.items(), strict=True):
            del result[old]
            assert isinstance(entry, LowRank)
            entry = replace(entry, layout=low.layout, op="experts", layer=None)
            result[key] = turned(entry) if swapped else entry
    return result


Shapes = dict[str, tuple[int, ...]]


def _way(
    module: str, lows: Mapping[str, LowRank], family: Family | None, version: str
) -> tuple[Shapes, bool]:
    """[E, out, in] by name as the file has in and out, and True where it has them swapped."""
    if len(lows) == 2:
        for gate, down in permutations(lows):
            shapes = {}
            for key, leaf in ((gate, GATE_UP), (down, DOWN)):
                low, name = lows[key], f"{module}.{leaf}"
                rank = low.candidates.get(leaf, (low.rank, 0.0))[0]
                if key == name or leaf in low.candidates:
                    shapes[name] = (low.a.size // low.a.shape[-1] // rank, *low.shape[-2:])
            for swapped in (False, True):
                sides = [shape[1:][:: -1 if swapped else 1] for shape in shapes.values()]
                if len(sides) == 2 and sides[0] == (2 * sides[1][1], sides[1][0]):
                    return shapes, swapped
    placed = next(iter(lows.values())).layout
    said = placed.out == (2,) if placed else peft_turns(family, version) if family else None
    if family is None or said is None or any(low.candidates for low in lows.values()):
        raise LoraFxError(
            f"{', '.join(lows)}: shapes alone do not tell which side of the experts is in and "
            "which is out, and PEFT's releases differ in that",
            "--base FOLDER has the model; or --model-type TYPE, as its config.json has it",
        )
    return {}, said != family.transposed


def turned(low: LowRank) -> LowRank:
    """The same ΔW with in and out exchanged: a is bᵀ and b is aᵀ."""
    layout = low.layout and replace(low.layout, out=low.layout.in_, in_=low.layout.out)
    a, b = (np.ascontiguousarray(np.swapaxes(side, -1, -2)) for side in (low.b, low.a))
    return replace(low, a=a, b=b, layout=layout)


# One by one → stacks.


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
        match = _EXPERTS.fullmatch(key)
        if match and isinstance(low, LowRank) and low.a.ndim == (2 if match["n"] else 3):
            if not is_plain(low):
                raise LoraFxError(f"{key!r} is {name_of(low)}; no stack of experts has that", KEEP)
            kinds = modules.setdefault(_moved(match["module"], family, apart=False), {})
            kinds.setdefault(_LEAVES[match["leaf"]], {})[int(match["n"] or -1)] = low
        else:
            result[_moved(key, family, apart=False)] = low
    for module, kinds in modules.items():
        parts = {kind: _stack(module, lows) for kind, lows in kinds.items()}
        if 0 in parts or 1 in parts:
            if not {0, 1} <= set(parts):
                raise LoraFxError(
                    f"{module}: it has {'gate' if 0 in parts else 'up'} of its experts alone; a "
                    "stack holds gate and up in one",
                    KEEP,
                )
            parts[3] = _fused(module, parts.pop(0), parts.pop(1), _known(family).interleaved)
        if len({low.a.shape[0] for low in parts.values()}) > 1:
            raise LoraFxError(f"{module}: its stacks do not have as many experts", KEEP)
        names = {3: GATE_UP, 2: DOWN}
        result |= {f"{module}.{names[kind]}": parts[kind] for kind in (3, 2) if kind in parts}
    return result


KEEP = "convert it to per-expert, which keeps every expert as it is"


def _moved(key: str, family: Family | None, *, apart: bool) -> str:
    """A name under the module that holds the experts: of one by one, or of stacks."""
    names = ("mlp", family.holder) if family else ("", "")
    old, new = names if apart else names[::-1]
    return key.replace(f".{old}.", f".{new}.")


def _known(family: Family | None, what: str = "rows of gate and up alternate") -> Family:
    if family is None:
        raise LoraFxError(
            f"whether {what} depends on the model, and neither shapes nor names tell",
            "--base FOLDER has the model; or --model-type TYPE, as its config.json has it",
        )
    return family


def _stack(module: str, lows: Mapping[int, LowRank]) -> LowRank:
    if -1 in lows:
        return lows[-1]
    first = lows[min(lows)]
    odd = [n for n in range(max(lows) + 1) if n not in lows or _like(lows[n]) != _like(first)]
    if odd:
        raise LoraFxError(
            f"{module}.{odd[0]}: {'missing' if odd[0] not in lows else 'its shape or its scale'} "
            f"differs from expert {min(lows)}; a stack has one rank and one scale",
            KEEP,
        )
    a, b = (np.stack([getattr(lows[n], half) for n in sorted(lows)]) for half in "ab")
    return LowRank(a, b, first.alpha, None, first.variant, op="experts")


def _like(low: LowRank) -> tuple[object, ...]:
    return (low.a.shape, low.b.shape, low.alpha, low.variant)


def _fused(module: str, gate: LowRank, up: LowRank, woven: bool) -> LowRank:
    """The update of gate and up as one; rows of b alternate where `woven`."""
    if _like(gate) != _like(up):
        raise LoraFxError(
            f"{module}: gate and up differ in shape or in scale; fused, they have one",
            KEEP,
        )
    if np.array_equal(gate.a, up.a):
        a, pair, rank = gate.a, (gate.b, up.b), gate.rank
    else:
        a, rank = np.concatenate([gate.a, up.a], axis=-2), 2 * gate.rank
        none = np.zeros_like(gate.b)
        pair = np.concatenate([gate.b, none], -1), np.concatenate([none, up.b], -1)
    b = np.stack(pair, axis=-2 if woven else -3)
    b = b.reshape(*gate.b.shape[:-2], -1, rank)
    return replace(gate, a=a, b=b, alpha=_alpha(gate, rank), op="experts")


def _alpha(low: LowRank, rank: int) -> float:
    """The alpha of another rank at the same scale; 12 digits, so that √2 twice is 2."""
    return float(f"{alpha_of(low.scale, rank, low.variant):.12g}")


# Stacks → one by one.


def _split(low: LowRank, woven: bool) -> tuple[LowRank, LowRank]:
    """The updates of gate and of up."""
    half = low.b.shape[-2] // 2
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
    updates = {k: v for k, v in stacks.items() if isinstance(v, LowRank) and v.a.ndim == 3}
    found = {k: match for k in updates if (match := _EXPERTS.fullmatch(k))}
    if layout.server == "vllm" and found:
        _check_both(found.values())
        whole = _known(family, "vLLM takes stacks").whole
        layout = replace(layout, apart=not whole, split=not whole)
    leaves = (family or Family()).split
    result: dict[str, Entry] = {}
    for key, entry in stacks.items():
        if key not in found:
            result[_moved(key, family, apart=layout.apart)] = entry
            continue
        low, (module, leaf) = updates[key], found[key].group("module", "leaf")
        parts = {leaf: low}
        if layout.split:
            halves = _split(low, _known(family).interleaved) if leaf == GATE_UP else (low,)
            parts = dict(zip(leaves[:2] if leaf == GATE_UP else leaves[2:], halves, strict=True))
        for name, part in parts.items():
            if layout.apart:
                holder = _moved(module, family, apart=True)
                for n, (a, b) in enumerate(zip(part.a, part.b, strict=True)):
                    one = LowRank(a, b, part.alpha, None, part.variant)
                    result[f"{holder}.{n}.{name}.weight"] = one
            elif layout.split:
                result[f"{module}.{name}.weight"] = replace(part, layout=None, op="experts")
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
    return low if peft_turns(family, version) == family.transposed else turned(low)


def _check_both(found: Iterable[re.Match[str]]) -> None:
    leaves: dict[str, set[str]] = {}
    for match in found:
        leaves.setdefault(match["module"], set()).add(match["leaf"])
    odd = next((m for m, names in leaves.items() if len(names) < 2), None)
    if odd is not None:
        raise LoraFxError(
            f"{odd}: it has {leaves[odd].pop()} alone; vLLM 0.33 takes no experts without "
            "gate_up_proj and down_proj both",
            "train both, or merge it into its base (lora-fx merge)",
        )


def _one_scale(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries for SGLang 0.5, whose scale is lora_alpha / r of the config for every module."""
    lows = {k: v for k, v in entries.items() if isinstance(v, LowRank)}
    first = next(iter(lows.items()), None)
    for key, low in lows.items():
        if first and (low.rank, low.scale) != (first[1].rank, first[1].scale):
            raise LoraFxError(
                f"{first[0]!r} has rank {first[1].rank} and scale {first[1].scale:g}, {key!r} rank "
                f"{low.rank} and scale {low.scale:g}; SGLang has one of each for an adapter",
                "lora-fx truncate --rank gives one rank; or merge it into its base",
            )
    plain = {k: replace(v, alpha=v.scale * v.rank, variant="lora") for k, v in lows.items()}
    return {**entries, **plain}
