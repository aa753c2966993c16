"""The modules that a PEFT config adapts: the match of target_modules with a model's names.

PEFT's rules are those of peft 0.21.2, `check_target_module_exists` in tuners_utils.py. It looks
at modules and we at the names of tensors, which may be those of more modules than the adapter's
model had (a pre-training head, another tower). So a module counts as missing only where the
adapter has one beside it: in the same stack of layers, or under the same parent. Where it has
none anywhere for a name in target_modules, all that the name matches are missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lora_fx import regexes
from lora_fx.formats.peft.build_config import MODULES_OF_NAME
from lora_fx.formats.peft.config import FIELDS, VERSION, texts_of
from lora_fx.formats.peft.modules_to_save import listed_whole, pattern_around
from lora_fx.regexes import PatternError, matched
from lora_fx.text import Json, JsonView


def targets(config: JsonView, module: str) -> bool:
    """Whether PEFT would adapt this module, by target_modules alone."""
    target_modules = config.get("target_modules")
    if target_modules in (None, "all-linear"):
        return True
    try:
        return _entry_for(target_modules, module) is not None
    except PatternError:
        return False


def _entry_for(listed: object, module: str) -> str | None:
    """Return the entry that matches a module: a pattern, or a list item at the name's end."""
    if isinstance(listed, str):
        return listed if matched(listed, module, "fullmatch") else None
    names = texts_of(listed)
    if module in names:
        return module
    return next((name for name in names if module.endswith(f".{name}")), None)


def untouched(config: JsonView, modules: Iterable[str]) -> list[str]:
    """Return names in target_modules and target_parameters that match no module with tensors."""
    dotted_modules = [f".{module}" for module in modules]
    ends = [(name, name) for name in texts_of(config.get("target_modules"))]
    for name in texts_of(config.get("target_parameters")):
        module = name.rpartition(".")[0]
        if module:
            ends.append((name, module))
    unused = {
        name
        for name, end in ends
        if not any(module.endswith(f".{end}") for module in dotted_modules)
    }
    return sorted(unused)


_NARROWER = ("exclude_modules", "layers_to_transform", "modules_to_save")
"""Fields that leave out modules that target_modules names."""


_NOT_LINEAR = re.compile(
    r"(^|\.)(\w*embed(ding)?s?(_\w+)?|wte|wpe|shared|relative_attention_bias|lm_head|embed_out)$"
)


def facts(config: JsonView) -> Json:
    """Return the config fields on which modules are adapted, as JSON for adapter metadata."""
    fields: Json = {
        name: config[name] for name in (*FIELDS, VERSION) if config.get(name) is not None
    }
    saved = listed_whole(config)
    if saved:
        fields["modules_to_save"] = list(saved)
    return fields


def target_facts(config: JsonView, modules: Iterable[str], file: str, notes: list[str]) -> Json:
    """Return an adapter's metadata with the modules that its config adapts.

    Args:
        config: PEFT's.
        modules: Those with tensors in the file.
        file: Its name, for a note on targets that have none.
        notes: Get that note.
    """
    modules_with_tensors = list(modules)
    metadata: Json = {"peft": facts(config)}
    counts = _modules_of_name(config, modules_with_tensors)
    if counts:
        metadata[MODULES_OF_NAME] = counts
    unused = untouched(config, modules_with_tensors)
    if unused:
        metadata["untouched_targets"] = unused
        names = ", ".join(map(repr, unused))
        notes.append(f"{file}: the config targets {names}, but the file has no tensor for them")
    return metadata


def _modules_of_name(config: JsonView, modules: Iterable[str]) -> dict[str, int]:
    """Return name without dots in target_modules → how many modules of the model have it.

    PEFT adapted all modules of such a name, unless another field leaves some out; the file has
    tensors for those that it adapted.
    """
    listed = config.get("target_modules")
    if not isinstance(listed, list) or any(config.get(name) for name in _NARROWER):
        return {}
    counts = Counter(module.rpartition(".")[2] for module in modules)
    return {leaf: count for leaf, count in counts.items() if leaf in listed}


def wanted_by(config: JsonView, module: str) -> str | None:
    """Return the target_modules entry by which PEFT would adapt a module; None if there is none.

    >>> wanted_by({"target_modules": ["q", "v"], "layers_to_transform": [1]}, "m.layers.1.attn.q")
    'q'
    >>> wanted_by({"target_modules": ["q"], "exclude_modules": "layers.0.*"}, "layers.0.q") is None
    True
    """
    try:
        return _wanted_by(config, module)
    except PatternError:
        return None  # PEFT would fail on such a pattern


def _wanted_by(config: JsonView, module: str) -> str | None:
    """Return the target_modules entry by which PEFT would adapt a module.

    The first of these that holds decides:
    1. a module that exclude_modules names, or that is saved whole, is left out;
    2. "all-linear" takes every module whose name is not that of an embedding or a head;
    3. a pattern, or a list with the whole name, takes the module;
    4. a list with the end of the name takes it in the layers of layers_to_transform.

    Raises:
        PatternError: A name in the config is no pattern.
    """
    excluded = config.get("exclude_modules")
    if excluded and _entry_for(excluded, module):
        return None
    if any(matched(pattern_around(saved), module) for saved in listed_whole(config)):
        return None
    target_modules = config.get("target_modules")
    if target_modules == "all-linear":
        return None if _NOT_LINEAR.search(module) else "all-linear"
    entry = _entry_for(target_modules, module)
    is_named_by_end = isinstance(target_modules, list) and entry != module
    if is_named_by_end and not _layer_is_meant(config, module):
        return None
    return entry


def _layer_is_meant(config: JsonView, module: str) -> bool:
    """Whether layers_to_transform allows the module's layer."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or []
    if isinstance(names, str):
        names = [names]
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names]
    meant = layers if isinstance(layers, list) else [layers]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        match = matched(pattern, module)
        if match:
            number = match[1]
            return len(number) < 20 and int(number) in meant
    return False


def missing(config: JsonView, modules: Iterable[str], adapted: Iterable[str]) -> dict[str, str]:
    """Return {module that PEFT would adapt and the adapter lacks: the entry that matches it}.

    Args:
        config: PEFT's config, or its `facts`.
        modules: Those of the base with a weight of two dimensions or more, as PEFT names them.
        adapted: Modules that the adapter has an update of.

    >>> missing({"target_modules": ["q", "v"]}, ["l.0.q", "l.0.v", "l.1.q", "head.q"], ["l.0.q"])
    {'l.0.v': 'v', 'l.1.q': 'q'}
    """
    adapted_modules = set(adapted)
    adapted_places = {_place(module) for module in adapted_modules}
    regexes.begin("adapter_config.json")
    used_entries = {wanted_by(config, module) for module in adapted_modules}
    entries = {
        module: wanted_by(config, module) for module in modules if module not in adapted_modules
    }
    missing_modules = {}
    for module, entry in entries.items():
        if entry is None:
            continue
        if _place(module) in adapted_places or entry not in used_entries:
            missing_modules[module] = entry
    return missing_modules


def _place(module: str) -> str:
    """Return the stack of layers that a module is in, or its parent.

    >>> _place("model.layers.3.attn.q"), _place("bert.pooler.dense")
    ('model.layers', 'bert.pooler')
    """
    stack = re.match(r"(.*?)(?:^|\.)\d+(?:\.|$)", module)
    return stack[1] if stack else module.rpartition(".")[0]
