"""Adapters trained on the parts of a fused weight, on the whole, and the reverse: both are exact.

    q, k, v apart → one matrix    the update of each is one of a part: ΔW[part] = s·b·a
    one matrix → q, k, v apart    rows of b: ΔW_q = s·b[q]·a, and so on, each with the same a

The names tell which belong together: the same module holds both, and the roles agree. The experts
of a mixture are parts too, one by one or in stacks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.lowrank import Factors, LowRank, Updates, alpha_of
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry, is_plain, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.targets.target import Found, Target, role_by_name
from lora_fx.text import JsonView, is_whole

QKV = "query_key_value"
"""A fused weight whose rows lie otherwise from model to model."""
FUSED = {
    ("q", "k", "v"): re.compile(
        rf"(^|\.)(qkv|qkv_proj|Wqkv|W_pack|c_attn|in_proj|in_proj_weight|{QKV})$"
    ),
    ("gate", "up"): re.compile(r"(^|\.)(gate_up_proj|gate_up)$"),
}
"""The roles of the parts of fused weights with such names."""


def roles_of(name: str) -> tuple[str, ...]:
    """The roles of the parts of a fused weight, or the one of another weight; empty for no role.

    >>> roles_of("h.0.attn.qkv_proj.weight"), roles_of("h.0.attn.q_proj.weight"), roles_of("h.0.ln")
    (('q', 'k', 'v'), ('q',), ())
    """
    module = name.removesuffix(".weight")
    for roles, rule in FUSED.items():
        if rule.search(module):
            return roles
    role = role_by_name(module)
    return (role,) if role else ()


def other_split(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The update under the keys that the model has instead; empty where it has none such.

    This is no rule of `lora_fx.targets.names`: what a key means here is rows of another tensor, and
    the update has to be cut to them.

    Args:
        key: A key that is no target of the model.
        entry: Its update, as a file of PEFT has it: `a` [rank, in], `b` [out, rank].
        found: The model's targets.
    """
    whole = [t for t in found.targets if t.parameter.name == key]
    whole.sort(key=lambda t: t.region[0])
    sizes = [t.layout.out_size for t in whole if t.layout == plain_layout(t.layout.stored)]
    if len(sizes) == len(whole) and sizes and sum(sizes) == entry.b.shape[0]:
        return dict(_rows(entry, whole, sizes))
    beside = [t for t in found.targets if parent(t.parameter.name) == parent(key)]
    roles = roles_of(key)
    if len(roles) == 1:
        part = next((part for t in beside for role, part in t.parts if role == roles[0]), None)
        return {} if part is None else {part: entry}
    if roles and QKV not in key and entry.b.ndim == 2:
        by_role = {t.role: t for t in beside}
        parts = [by_role[role] for role in roles if role in by_role]
        sizes = [t.layout.out_size for t in parts]
        if len(parts) == len(roles) and sum(sizes) == entry.b.shape[0]:
            return dict(_rows(entry, parts, sizes))
    return {}


def _rows(entry: LowRank, parts: list[Target], sizes: list[int]) -> Iterator[tuple[str, LowRank]]:
    ends = np.cumsum([0, *sizes])
    for t, low, high in zip(parts, ends[:-1], ends[1:], strict=True):
        yield t.key, sliced(entry, np.arange(low, high))


def parent(name: str) -> str:
    """The module that holds the projection of a parameter's name.

    >>> parent("h.0.attn.qkv.weight"), parent("h.0.attn.in_proj_weight")
    ('h.0.attn', 'h.0.attn')
    """
    return name.removesuffix(".weight").rpartition(".")[0]


# Without a model: the algebra alone, by the rows that each part has in the whole.


