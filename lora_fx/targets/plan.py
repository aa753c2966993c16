"""Which targets an adapter takes, by default or by selectors, and the Plan: target → rank."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from os import PathLike, fspath

from lora_fx import regexes
from lora_fx.errors import LoraFxError, check_format, expect_file, one_line
from lora_fx.files.strict_json import read_json
from lora_fx.ir.graph import Site
from lora_fx.regexes import PatternError, matched
from lora_fx.targets.target import Found, Target, base_name, check_disjoint, split_region, split_use
from lora_fx.text import Json, JsonView, is_number, is_whole, near, plain_number, short, table

# Selectors: how users name targets. The API's list is the CLI's comma list.
#
# =============  ====================================================================
# GLOB           a dotted suffix of the key without `.weight`: q_proj, *.fc1, layers.[0-3].*
# re:REGEX       searched in the key
# class:NAME     the uses by modules of this class
# op:NAME        the uses by an op: linear, matmul, conv2d, embedding …
# role:NAME      q k v o gate up down head embedding router
# ANY@USE        of what ANY names, the uses that the glob USE names, one update each: head@*
# =============  ====================================================================
#
# A name, and any other name of a tied tensor, means all of its uses.
#
# A weight that is refused by default only (depthwise) is taken where a selector names nothing else.
# A bare word that is no name is tried as a role. A selector that matches nothing is an error.


ROLES = ("q", "k", "v", "o", "gate", "up", "down", "head", "embedding", "router")


def split(selectors: str | Sequence[str]) -> list[str]:
    """A comma list or a list of them as single selectors; regexes keep their commas."""
    given = [selectors] if isinstance(selectors, str) else list(selectors)
    result: list[str] = []
    for text in given:
        if text.startswith("re:"):
            result.append(text)
        else:
            result += [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    return result


def select(found: Found, selectors: str | Sequence[str]) -> list[str]:
    """Keys of what any selector names, in definition order: targets, their parts and uses."""
    regexes.begin("selectors")
    hits: dict[str, list[Site]] = {}  # target → the uses that are named, for one update of them
    apart: dict[str, None] = {}
    for text in split(selectors):
        named = {t.key: s for t in found.targets if (s := _match(t, text)) is not None}
        inside = [k for t in found.targets for k in (*_parts(t, text), *_uses(t, text))]
        if not named and not inside:  # refused unless a selector means it
            named = {t.key: s for t in found.optional if (s := _match(t, text)) is not None}
        for key, sites in named.items():
            hits.setdefault(key, []).extend(sites)
        apart |= dict.fromkeys(inside)
        if not named and not inside:
            reasons = (f": {r.reason}" for r in found.refusals if r.key in (text, f"{text}.weight"))
            why = next(reasons, "")
            raise LoraFxError(f"selector {text!r} matches no target{why}", _hint(text, found))
    chosen: dict[str, None] = {}
    for t in (*found.targets, *found.optional):
        if t.key in hits:
            chosen |= dict.fromkeys(t.keys_of(hits[t.key]))
        chosen |= {k: None for k in apart if base_name(k) == t.parameter.name}
    for key in [k for k in chosen if not split_use(k)[1]]:  # uses apart come before the whole
        own = [found[k] for k in chosen if split_use(k)[1] and split_use(k)[0] == key]
        if own and {s.id for t in own for s in t.sites} == {s.id for s in found[key].sites}:
            del chosen[key]
    whole = {k: found[k] for k in chosen if not split_use(k)[1]}
    inner = [k for k, t in whole.items() if any(w.holds(t) for o, w in whole.items() if o != k)]
    return [k for k in chosen if k not in inner]


def _uses(t: Target, text: str) -> list[str]:
    """Keys of the uses of a target that one selector names apart; its own key if it has one use."""
    head, at, glob = text.rpartition("@")
    known = at and not text.startswith("re:")
    if not known or (_match(t, head) is None and t.key not in _parts(t, head)):
        return []

    def hit(use: str) -> bool:
        return _suffix(use, glob) or _suffix(use.removesuffix(".weight"), glob)

    uses = [u for u in t.each_use if hit(u)] or [u for u in t.modules if hit(u)] or [glob]
    found = [one for u in uses if (one := t.of_use(u)) is not None]
    return [t.key if one.sites == t.sites else one.key for one in found]


def _parts(t: Target, text: str) -> list[str]:
    """Keys of a target's parts that one selector names: a role, or a region of the tensor."""
    role = text.removeprefix("role:")
    if role in ROLES:
        return [k for r, k in t.parts if r == role]
    name, region = split_region(text)
    if text.startswith("re:") or not region or _match(t, name) is None:
        return []
    found = t.part(t.parameter.name + region)
    return [found.key] if found is not None else []


