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
from lora_fx.targets.selectors import select, select_names, target_names
from lora_fx.targets.target import Target, check_disjoint
from lora_fx.text import JsonView, is_whole, near, short

HEAD_ROWS = 1000
"""A smaller table is not a vocabulary: a small classifier is adapted like any other layer."""


def default_plan(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets with `default` set, and `why_not` where it is not.

    Every weight matmul except output heads, embeddings and expert routers; convolutions when
    they carry most of the weight FLOPs.
    """
    all_flops = sum(target.flops for target in targets)
    convolution_flops = sum(target.flops for target in targets if _is_convolution(target))
    with_convolutions = 2 * convolution_flops > all_flops
    result = []
    for target in targets:
        why_not = _why_not(target, with_convolutions)
        result.append(replace(target, default=not why_not, why_not=why_not))
    return tuple(result)


def _is_convolution(target: Target) -> bool:
    return target.op.startswith("conv")


def _why_not(target: Target, with_convolutions: bool) -> str:
    """Why the default plan leaves a target out; empty if it includes the target."""
    if target.role == "embedding":
        return "embedding"
    longer_side = max(target.layout.out_size, target.layout.in_size)
    if target.role == "head" and longer_side >= HEAD_ROWS:
        return "output head"
    if target.role == "router":
        return "router"
    if target.no_grad:
        return "runs under no_grad: no gradient reaches it"
    if _is_convolution(target) and not with_convolutions:
        return "convolutions carry less than half of the FLOPs"
    return ""


@dataclass(frozen=True)
class Entry:
    """The rank and the alpha of one target."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Plan:
    """The targets that get an update, and their ranks.

    Attributes:
        entries: Target key → rank and alpha.
        also_train: The tensors that are trained whole.
        notes: Sentences on the plan for the user, such as on a rank that was capped.
    """

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
        raise LoraFxError(f"rank {rank!r} is not a positive whole number", "for example 8 or 16")
    if not found.targets and not (include and found.optional):
        raise LoraFxError(
            "the model has no weight matmul that an adapter can attach to",
            "run lora-fx targets MODEL: it lists what is refused and why",
        )
    tensor_names = select_names(list(names), also_train or ())
    also_trained = tuple(dict.fromkeys(names[name] for name in tensor_names))
    ranks, where = given_ranks(ranks)
    if ranks is not None:
        if include is not None:
            raise LoraFxError(
                f"{where} names its targets, so include has no effect",
                "leave it out; exclude removes targets",
            )
        ranks = _by_target_key(ranks, found, where)
    keys = _included(found, include, ranks)
    if exclude is not None:
        keys = _without_excluded(keys, exclude, found)
    keys = [key for key in keys if found[key].parameter.name not in also_trained]
    if not keys and not also_trained:
        raise LoraFxError(
            "no target is left: the default plan leaves out heads, embeddings and routers",
            "name targets with include (--include '*' takes all); run lora-fx targets MODEL",
        )

    check_disjoint(found[key] for key in keys)
    targets = {key: found[key] for key in keys}
    if targets and ranks is None:
        _check_some_target_holds(rank, targets)
    entries: dict[str, Entry] = {}
    notes: list[str] = []
    for key, target in targets.items():
        row = (ranks or {}).get(key, rank)
        if not isinstance(row, Mapping):
            row = {"rank": row}
        target_rank = row.get("rank", rank)
        if target_rank <= 0:
            raise LoraFxError(
                f"rank {target_rank} of {key} is not a positive whole number", "for example 8"
            )
        limit = target.layout.max_rank
        if target_rank > limit and ranks is not None:
            raise LoraFxError(
                f"{where}: rank {target_rank} of {key!r} is larger than its smaller side {limit}",
                "lower it in the plan",
            )
        if target_rank > limit:
            notes.append(f"{key}: rank {target_rank} capped to {limit}, its smaller side")
            target_rank = limit
        if target.of_several and target.tied:
            uses = " and ".join(target.uses)
            notes.append(
                f"{key}: one update for {uses}; include={key + '@*'!r} makes one for each use"
            )
        entries[key] = Entry(target_rank, _alpha(key, target_rank, row.get("alpha", alpha)))
    return Plan(entries, also_trained, tuple(notes))


def _by_target_key(ranks: JsonView, found: Found, where: str) -> JsonView:
    """The rows of a plan under the keys of the model; raises LoraFxError for one that it lacks."""
    for key in ranks:
        if found.get(key) is None:
            hint = near(key, target_names(found))
            raise LoraFxError(f"{where} names {key!r}, which is not a target", hint)
    return {found[key].key: row for key, row in ranks.items()}


def _included(
    found: Found, include: str | Sequence[str] | None, ranks: JsonView | None
) -> list[str]:
    """The keys that a plan or `include` names, or those that are taken by default."""
    if ranks is not None:
        return list(ranks)
    if include is not None:
        return select(found, include)
    keys: list[str] = []
    for target in found.targets:
        if target.default:
            keys += _default_keys(target)
    return keys


def _default_keys(target: Target) -> tuple[str, ...]:
    """Keys of the uses of a target that the default plan takes: a lookup has no matmul."""
    if not target.tied:
        return target.keys_of(target.sites)
    return target.keys_of([site for site in target.sites if site.op != "embedding"])


def _without_excluded(keys: Sequence[str], exclude: str | Sequence[str], found: Found) -> list[str]:
    """The keys without what is excluded: of some, other parts or other uses are left."""
    excluded = select(found, exclude)
    result: list[str] = []
    for key in keys:
        result += _remainder(found[key], excluded, found)
    return result


def _remainder(target: Target, excluded: Sequence[str], found: Found) -> Sequence[str]:
    """Keys of what is left of a target: its other parts, or its other uses."""
    parts = [part for _, part in target.parts if part not in excluded]
    if len(parts) < len(target.parts):
        return parts
    excluded_sites: set[str] = set()
    for excluded_key in excluded:
        excluded_target = found[excluded_key]
        if excluded_target.holds(target):
            excluded_sites |= {site.id for site in excluded_target.sites}
    sites = [site for site in target.sites if site.id not in excluded_sites]
    if not sites:
        return ()
    target_of_all_uses = found[split_use(target.key)[0]]
    return target_of_all_uses.keys_of(sites)


def _check_some_target_holds(rank: int, targets: Mapping[str, Target]) -> None:
    """Raise where no target can have a rank."""
    limits = {key: target.layout.max_rank for key, target in targets.items()}
    key = max(limits, key=lambda key: limits[key])
    if rank > limits[key]:
        raise LoraFxError(
            f"rank {rank} is larger than the smaller side of every target; the largest is "
            f"{limits[key]} ({key})",
            f"choose a rank of at most {limits[key]}",
        )


def _alpha(key: str, rank: int, alpha: float | None) -> float:
    """The alpha of a key; raises LoraFxError for one that is not finite."""
    if alpha is None:
        alpha = default_alpha(rank)
    alpha = float(alpha)
    if not math.isfinite(alpha):
        raise LoraFxError(f"alpha {alpha} of {key} is not a finite number", "the default is 2·rank")
    return alpha


def default_alpha(rank: int) -> float:
    """The default alpha, 2·rank; it is defined only here."""
    return 2.0 * rank