def sliced(low: LowRank, rows: Array) -> LowRank:
    """The update of some rows, without the ranks that reach none of them."""
    part = variant_of(low).rows(low, rows)
    kept = part.b.any(axis=0) if part.b.any() else np.full(part.rank, True)
    alpha = alpha_of(part.scale, int(kept.sum()), part.variant)
    a = part.a[kept]
    b = np.ascontiguousarray(part.b[:, kept])
    origin = replace(part.origin, layer=None)
    return replace(part, a=a, b=b, alpha=alpha, layout=None, frozen=0, origin=origin)


def joined(key: str, out: int, pieces: Mapping[str, tuple[LowRank, Array]]) -> LowRank:
    """Updates of different rows of one weight [out, in] as one: B in blocks, unless A is shared.

    Raises:
        LoraFxError: They do not fit each other, or only some have lengths of rows, as DoRA has.
    """
    lows = [low for low, _ in pieces.values()]
    first = next((low for low in lows if low.scale), lows[0])  # the others' B is in units of it
    scale = first.scale or 1.0
    blocks = list[Factors]()
    beside = dict[str, Array]()
    stretched = variant_of(first)
    for name, (low, rows) in pieces.items():
        room = (len(rows), first.a.shape[1])
        if low.shape != room:
            raise MisfitError(
                f"the update of {name!r} is {list(low.shape)}, [out, in]; expected {list(room)}, "
                f"as a part of {key!r}"
            )
        b = np.zeros((out, low.rank), np.float32)
        b[rows] = low.b * np.float32(low.scale / scale)
        variant = variant_of(low)
        for field, value in variant.beside(low).items():
            stretched = variant
            beside.setdefault(field, np.full(out, np.nan, np.float32))[rows] = value
        same = next((one for one in blocks if np.array_equal(one[0], low.a)), None)
        if same is None:
            blocks.append((low.a, b))
        else:
            same[1][rows] += b[rows]
    for value in beside.values():
        count = int(np.isfinite(value).sum())
        if count < out:
            raise LoraFxError(
                f"{key!r}: {count} of its {out} rows have {stretched.title}'s lengths; expected "
                "all or none",
                "make plain LoRA of it first, by --as lora and the base that it was trained on",
            )
    a, b = np.concatenate([a for a, _ in blocks]), np.concatenate([b for _, b in blocks], axis=1)
    name = first.variant if variant_of(first).peft_type else "lora"
    whole = LowRank(a, b, alpha_of(first.scale, len(a), name), variant=name)
    return stretched.with_values(whole, {"a": a, "b": b, **beside}) if beside else whole


# Updates of expert stacks from files that do not say which parameter, or which way round.
#
# PEFT stores an update of a parameter with `in` and `out` but without the parameter's shape. A
# stack [E, out, in] is *straight*; a module that PEFT calls `is_transposed` has [E, in, out]. All
# stacks of one module lie the same way. `place` takes every reading that fits the base's shapes and
# goes on only where all of them agree.


Shapes = Callable[[str], tuple[int, ...] | None]
Reading = tuple[tuple[str, ...], bool]
"""(the parameter of each entry, True where stacks are [E, in, out])."""


def place(
    entries: Mapping[str, Entry],
    shape_of: Shapes,
    order: Sequence[str] | None = None,
    *,
    turned: bool | None = None,
) -> dict[str, Entry]:
    """The entries with stacks of experts under their own names, each with its Layout.

    This is no rule of `lora_fx.targets.names`: the file has no name for a stack, and the shapes of
    all updates of a module together say which is which.

    What a binder does with updates whose op is experts: call this before it matches keys.

    Args:
        entries: The entries of an unbound adapter.
        shape_of: Stored shape of a parameter by the adapter's name for it; None where the base has
            none.
        order: Names in the order in which the model defines them, where that is known; the first
            of two parameters of a module is the innermost in PEFT's file.
        turned: Stacks are [E, in, out] (True) or [E, out, in] (False), where that is known from
            elsewhere; it decides only where the shapes allow both.

    Raises:
        LoraFxError: No reading fits the shapes, or more than one does.
    """
    result = dict(entries)
    modules: dict[str, dict[str, LowRank]] = {}
    for key, entry in entries.items():
        if isinstance(entry, LowRank) and entry.origin.op == "experts" and not entry.layout:
            layer = entry.origin.layer
            module = layer.module if layer else ""
            modules.setdefault(module or key.rpartition(".")[0], {})[key] = entry
    for module, lows in modules.items():
        if not any(shape_of(name) for name in _names(module, lows)):
            continue  # the binder says which names the base lacks
        found = list(_readings(module, lows, shape_of))
        if turned is not None:
            found = [reading for reading in found if reading[1] == turned] or found
        names, way = _only(module, [*lows.values()], found, order)
        placed: dict[str, tuple[str, Entry]] = {}
        for (key, low), name in zip(lows.items(), names, strict=True):
            shape = shape_of(name)
            assert shape is not None  # _readings saw it
            placed[key] = (name, _placed(low, name, shape, way))
        # In place, so that the order of the file is kept.
        result = dict(placed.get(k, (k, v)) for k, v in result.items())
    return result