def select_names(
    names: Sequence[str], selectors: str | Sequence[str], option: str = "also_train"
) -> tuple[str, ...]:
    """Parameter names, for an option: a glob on a dotted suffix of the name or of its module."""
    regexes.begin("selectors")
    chosen: dict[str, None] = {}
    for text in split(selectors):
        hits = [n for n in names if _names(text, n) or _names(text, n.rpartition(".")[0])]
        if not hits:
            raise LoraFxError(f"{option} {text!r} matches no parameter", _near(text, names))
        chosen.update(dict.fromkeys(hits))
    return tuple(chosen)


def _names(text: str, name: str) -> bool:
    """True where a selector names a parameter or a module of this name."""
    if text.startswith("re:"):
        return _found_by(text[3:], name)
    return bool(name) and _suffix(name, text)


def _found_by(text: str, name: str) -> bool:
    """True where the pattern of a selector is found in a name."""
    try:
        return matched(text, name, "search") is not None
    except PatternError as error:
        what = f"re:{one_line(text, 80)} is no regular expression: {error}"
        raise LoraFxError(what, "escape ( [ . *; a smaller one, or globs") from error


def _suffix(name: str, glob: str) -> bool:
    """True when the glob matches the name or a dotted suffix of it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), glob) for i in range(len(parts)))


def _match(t: Target, text: str) -> Sequence[Site] | None:
    """The uses of a target that one selector names; None where it does not name the target."""
    head, colon, rest = text.partition(":")
    if colon and head == "re":
        return t.sites if any(_found_by(rest, n) for n in (t.key, *t.parameter.aliases)) else None
    if colon and head == "role":
        if rest not in ROLES:
            raise LoraFxError(f"no role {rest!r}", f"the roles are {', '.join(ROLES)}")
        lookup = rest == "embedding" and "embedding" in t.uses
        if not lookup and t.role != rest:
            return None
        return [s for s in t.sites if not t.tied or (s.op == "embedding") == lookup]
    if colon and head in ("op", "class"):
        return [s for s in t.sites if rest == (s.op if head == "op" else s.module_class)] or None
    region = t.key[len(base_name(t.key)) :]
    for name in t.parameter.names:
        short = name.removesuffix(".weight")
        literal = text == name + region or text.removesuffix(".weight") == short + region
        if literal or _suffix(short, text) or _suffix(name, text):
            return t.sites
    return _match(t, f"role:{text}") if text in ROLES else None


def _hint(text: str, found: Found) -> str:
    names = [n for t in found.targets for n in (t.key, *t.parameter.aliases)]
    if text.startswith("class:"):
        classes = sorted({s.module_class for t in found.targets for s in t.sites} - {""})
        return f"classes: {', '.join(classes)}"
    if text.startswith("op:"):
        return f"ops: {', '.join(sorted({s.op for t in found.targets for s in t.sites}))}"
    return _near(text, names)


def _near(text: str, names: Sequence[str]) -> str:
    """A hint with the nearest of what a selector may be: names of modules, and their last parts."""
    modules = {n.removesuffix(".weight") for n in names}
    return near(text, sorted(modules | {n.rpartition(".")[2] for n in modules}))


# The default plan, and the Plan that options ask for.


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


# A plan as a file: which rank every target gets, in JSON that people read and edit.
#
#     {"format": "lora-fx plan", "version": 1, "model": …, "method": …, "budget": …, "unit": …,
#      "limit": …, "used": …, "examples": …, "targets": {KEY: {"rank": 3, "alpha": 6}, …}}
#
# `targets` are what `insert` and `train` take; a target of rank 0 is left out. The other fields say
# where the ranks come from, and may be missing in a file that was written by hand.


FORMAT = "lora-fx plan"
FIELDS = {
    "format": str, "version": int, "model": str, "method": str, "budget": str, "unit": str,
    "limit": int, "used": int, "examples": int, "targets": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """One target: its rank and alpha, and what one rank costs."""

    key: str
    rank: int
    alpha: float
    cost: int


@dataclass(frozen=True)
class RankPlan:
    """Ranks under a budget.

    Attributes:
        rows: One for each target, with rank 0 where it is left out.
        method: A name of lora_fx.targets.budget.
        budget: The text that was asked for.
        unit: What costs are counted in: params or flops.
        limit: The budget in its unit.
        model: What was planned for; empty for a module.
        examples: How many examples calibration read.
        notes: What had to be said.
    """

    rows: tuple[Ranked, ...]
    method: str
    budget: str
    unit: str
    limit: int
    model: str = ""
    examples: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def used(self) -> int:
        """How much of the limit these ranks cost."""
        return sum(r.cost * r.rank for r in self.rows)

    @property
    def ranks(self) -> dict[str, Json]:
        """Key → rank and alpha: what insert takes as plan."""
        return {r.key: {"rank": r.rank, "alpha": r.alpha} for r in self.rows if r.rank}

    def to_json(self) -> Json:
        """The plan file as an object."""
        targets = {r.key: {"rank": r.rank, "alpha": plain_number(r.alpha)} for r in self.rows}
        # `version` is the number of the format; `format` was taken before it was a rule
        known = {"format": FORMAT, "version": 1, "targets": targets}
        return {name: known[name] if name in known else getattr(self, name) for name in FIELDS}

    def text(self) -> str:
        """The file's text, a target a line."""
        whole = self.to_json()
        rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in whole.pop("targets").items()]
        head = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in whole.items()]
        return "\n".join(["{", *head, '  "targets": {', ",\n".join(rows), "  }", "}", ""])

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the file, all of it or nothing."""
        from lora_fx.files.atomic import replacing

        with replacing(fspath(path), force=force) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    def __str__(self) -> str:
        """A table for people: key, rank, alpha and cost."""
        rows = [(r.key, str(r.rank), f"{r.alpha:g}", str(r.cost * r.rank)) for r in self.rows]
        lines = table([("key", "rank", "alpha", self.unit), *rows])
        kept = [r.rank for r in self.rows if r.rank]
        lines.append(
            f"{self.method}: {len(kept)} of {len(self.rows)} targets, ranks {min(kept)} to "
            f"{max(kept)}; {self.used} of {self.limit} {self.unit} used "
            f"({self.used / self.limit:.1%})"
        )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


GivenRanks = RankPlan | str | PathLike[str] | JsonView
"""What insert takes as plan: key → rank or {rank, alpha}, or a file of it."""


def given_ranks(plan: GivenRanks | None) -> tuple[JsonView | None, str]:
    """(key → rank or {rank, alpha}, what to call it in an error) of what insert takes as plan."""
    if isinstance(plan, RankPlan):
        return plan.ranks, "the plan"
    if isinstance(plan, (str, PathLike)):
        return read_plan(plan), fspath(plan)
    if plan is None:
        return None, "the plan"
    if not isinstance(plan, Mapping):
        raise LoraFxError(
            f"the plan is of type {type(plan).__name__}; expected {{key: rank}}, the path of a "
            "plan file, or what lora_fx.plan returns",
            OWN_PLAN,
        )
    return {key: _row_of(key, value) for key, value in plan.items()}, "the plan"


OWN_PLAN = "for example {'fc.weight': 8}, or {'fc.weight': {'rank': 8, 'alpha': 16}}"


def _row_of(key: str, value: object) -> Json:
    """The rank and the alpha of a key, of what a user wrote in Python: numpy's numbers are taken.

    Raises:
        LoraFxError: Something else than a whole rank and a number.
    """
    row = value if isinstance(value, Mapping) else {"rank": value}
    if unknown := sorted(set(row) - {"rank", "alpha"}):
        raise LoraFxError(f"the plan has {unknown[0]!r} of {key!r}; it is not known", OWN_PLAN)
    checked: Json = {}
    if "rank" in row:
        rank = row["rank"]
        if not isinstance(rank, Integral) or isinstance(rank, bool):
            raise LoraFxError(
                f"the plan: the rank of {key!r} is {_shown(rank)}; expected a whole number",
                OWN_PLAN,
            )
        checked["rank"] = int(rank)
    alpha = row.get("alpha")
    if alpha is not None:
        if not isinstance(alpha, Real) or isinstance(alpha, bool):
            raise LoraFxError(
                f"the plan: the alpha of {key!r} is {_shown(alpha)}; expected a number", OWN_PLAN
            )
        checked["alpha"] = float(alpha)
    return checked


def _shown(value: object) -> str:
    """A short value as Python writes it; of another the name of its class."""
    plain = value is None or isinstance(value, (str, int, float))
    return repr(value) if plain else f"of type {type(value).__name__}"


def read_plan(path: str | PathLike[str]) -> dict[str, Json]:
    """Key → rank and alpha of a plan file; targets of rank 0 are left out.

    Raises:
        LoraFxError: No such file, no JSON, a field or a value that no plan has.
    """
    where = fspath(path)
    expect_file(where, "lora-fx plan MODEL DATA -o FILE writes one")
    data = read_json(where, hint="write it again")
    if not isinstance(data.get("targets"), dict):
        raise LoraFxError(f"{where} is no plan: it has no targets", "lora-fx plan writes one")
    for name, value in data.items():
        if name not in FIELDS:
            raise LoraFxError(f"{where}: no field {name!r} in a plan", near(name, FIELDS))
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            kind = FIELDS[name].__name__
            raise LoraFxError(f"{where}: {name} is {value!r}, expected {kind}", "correct the file")
    if data.get("format", FORMAT) != FORMAT:
        raise LoraFxError(
            f"{where}: a file of {data['format']!r}; expected {FORMAT!r}", "write the plan again"
        )
    check_format({"format": data.get("version", 1)}, where)
    found = {key: _entry(where, key, value) for key, value in data["targets"].items()}
    kept = {key: entry for key, entry in found.items() if entry["rank"]}
    if not kept:
        raise LoraFxError(f"{where}: no target has a rank above 0", "there is nothing to adapt")
    return kept


def _entry(where: str, key: str, value: object) -> Json:
    def bad(what: str) -> LoraFxError:
        return LoraFxError(f"{where}: {what}", "correct the file")

    given = {"rank": value} if isinstance(value, int) else value
    if not isinstance(given, Mapping) or "rank" not in given or set(given) - {"rank", "alpha"}:
        raise bad(f'{key!r} is {value!r}; expected {{"rank": 8, "alpha": 16}}')
    rank, alpha = given["rank"], given.get("alpha")
    if not is_whole(rank) or rank < 0:
        raise bad(f"the rank of {key!r} is {rank!r}; expected a whole number from 0 up")
    if alpha is not None and not (is_number(alpha) and 0 <= alpha < float("inf")):
        raise bad(f"the alpha of {key!r} is {alpha!r}; expected a number")
    return {"rank": rank, **({} if alpha is None else {"alpha": float(alpha)})}


def default_alpha(rank: int) -> float:
    """The alpha where none is given, 2·rank; this is the one place that says so."""
    return 2.0 * rank
