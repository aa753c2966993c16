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
from collections.abc import Iterable, Sequence

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
    texts = [selectors] if isinstance(selectors, str) else list(selectors)
    result: list[str] = []
    for text in texts:
        if text.startswith("re:"):
            result.append(text)
            continue
        pieces = re.split(r",(?![^\[]*\])", text)
        result += [piece.strip() for piece in pieces if piece.strip()]
    return result


def select(found: Found, selectors: str | Sequence[str]) -> list[str]:
    """Keys of what any selector names, in definition order: targets, their parts and uses."""
    regexes.begin("selectors")
    sites_by_target: dict[str, list[Site]] = {}  # the uses that are named, for one update of them
    keys_within: dict[str, None] = {}  # parts and uses, for an update each
    for text in split(selectors):
        named_sites = _named_sites(found.targets, text)
        named_within = _named_within(found.targets, text)
        if not named_sites and not named_within:  # refused unless a selector means it
            named_sites = _named_sites(found.optional, text)
        if not named_sites and not named_within:
            raise _matches_nothing(text, found)
        for key, sites in named_sites.items():
            sites_by_target.setdefault(key, []).extend(sites)
        keys_within |= dict.fromkeys(named_within)

    keys: dict[str, None] = {}
    for target in (*found.targets, *found.optional):
        if target.key in sites_by_target:
            keys |= dict.fromkeys(target.keys_of(sites_by_target[target.key]))
        for key in keys_within:
            if base_name(key) == target.parameter.name:
                keys[key] = None
    uncovered = [key for key in keys if not _is_covered_by_uses(key, keys, found)]
    return _outermost(uncovered, found)


def _named_sites(targets: Iterable[Target], text: str) -> dict[str, Sequence[Site]]:
    """Key of each target that one selector names → its uses that are meant."""
    sites_by_key = {}
    for target in targets:
        sites = _match(target, text)
        if sites is not None:
            sites_by_key[target.key] = sites
    return sites_by_key


def _named_within(targets: Iterable[Target], text: str) -> list[str]:
    """Keys of the parts and of the uses that one selector names for an update each."""
    keys: list[str] = []
    for target in targets:
        keys += _parts(target, text)
        keys += _uses(target, text)
    return keys


def _matches_nothing(text: str, found: Found) -> LoraFxError:
    """The error for a selector that names no target; adds the reason if the name is refused."""
    why = ""
    for refusal in found.refusals:
        if refusal.key in (text, f"{text}.weight"):
            why = f": {refusal.reason}"
            break
    return LoraFxError(f"selector {text!r} matches no target{why}", _hint(text, found))


def _is_covered_by_uses(key: str, keys: Iterable[str], found: Found) -> bool:
    """True for a key of all uses where keys of single uses have every one of them."""
    if split_use(key)[1]:
        return False
    covered: set[str] = set()
    for other_key in keys:
        tensor_key, use = split_use(other_key)
        if use and tensor_key == key:
            covered |= {site.id for site in found[other_key].sites}
    return bool(covered) and covered == {site.id for site in found[key].sites}


def _outermost(keys: Sequence[str], found: Found) -> list[str]:
    """The keys without those whose region lies inside another key's region."""
    regions = {key: found[key] for key in keys if not split_use(key)[1]}

    def is_within_another(key: str) -> bool:
        inner = regions[key]
        return any(outer.holds(inner) for other, outer in regions.items() if other != key)

    return [key for key in keys if key not in regions or not is_within_another(key)]


def _uses(target: Target, text: str) -> list[str]:
    """Keys of the uses of a target that one selector `ANY@USE` names for an update each.

    The glob is tried on the name of every use, then on modules, and then it is taken as a use. A
    target with this one use only has its own key.
    """
    head, at, glob = text.rpartition("@")
    if not at or text.startswith("re:"):
        return []
    if _match(target, head) is None and target.key not in _parts(target, head):
        return []

    def is_named(use: str) -> bool:
        return _suffix(use, glob) or _suffix(use.removesuffix(".weight"), glob)

    uses = [use for use in target.each_use if is_named(use)]
    if not uses:
        uses = [use for use in target.modules if is_named(use)]
    keys = []
    for use in uses or [glob]:
        target_of_use = target.of_use(use)
        if target_of_use is not None:
            has_all_uses = target_of_use.sites == target.sites
            keys.append(target.key if has_all_uses else target_of_use.key)
    return keys