def _names(module: str, lows: Updates) -> set[str]:
    """Every name that an entry may mean."""
    maybe = (
        {f"{module}.{leaf}" for leaf in low.origin.candidates} or {key} for key, low in lows.items()
    )
    return set[str]().union(*maybe)


def _readings(module: str, lows: Updates, shape_of: Shapes) -> Iterator[Reading]:
    for way in permutations(sorted(_names(module, lows)), len(lows)):
        named = list(zip(lows, lows.values(), way, strict=True))
        if any(not low.origin.candidates and key != name for key, low, name in named):
            continue
        stacked = any(len(shape_of(name) or ()) == 3 for name in way)
        for turned in (False, True) if stacked else (False,):
            if all(_fits(low, name, shape_of(name), turned) for _, low, name in named):
                yield way, turned


def _fits(low: LowRank, name: str, shape: tuple[int, ...] | None, turned: bool) -> bool:
    """True where an update can be one of a parameter of this shape."""
    told: tuple[int, float] | None = (low.rank, low.alpha)
    if candidates := low.origin.candidates:
        told = candidates.get(name.rpartition(".")[2])
    if shape is None or told is None or len(shape) not in (2, 3):
        return False
    rows = low.a.shape[-2] * (low.a.shape[0] if low.a.ndim == 3 else 1)
    out, in_ = low.b.shape[-2], low.a.shape[-1]
    experts = shape[0] if len(shape) == 3 else 1
    sides = (in_, out) if turned and len(shape) == 3 else (out, in_)
    return rows == told[0] * experts and shape[-2:] == sides


