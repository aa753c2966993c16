"""What find saw of a model (targets, refusals, parameters out of reach), and selectors of it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, near
from lora_fx.ir.graph import Site
from lora_fx.targets.regions import contains, each_use, keys_of, modules, of_use, part, tied
from lora_fx.targets.target import ROLES, Target, base_name, split_region, split_use
from lora_fx.text import Json, html, human, some, table


@dataclass(frozen=True)
class Found:
    """What find saw of a model, in definition order.

    Attributes:
        targets: What can be adapted.
        refusals: Uses of parameters that cannot, with the reason.
        unreached: Parameters of two or more dimensions that no weight matmul uses.
        data_flops: FLOPs of the matmuls between activations, at the example's sizes.
        pinned: Dimensions that the capture had to fix.
        ranges: The sizes that the captured graph is true for; elsewhere another one is captured.
        notes: What had to be said on the way.
        optional: Weights that are refused by default only: `include` can name them.
        shapes: Stored shape by parameter name, aliases too.
    """

    targets: tuple[Target, ...]
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    data_flops: int = 0
    pinned: tuple[Any, ...] = ()
    ranges: tuple[Condition, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    optional: tuple[Target, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: str) -> Target:
        """The target of a key, of one of its aliases, of a region within it, or of one use."""
        target = self.get(key)
        if target is None:
            raise LoraFxError(f"{key!r} is no target of the model", near(key, self.by_key))
        return target

    def get(self, key: str) -> Target | None:
        """The target of a key, as by indexing; None where there is none."""
        whole = self.by_key.get(key)
        if whole is not None:
            return whole
        plain, use = split_use(key)
        if use:
            shared = self.get(plain)
            return None if shared is None else of_use(shared, use)
        if not key.endswith("]"):
            return None
        every = (part(t, key) for t in (*self.targets, *self.optional))
        return next((t for t in every if t is not None), None)

    @property
    def by_key(self) -> Mapping[str, Target]:
        """Targets by key, and by alias where the key is a whole parameter; optional ones too."""
        every = (*self.targets, *self.optional)
        names = {a: t for t in every if "[" not in t.key for a in t.parameter.aliases}
        return {**names, **{t.key: t for t in every}}

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of one forward that targets reach, that no branch does, and between activations."""
        return {
            "reached": sum(t.flops for t in self.targets),
            "refused": sum(r.flops for r in self.refusals),
            "data": self.data_flops,
        }

    @property
    def reached_share(self) -> float:
        """Share of the weight FLOPs that targets reach; 1 where no weight matmul costs any."""
        flops = self.flops
        total = flops["reached"] + flops["refused"]
        unknown = any("insert" in r.verbs for r in self.refusals)  # a product of unknown size
        return flops["reached"] / total if total else float(not unknown)

    def to_json(self) -> Json:
        """Targets, refusals, unreached, pinned and FLOPs, as docs/json.md says."""
        return {
            "targets": [t.to_json() for t in self.targets],
            "refusals": [r.to_json() for r in self.refusals],
            "unreached": [u.to_json() for u in self.unreached],
            "pinned": [p.to_json() for p in self.pinned],
            "ranges": [c.to_json() for c in self.ranges],
            "flops": self.flops,
            "reached_share": round(self.reached_share, 6),
        }

    def __repr__(self) -> str:
        """The targets and their shapes, and how much cannot be adapted."""
        shapes = [f"{t.key} {list(t.parameter.shape)}" for t in self.targets]
        return f"Found({some(shapes) or 'no target'}; {len(self.refusals)} refusals)"

    def _repr_html_(self) -> str:
        """The table of targets, for notebooks."""
        return html(f"{len(self.targets)} targets", self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("key", "op", "in", "out", "sites", "share", "role", "default")
        total = max(1, self.flops["reached"] + self.flops["refused"])
        formats = any(t.parameter.format for t in self.targets)
        head += ("format",) * formats
        rows = [
            (
                t.key,
                "+".join(t.uses),
                "×".join(map(str, (*t.layout.batch_shape, t.layout.in_size))),
                str(t.layout.out_size),
                str(len(t.sites)),
                f"{t.flops / total:6.1%}",
                t.role or "+".join(r or "?" for r, _ in t.parts),
                "yes" if t.default else f"no: {t.why_not}",
                *(f"{t.parameter.format} {t.parameter.bits or ''}".strip(),) * formats,
            )
            for t in self.targets
        ]
        return [head, *rows]

    def __str__(self) -> str:
        """A table for people."""
        total = max(1, self.flops["reached"] + self.flops["refused"])
        lines = table(self._rows()) if self.targets else ["no target"]
        if any(t.sites for t in self.targets):
            lines.append(
                f"{len(self.targets)} targets reach {self.reached_share:.1%} of the weight FLOPs "
                f"({human(self.flops['reached'])} of {human(total)}; "
                f"between activations {human(self.data_flops)})"
            )
        lines += [f"also read: {t.said}" for t in self.targets if t.said]
        coded = [r for r in self.refusals if r.verbs and "insert" not in r.verbs]
        if coded:
            more = f" and {len(coded) - 1} more" * (len(coded) > 1)
            verbs = " or ".join(coded[0].verbs)
            lines.append(f"no {verbs}, only branches: {coded[0].key}{more}: {coded[0].reason}")
        rest = [r for r in self.refusals if r not in coded]
        lines += [f"refused: {r.key} ({r.op}): {r.reason}" for r in rest]
        lines += [f"unreached: {u.key} {list(u.shape)}: {u.reason}" for u in self.unreached]
        lines += [f"pinned: {p}" for p in self.pinned]
        lines += [f"captured for: {c}" for c in self.ranges]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Refusal:
    """A use of a parameter that cannot be adapted, and why; `verbs` refuse it even by its name."""

    key: str
    op: str
    reason: str
    flops: int = 0
    verbs: tuple[str, ...] = ("insert", "attach", "fold", "merge", "export")

    def to_json(self) -> Json:
        """One row of `refusals[]`."""
        return {**vars(self), "verbs": list(self.verbs)}


@dataclass(frozen=True)
class Unreached:
    """A parameter of two or more dimensions that no weight matmul uses."""

    key: str
    shape: tuple[int, ...]
    reason: str

    def to_json(self) -> Json:
        """One row of `unreached[]`."""
        return {**vars(self), "shape": list(self.shape)}


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
            chosen |= dict.fromkeys(keys_of(t, hits[t.key]))
        chosen |= {k: None for k in apart if base_name(k) == t.parameter.name}
    for key in [k for k in chosen if not split_use(k)[1]]:  # uses apart come before the whole
        own = [found[k] for k in chosen if split_use(k)[1] and split_use(k)[0] == key]
        if own and {s.id for t in own for s in t.sites} == {s.id for s in found[key].sites}:
            del chosen[key]
    return [
        k
        for k in chosen
        if split_use(k)[1] or not any(_covers(found[o], found[k]) for o in chosen if o != k)
    ]


def _covers(whole: Target, t: Target) -> bool:
    one = whole.parameter.name == t.parameter.name and not split_use(whole.key)[1]
    return one and contains(whole.region, t.region)


def _uses(t: Target, text: str) -> list[str]:
    """Keys of the uses of a target that one selector names apart; its own key if it has one use."""
    head, at, glob = text.rpartition("@")
    known = at and not text.startswith("re:")
    if not known or (_match(t, head) is None and t.key not in _parts(t, head)):
        return []

    def hit(use: str) -> bool:
        return _suffix(use, glob) or _suffix(use.removesuffix(".weight"), glob)

    uses = [u for u in each_use(t) if hit(u)] or [u for u in modules(t) if hit(u)] or [glob]
    found = [one for u in uses if (one := of_use(t, u)) is not None]
    return [t.key if one.sites == t.sites else one.key for one in found]


def _parts(t: Target, text: str) -> list[str]:
    """Keys of a target's parts that one selector names: a role, or a region of the tensor."""
    role = text.removeprefix("role:")
    if role in ROLES:
        return [k for r, k in t.parts if r == role]
    name, region = split_region(text)
    if text.startswith("re:") or not region or _match(t, name) is None:
        return []
    found = part(t, t.parameter.name + region)
    return [found.key] if found is not None else []


def select_names(
    names: Sequence[str], selectors: str | Sequence[str], option: str = "also_train"
) -> tuple[str, ...]:
    """Parameter names, for an option: a glob on a dotted suffix of the name or of its module."""
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
        return _regex(text[3:]).search(name) is not None
    return bool(name) and _suffix(name, text)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise LoraFxError(f"re:{text} is no regular expression: {e}", "escape ( [ . *") from e


def _suffix(name: str, glob: str) -> bool:
    """True when the glob matches the name or a dotted suffix of it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), glob) for i in range(len(parts)))


def _match(t: Target, text: str) -> Sequence[Site] | None:
    """The uses of a target that one selector names; None where it does not name the target."""
    head, colon, rest = text.partition(":")
    if colon and head == "re":
        return t.sites if any(map(_regex(rest).search, (t.key, *t.parameter.aliases))) else None
    if colon and head == "role":
        if rest not in ROLES:
            raise LoraFxError(f"no role {rest!r}", f"the roles are {', '.join(ROLES)}")
        lookup = rest == "embedding" and "embedding" in t.uses
        if not lookup and t.role != rest:
            return None
        return [s for s in t.sites if not tied(t) or (s.op == "embedding") == lookup]
    if colon and head in ("op", "class"):
        return [s for s in t.sites if rest == (s.op if head == "op" else s.module_class)] or None
    region = t.key[len(base_name(t.key)) :]
    for name in (t.parameter.name, *t.parameter.aliases):
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