def _parts(target: Target, text: str) -> list[str]:
    """Keys of a target's parts that one selector names: a role, or a region of the tensor."""
    role = text.removeprefix("role:")
    if role in ROLES:
        return [key for part_role, key in target.parts if part_role == role]
    name, region = split_region(text)
    if text.startswith("re:") or not region or _match(target, name) is None:
        return []
    target_of_region = target.part(target.parameter.name + region)
    if target_of_region is None:
        return []
    return [target_of_region.key]


def select_names(
    names: Sequence[str], selectors: str | Sequence[str], option: str = "also_train"
) -> tuple[str, ...]:
    """Parameter names, for an option: a glob on a dotted suffix of the name or of its module."""
    regexes.begin("selectors")
    chosen: dict[str, None] = {}
    for text in split(selectors):
        matches = []
        for name in names:
            module = name.rpartition(".")[0]
            if _names(text, name) or _names(text, module):
                matches.append(name)
        if not matches:
            raise LoraFxError(f"{option} {text!r} matches no parameter", _near(text, names))
        chosen.update(dict.fromkeys(matches))
    return tuple(chosen)


def _names(text: str, name: str) -> bool:
    """True where a selector names a parameter or a module of this name."""
    if text.startswith("re:"):
        return _is_in(text.removeprefix("re:"), name)
    return bool(name) and _suffix(name, text)


def _is_in(pattern: str, name: str) -> bool:
    """True where the pattern of a selector is found in a name."""
    try:
        return matched(pattern, name, "search") is not None
    except PatternError as error:
        what = f"re:{one_line(pattern, 80)} is not a regular expression: {error}"
        raise LoraFxError(what, "escape ( [ . *, use a smaller expression, or use globs") from error


def _suffix(name: str, glob: str) -> bool:
    """True when the glob matches the name or a dotted suffix of it."""
    words = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(words[i:]), glob) for i in range(len(words)))


def _match(target: Target, text: str) -> Sequence[Site] | None:
    """The uses of a target that one selector names; None where it does not name the target."""
    form, colon, value = text.partition(":")
    if colon and form == "re":
        names = (target.key, *target.parameter.aliases)
        if any(_is_in(value, name) for name in names):
            return target.sites
        return None
    if colon and form == "role":
        return _sites_of_role(target, value)
    if colon and form == "op":
        return [site for site in target.sites if site.op == value] or None
    if colon and form == "class":
        return [site for site in target.sites if site.module_class == value] or None
    if _is_called(target, text):
        return target.sites
    if text in ROLES:
        return _sites_of_role(target, text)
    return None


def _sites_of_role(target: Target, role: str) -> Sequence[Site] | None:
    """The uses of a target in a role; None where it has another role.

    Of a tensor that a lookup shares with a matmul, the embedding is the lookup alone, and every
    other role the matmul alone.
    """
    if role not in ROLES:
        raise LoraFxError(f"unknown role {role!r}", f"choose one of {', '.join(ROLES)}")
    is_lookup = role == "embedding" and "embedding" in target.uses
    if not is_lookup and target.role != role:
        return None
    if not target.tied:
        return list(target.sites)
    return [site for site in target.sites if (site.op == "embedding") == is_lookup]


def _is_called(target: Target, text: str) -> bool:
    """True where a selector is a key of the target, or a glob on a dotted suffix of a name."""
    region = target.key[len(base_name(target.key)) :]
    for name in target.parameter.names:
        short_name = name.removesuffix(".weight")
        if text == name + region or text.removesuffix(".weight") == short_name + region:
            return True
        if _suffix(short_name, text) or _suffix(name, text):
            return True
    return False


def _hint(text: str, found: Found) -> str:
    """A hint for a selector that names nothing: the classes, ops or names that exist."""
    sites: list[Site] = []
    for target in found.targets:
        sites += target.sites
    if text.startswith("class:"):
        classes = {site.module_class for site in sites} - {""}
        return f"classes: {', '.join(sorted(classes))}"
    if text.startswith("op:"):
        return f"ops: {', '.join(sorted({site.op for site in sites}))}"
    return _near(text, target_names(found))


def target_names(found: Found) -> list[str]:
    """The keys of the targets, and the aliases of their tensors."""
    names: list[str] = []
    for target in found.targets:
        names += (target.key, *target.parameter.aliases)
    return names


def _near(text: str, names: Sequence[str]) -> str:
    """A hint with the nearest names that a selector can use: modules and their last parts."""
    modules = {name.removesuffix(".weight") for name in names}
    leaves = {name.rpartition(".")[2] for name in modules}
    return near(text, sorted(modules | leaves))
