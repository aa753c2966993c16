"""Selectors: how users name targets. The API's list is the CLI's comma list.

=============  ====================================================================
GLOB           a dotted suffix of the key without `.weight`: q_proj, *.fc1, layers.[0-3].*
re:REGEX       searched in the key
class:NAME     the uses by modules of this class
op:NAME        the uses by an op: linear, matmul, conv2d, embedding …
role:NAME      q k v o gate up down head embedding router
ANY@USE        of what ANY names, the uses that the glob USE names, one update each: head@*
=============  ====================================================================

A name, and any other name of a tied tensor, means all of its uses.

A weight that is refused by default only (depthwise) is taken where a selector names nothing else.
A bare word that is no name is tried as a role. A selector that matches nothing is an error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from lora_fx import regexes
from lora_fx.errors import LoraFxError, one_line
from lora_fx.ir.graph import Site
from lora_fx.regexes import PatternError, matched
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name, split_region, split_use
from lora_fx.targets.target import Target
from lora_fx.text import near

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