def _only(
    module: str, lows: Sequence[LowRank], found: list[Reading], order: Sequence[str] | None
) -> Reading:
    """The one reading, or what to say."""
    if order is not None and len({names for names, _ in found}) > 1:
        at = {name: i for i, name in enumerate(order)}
        # Depth 0 is the outermost, which PEFT wrapped last.
        layers = [low.origin.layer for low in lows]
        depth = [layer.depth if layer else 0 for layer in layers]
        found = [
            (names, turned)
            for names, turned in found
            if [n for _, n in sorted(zip(depth, names, strict=True), reverse=True)]
            == sorted(names, key=lambda n: at.get(n, 0))
        ]
    shapes = ", ".join(f"A {list(low.a.shape)} and B {list(low.b.shape)}" for low in lows)
    if not found:
        raise MisfitError(
            f"the updates of the parameters of {module!r} ({shapes}) fit no parameter of the base"
        )
    if len({names for names, _ in found}) > 1:
        raise LoraFxError(
            f"the updates of the parameters of {module!r} ({shapes}) fit "
            f"{' and '.join(found[0][0])} in more than one order; PEFT's file does not say which",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    if len(found) > 1:
        raise LoraFxError(
            f"the experts of {module!r} are square ({shapes}); PEFT's file does not say whether "
            "they are stored [out, in] or [in, out]",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    return found[0]


def _placed(low: LowRank, name: str, shape: tuple[int, ...], turned: bool) -> LowRank:
    """An update with a, b, alpha and Layout of its parameter."""
    a, b, alpha = low.a, low.b, low.alpha
    if candidates := low.origin.candidates:
        alpha = candidates[name.rpartition(".")[2]][1]
    origin = replace(low.origin, layer=None)
    if len(shape) == 2:
        return replace(low, a=a, b=b, alpha=alpha, layout=plain_layout(shape), origin=origin)
    if a.ndim == 2:
        a, b = unpacked(a, b, len(a) // shape[0])
    out, in_ = ((2,), (1,)) if turned else ((1,), (2,))
    layout = Layout(shape, (0,), out, in_, shape)
    return replace(low, a=a, b=b, alpha=alpha, layout=layout, origin=origin)


def unpacked(a: Array, b: Array, rank: int) -> Factors:
    """Factors [E, r, in] and [E, out, r] from PEFT's [r·E, in] and [out, r·E], expert fastest."""
    stack = a.reshape(-1, rank, a.shape[-1])
    return stack, np.ascontiguousarray(b.reshape(len(b), rank, -1).transpose(2, 0, 1))


# Updates of the experts of a mixture, between the layouts in which files have them.
#
# In memory an update of a stack is `a` [E, r, in] and `b` [E, out, r]; of one expert, or of one
# half of gate and up, it is a part of that:
#
#     fused → split    b's rows of gate with all of a, and b's rows of up with all of a
#     split → fused    a = [a_gate; a_up], b = diag(b_gate, b_up), the rank of both; where a_gate
#                      and a_up are equal, that a and [b_gate; b_up]
#
# Each takes back what the other did, bit by bit: a b that is such a diag is split into its blocks.
# Nothing is rounded. What a file does not say, and shapes do not tell, `Family` has by model_type.


GATE_UP, DOWN = "gate_up_proj", "down_proj"
_LEAVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, DOWN: 2, "w2": 2, GATE_UP: 3}
_EXPERTS = re.compile(
    r"(?P<module>(?:.+\.)?experts)\.(?:(?P<n>\d{1,9})\.)?"
    rf"(?P<leaf>{'|'.join(_LEAVES)})(?:\.weight)?"
)


_SPARSE = "block_sparse_moe"
_TELL = "--base FOLDER has the model; or --model-type TYPE, as its config.json has it"


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

    @property
    def listed(self) -> bool:
        """True for one of FAMILIES; all others keep their experts as most models do."""
        return self in FAMILIES

    def peft_turns(self, version: str) -> bool | None:
        """How a release of PEFT takes a stack [E, …, …]: True for [E, in, out], None if not known.

        Until 0.18 that was every stack, in 0.19.0 those of modules without `is_transposed`, since
        0.19.1 those with it. `in` is what A [r·E, in] goes over. Sources:
        `lora.ParamWrapper.__init__` of 0.18.1, `update_layer` of 0.19.0, 0.19.1, 0.20.0 and 0.21.2.
        """
        found = re.match(r"0\.(\d+)\.?(\d*)", version)
        if found is None:  # before 0.18, or edited
            return True if self.marked else None
        release = int(found[1]), int(found[2] or 0)
        return release < (19, 0) or self.marked != (release == (19, 0))


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
IN_OUT_EXPERTS = frozenset(t for family in FAMILIES if family.transposed for t in family.types)
"""model_type of models whose expert stacks are [experts, in, out]."""


def experts_of(config: JsonView) -> int:
    """How many experts a layer of a model has, by its config.json; 0 where that does not say."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[n] for n in names if is_whole(config.get(n))), 0)


def family_of(types: Iterable[str]) -> Family | None:
    """The family of a model by its model_type and those of its parts; None where it has none."""
    kinds = frozenset(types)
    named = (family for family in FAMILIES if family.types & kinds)
    return next(named, Family(kinds) if kinds else None)


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


# Stacks → one by one.


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
