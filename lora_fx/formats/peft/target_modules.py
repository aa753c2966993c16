"""Which modules a PEFT config says it has adapted: target_modules against a model's names.

PEFT's rules are those of peft 0.21.2, `check_target_module_exists` in tuners_utils.py. It looks
at modules and we at the names of tensors, which may be those of more modules than the adapter's
model had (a pre-training head, another tower). So a module counts as missing only where the
adapter has one beside it: in the same stack of layers, or under the same parent. Where it has
none anywhere for a name in target_modules, all that the name matches are missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_fx import regexes
from lora_fx.formats.peft.config import FIELDS, VERSION, texts_of
from lora_fx.formats.peft.modules_to_save import listed_whole, pattern_around
from lora_fx.regexes import PatternError, matched
from lora_fx.text import Json, JsonView


def targets(config: JsonView, module: str) -> bool:
    """True when PEFT would put an adapter on this module, by target_modules alone."""
    wanted = config.get("target_modules")
    try:
        return wanted in (None, "all-linear") or _named(wanted, module) is not None
    except PatternError:
        return False


def _named(wanted: object, module: str) -> str | None:
    """What names a module: a pattern as a whole, or an entry of a list that is its end."""
    if isinstance(wanted, str):
        return wanted if matched(wanted, module, "fullmatch") else None
    names = texts_of(wanted)
    return module if module in names else next((n for n in names if module.endswith(f".{n}")), None)


def untouched(config: JsonView, modules: Iterable[str]) -> list[str]:
    """The names in target_modules and target_parameters that no module with tensors answers to."""
    have = [f".{m}" for m in modules]
    named = [(n, n) for n in texts_of(config.get("target_modules"))]
    named += [(n, n.rpartition(".")[0]) for n in texts_of(config.get("target_parameters"))]
    unused = {n for n, end in named if end and not any(m.endswith(f".{end}") for m in have)}
    return sorted(unused)


_NOT_LINEAR = re.compile(
    r"(^|\.)(\w*embed(ding)?s?(_\w+)?|wte|wpe|shared|relative_attention_bias|lm_head|embed_out)$"
)


def facts(config: JsonView) -> Json:
    """The fields of a config that say which modules it adapts; JSON, for an adapter's metadata."""
    kept = {name: config[name] for name in (*FIELDS, VERSION) if config.get(name) is not None}
    whole = listed_whole(config)
    return {**kept, "modules_to_save": list(whole)} if whole else kept


def target_facts(config: JsonView, modules: Iterable[str], file: str, notes: list[str]) -> Json:
    """What an adapter's metadata keeps of the modules that a config adapts.

    Args:
        config: PEFT's.
        modules: Those with tensors in the file.
        file: Its name, for a note on targets that have none.
        notes: Get that note.
    """
    kept: Json = {"peft": facts(config)}
    if unused := untouched(config, modules):
        kept["untouched_targets"] = unused
        names = ", ".join(map(repr, unused))
        notes.append(f"{file}: the config targets {names}, of which the file has no tensor")
    return kept


def wanted_by(config: JsonView, module: str) -> str | None:
    """The entry of target_modules through which PEFT would adapt a module; None where it is not.

    >>> wanted_by({"target_modules": ["q", "v"], "layers_to_transform": [1]}, "m.layers.1.attn.q")
    'q'
    >>> wanted_by({"target_modules": ["q"], "exclude_modules": "layers.0.*"}, "layers.0.q") is None
    True
    """
    out, targets = config.get("exclude_modules"), config.get("target_modules")
    try:
        if out and _named(out, module):
            return None
        if any(matched(pattern_around(saved), module) for saved in listed_whole(config)):
            return None
        if targets == "all-linear":
            return None if _NOT_LINEAR.search(module) else "all-linear"
        name = _named(targets, module)
        by_end = isinstance(targets, list) and name != module
        return name if not by_end or _layer_is_meant(config, module) else None
    except PatternError:
        return None  # PEFT would fail on such a pattern


def _layer_is_meant(config: JsonView, module: str) -> bool:
    """False where layers_to_transform leaves the module's layer out."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    meant = layers if isinstance(layers, list) else [layers]
    for pattern in [rf"(?:^|.*?\.){n}\.(\d+)\." for n in names] or [r".*?\.[^.]*\.(\d+)\."]:
        if found := matched(pattern, module):
            return len(found[1]) < 20 and int(found[1]) in meant
    return False


def missing(config: JsonView, modules: Iterable[str], adapted: Iterable[str]) -> dict[str, str]:
    """{module that PEFT would have adapted and the adapter lacks: the entry that names it}.

    Args:
        config: PEFT's config, or the facts of it.
        modules: Those of the base with a weight of two dimensions or more, as PEFT names them.
        adapted: Modules that the adapter has an update of.

    >>> missing({"target_modules": ["q", "v"]}, ["l.0.q", "l.0.v", "l.1.q", "head.q"], ["l.0.q"])
    {'l.0.v': 'v', 'l.1.q': 'q'}
    """
    here = set(adapted)
    places = {_place(m) for m in here}
    regexes.begin("adapter_config.json")
    entries = {wanted_by(config, m) for m in here}
    wanted = {m: wanted_by(config, m) for m in modules if m not in here}
    return {
        module: entry
        for module, entry in wanted.items()
        if entry is not None and (_place(module) in places or entry not in entries)
    }


def _place(module: str) -> str:
    """The stack of layers that a module is in, or its parent.

    >>> _place("model.layers.3.attn.q"), _place("bert.pooler.dense")
    ('model.layers', 'bert.pooler')
    """
    stack = re.match(r"(.*?)(?:^|\.)\d+(?:\.|$)", module)
    return stack[1] if stack else module.rpartition(".")[0]
