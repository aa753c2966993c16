"""The Plan that options ask for: target → rank; and which targets are taken by default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_fx.errors import LoraFxError
from lora_fx.targets.found import Found
from lora_fx.targets.keys import split_use

# Pickles of older versions name RankPlan and Ranked in this module.
from lora_fx.targets.rank_plan import GivenRanks, given_ranks
from lora_fx.targets.rank_plan import Ranked as Ranked
from lora_fx.targets.rank_plan import RankPlan as RankPlan
from lora_fx.targets.selectors import select, select_names
from lora_fx.targets.target import Target, check_disjoint
from lora_fx.text import JsonView, is_whole, near, short

HEAD_ROWS = 1000
"""A table of fewer rows is no vocabulary: a small classifier is adapted like any other layer."""


def default_plan(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets with `default` set, and `why_not` where it is not.

    Every weight matmul except output heads, embeddings and expert routers; convolutions when
    they carry most of the weight FLOPs.
    """
    total = sum(t.flops for t in targets)
    with_conv = 2 * sum(t.flops for t in targets if t.op.startswith("conv")) > total
    result = []
    for t in targets:
        conv, large = t.op.startswith("conv"), max(t.layout.out_size, t.layout.in_size) >= HEAD_ROWS
        reasons = {
            "embedding": t.role == "embedding",
            "output head": t.role == "head" and large,
            "router": t.role == "router",
            "runs under no_grad: no gradient reaches it": t.no_grad,
            "convolutions carry less than half of the FLOPs": conv and not with_conv,
        }
        why = next((reason for reason, holds in reasons.items() if holds), "")
        result.append(replace(t, default=not why, why_not=why))
    return tuple(result)


@dataclass(frozen=True)
class Entry:
    """What one target gets."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Plan:
    """Target key → Entry, the tensors trained whole, and what had to be said on the way."""

    entries: Mapping[str, Entry]
    also_train: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    __repr__ = short


def make_plan(
    found: Found,
    names: Mapping[str, str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    also_train: str | Sequence[str] | None = None,
    ranks: GivenRanks | None = None,
) -> Plan:
    """The Plan that the options ask for.

    Args:
        found: The model's targets.
        names: Every parameter name → its first name, for also_train.
        rank: The rank of every target; capped, with a note, where one side of it is smaller.
        alpha: None means 2·rank.
        include: Selectors that replace the default plan.
        exclude: Selectors whose targets are taken away again.
        also_train: Selectors of tensors that are trained whole.
        ranks: key → rank or {rank, alpha}, a RankPlan, or the path of a plan file; these are the
            targets then, less what `exclude` takes away.

    Raises:
        LoraFxError: No target, a selector without a match, a rank that no target can hold.
    """
    if not is_whole(rank) or rank <= 0:
        raise LoraFxError(f"rank {rank!r} is not a positive whole number", "8 or 16 is usual")
    if not found.targets and not (include and found.optional):
        raise LoraFxError(
            "the model has no weight matmul that an adapter could attach to",
            "run lora-fx targets MODEL: it says what was refused and why",
        )
    whole = tuple(dict.fromkeys(names[n] for n in select_names(list(names), also_train or ())))
    ranks, where = given_ranks(ranks)
    if ranks is not None:
        if include is not None:
            raise LoraFxError(
                f"{where} names its targets, so include has no say",
                "leave it out; exclude takes targets away",
            )
        ranks = {found[k].key: v for k, v in _known(found, ranks, where).items()}
        chosen = list(ranks)
    elif include is not None:
        chosen = select(found, include)
    else:
        chosen = [k for t in found.targets if t.default for k in _default_uses(t)]
    if exclude is not None:
        gone = select(found, exclude)
        chosen = [left for k in chosen for left in _without(found, k, gone)]
    chosen = [k for k in chosen if found[k].parameter.name not in whole]
    if not chosen and not whole:
        raise LoraFxError(
            "no target is left: the default plan leaves out heads, embeddings and routers",
            "name some with include (--include '*' takes all); run lora-fx targets MODEL",
        )
    check_disjoint(found[k] for k in chosen)
    limits = {k: found[k].layout.max_rank for k in chosen}
    if chosen and ranks is None and rank > max(limits.values()):
        key = max(limits, key=lambda k: limits[k])
        raise LoraFxError(
            f"rank {rank} is above the smaller side of every target; the largest is "
            f"{limits[key]} ({key})",
            f"choose a rank of at most {limits[key]}",
        )
    entries, notes = {}, []
    for key in chosen:
        given = (ranks or {}).get(key, rank)
        asked = given if isinstance(given, Mapping) else {"rank": given}
        r, al = asked.get("rank", rank), asked.get("alpha", alpha)
        if r <= 0:
            raise LoraFxError(f"rank {r} of {key} is not a positive whole number", "8 is usual")
        if r > limits[key]:
            if ranks is not None:
                raise LoraFxError(
                    f"{where}: rank {r} of {key!r} is above its smaller side {limits[key]}",
                    "lower it in the plan",
                )
            notes.append(f"{key}: rank {r} capped to {limits[key]}, its smaller side")
            r = limits[key]
        if found[key].of_several and found[key].tied:
            uses = " and ".join(found[key].uses)
            notes.append(f"{key}: one update for {uses}; include={key + '@*'!r} gives each its own")
        al = default_alpha(r) if al is None else float(al)
        if not math.isfinite(al):
            raise LoraFxError(f"alpha {al} of {key} is no finite number", "2·rank is usual")
        entries[key] = Entry(r, al)
    return Plan(entries, whole, tuple(notes))


def _default_uses(t: Target) -> tuple[str, ...]:
    """The uses of a target that the default plan takes: a lookup has no matmul."""
    return t.keys_of([s for s in t.sites if s.op != "embedding"] if t.tied else t.sites)


def _without(found: Found, key: str, gone: Sequence[str]) -> Sequence[str]:
    """What is left of a target without what is excluded: its other parts, or its other uses."""
    t = found[key]
    left = [part for _, part in t.parts if part not in gone]
    if len(left) < len(t.parts):
        return left
    taken = {s.id for o in map(found.__getitem__, gone) if o.holds(t) for s in o.sites}
    sites = [s for s in t.sites if s.id not in taken]
    return found[split_use(key)[0]].keys_of(sites) if sites else ()


def _known(found: Found, ranks: JsonView, where: str) -> JsonView:
    for key in ranks:
        if found.get(key) is None:
            names = [n for t in found.targets for n in (t.key, *t.parameter.aliases)]
            raise LoraFxError(f"{where} names {key!r}, which is no target", near(key, names))
    return ranks


def default_alpha(rank: int) -> float:
    """The alpha where none is given, 2·rank; this is the one place that says so."""
    return 2.0 * rank
