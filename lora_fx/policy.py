"""Which targets an adapter takes by default, and the Plan: target → rank and alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.lowrank import default_alpha
from lora_fx.planned import given_ranks
from lora_fx.regions import check_disjoint, rest
from lora_fx.roles import HEAD_ROWS
from lora_fx.selectors import select, select_names
from lora_fx.target import Found, Target, split_use
from lora_fx.text import near_names
from lora_fx.uses import each_use, matmul_use, own_use


def default_plan(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets with `default` set, and `why_not` where it is not.

    Every weight matmul except output heads, embeddings and expert routers; convolutions when
    they carry most of the weight FLOPs.
    """
    total = sum(t.flops for t in targets)
    conv = sum(t.flops for t in targets if t.op.startswith("conv"))
    with_conv = 2 * conv > total
    result = []
    for t in targets:
        why = ""
        if t.role == "embedding":
            why = "embedding"
        elif t.role == "head" and max(t.layout.out_size, t.layout.in_size) >= HEAD_ROWS:
            why = "output head"
        elif t.role == "router":
            why = "router"
        elif t.no_grad:
            why = "runs under no_grad: no gradient reaches it"
        elif t.op.startswith("conv") and not with_conv:
            why = "convolutions carry less than half of the FLOPs"
        result.append(replace(t, default=not why, why_not=why))
    return tuple(result)


@dataclass(frozen=True)
class Entry:
    """What one target gets. `use`: the alias through which it applies; empty for all uses."""

    rank: int
    alpha: float
    use: str = ""


@dataclass(frozen=True)
class Plan:
    """Target key → Entry, the tensors trained whole, and what had to be said on the way."""

    entries: Mapping[str, Entry]
    also_train: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_plan(
    found: Found,
    names: Mapping[str, str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    also_train: str | Sequence[str] | None = None,
    ranks: Any = None,
) -> Plan:
    """The Plan that the options ask for.

    Args:
        found: The model's targets.
        names: Every parameter name → its first name, for also_train.
        rank: For every target; capped by name where one side of a target is smaller.
        alpha: None means 2·rank.
        include: Selectors that replace the default plan.
        exclude: Selectors taken away from it.
        also_train: Tensors trained whole.
        ranks: key → rank or {rank, alpha}, a Planned, or the path of a plan file; these are the
            targets then, less what `exclude` takes away.

    Raises:
        LoraFxError: No target, a selector without a match, a rank that no target can hold.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise LoraFxError(f"rank {rank!r} is not a positive whole number", "8 or 16 is usual")
    if not found.targets and not (include and found.optional):
        raise LoraFxError(
            "the model has no weight matmul that an adapter could attach to",
            "run lora-fx targets MODEL: it says what was refused and why",
        )
    whole: tuple[str, ...] = ()
    if also_train:
        whole = tuple(dict.fromkeys(names[n] for n in select_names(list(names), also_train)))
    ranks, where = given_ranks(ranks)
    if ranks is not None:
        if include is not None:
            raise LoraFxError(
                f"{where} names its targets, so include has no say",
                "leave it out; exclude takes targets away",
            )
        ranks = {found[k].key: v for k, v in _known(found, ranks, where).items()}
        chosen = {k: own_use(k) for k in ranks}
    elif include is not None:
        chosen = select(found, include)
    else:
        chosen = {t.key: matmul_use(t) for t in found.targets if t.default}
    if exclude is not None:
        gone = select(found, exclude)
        for t in found.targets:  # without some of its parts, a fused weight is the others
            left = rest(t, gone)
            if t.key in chosen and left and len(left) < len(t.parts):
                instead = dict.fromkeys(left, chosen[t.key])
                chosen = dict(
                    item
                    for k, use in chosen.items()
                    for item in (instead.items() if k == t.key else [(k, use)])
                )
        for key in gone:
            chosen.pop(key, None)
            plain, use = split_use(key)
            if use and plain in chosen:
                raise LoraFxError(
                    f"exclude {key!r} is one use of {plain!r}, which has one update for all",
                    f"include the uses that are meant: {', '.join(each_use(found[plain]))}",
                )
            for k in [k for k in chosen if split_use(k)[0] == key]:
                del chosen[k]
    chosen = {k: use for k, use in chosen.items() if found[k].parameter.name not in whole}
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
    for key, use in chosen.items():
        r, al = _asked(key, ranks, rank, alpha)
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
        entries[key] = Entry(r, default_alpha(r) if al is None else float(al), use)
    return Plan(entries, whole, tuple(notes))


def _asked(
    key: str, ranks: Mapping[str, Any] | None, rank: int, alpha: float | None
) -> tuple[int, float | None]:
    given = (ranks or {}).get(key, rank)
    if isinstance(given, Mapping):
        return int(given.get("rank", rank)), given.get("alpha", alpha)
    return int(given), alpha


def _known(found: Found, ranks: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key in ranks:
        if found.get(key) is None:
            names = [n for t in found.targets for n in (t.key, *t.parameter.aliases)]
            raise LoraFxError(f"{where} names {key!r}, which is no target", near_names(key, names))
    return ranks
