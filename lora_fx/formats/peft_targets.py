"""Which modules a PEFT config says it has adapted: target_modules against a model's names.

PEFT's rules are those of peft 0.21.2, `check_target_module_exists` in tuners_utils.py. It looks at
modules and we at the names of tensors, which may be those of more modules than the adapter's model
had (a pre-training head, another tower). So a module counts as missing only where the adapter has
one beside it: in the same stack of layers, or under the same parent. Where it has none anywhere
for a name in target_modules, all that the name matches are missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
"""What of adapter_config.json decides it; readers keep these under metadata["peft"]."""
VERSION = "peft_version"
"""Kept there too: how PEFT takes stacks of experts depends on it."""
_NOT_LINEAR = re.compile(
    r"(^|\.)(\w*embed(ding)?s?(_\w+)?|wte|wpe|shared|relative_attention_bias|lm_head|embed_out)$"
)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say which modules it adapts; JSON, for an adapter's metadata."""
    return {name: config[name] for name in (*FIELDS, VERSION) if config.get(name) is not None}


def wanted_by(config: Mapping[str, Any], module: str) -> str | None:
    """The entry of target_modules through which PEFT would adapt a module; None where it is not.

    >>> wanted_by({"target_modules": ["q", "v"], "layers_to_transform": [1]}, "m.layers.1.attn.q")
    'q'
    >>> wanted_by({"target_modules": ["q"], "exclude_modules": "layers.0.*"}, "layers.0.q") is None
    True
    """
    try:
        return _wanted_by(config, module)
    except re.error:
        return None  # PEFT would fail on such a pattern


def _wanted_by(config: Mapping[str, Any], module: str) -> str | None:
    out = config.get("exclude_modules")
    if isinstance(out, str) and out and re.fullmatch(out, module):
        return None
    if isinstance(out, list) and any(_ends(module, name) for name in out):
        return None
    for name in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", module):
            return None
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if targets == "all-linear":
            return None if _NOT_LINEAR.search(module) else targets
        return targets if re.fullmatch(targets, module) else None
    if not isinstance(targets, list):
        return None
    if module in targets:
        return module
    name = next((t for t in targets if _ends(module, t)), None)
    return name if name is not None and _layer_is_meant(config, module) else None


def _ends(module: str, name: object) -> bool:
    return isinstance(name, str) and (module == name or module.endswith(f".{name}"))


def _layer_is_meant(config: Mapping[str, Any], module: str) -> bool:
    """False where layers_to_transform leaves the module's layer out."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or None
    if patterns is None:
        tries = [r".*?\.[^.]*\.(\d+)\."]
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        tries = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names]
    for pattern in tries:
        found = re.match(pattern, module)
        if found:
            meant = layers if isinstance(layers, list) else [layers]
            return int(found[1]) in meant
    return False


def missing(
    config: Mapping[str, Any], modules: Iterable[str], adapted: Iterable[str]
) -> dict[str, str]:
    """{module that PEFT would have adapted and the adapter lacks: the entry that names it}.

    Args:
        config: Of PEFT, or the facts of it.
        modules: Of the base that have a weight of two dimensions or more, as PEFT names them.
        adapted: Modules that the adapter has an update of.

    >>> missing({"target_modules": ["q", "v"]}, ["l.0.q", "l.0.v", "l.1.q", "head.q"], ["l.0.q"])
    {'l.0.v': 'v', 'l.1.q': 'q'}
    """
    here = set(adapted)
    places = {_place(m) for m in here}
    entries = {wanted_by(config, m) for m in here}
    lost = {}
    for module in modules:
        if module in here:
            continue
        entry = wanted_by(config, module)
        if entry is not None and (_place(module) in places or entry not in entries):
            lost[module] = entry
    return lost


def _place(module: str) -> str:
    """The stack of layers that a module is in, or its parent.

    >>> _place("model.layers.3.attn.q"), _place("bert.pooler.dense")
    ('model.layers', 'bert.pooler')
    """
    stack = re.match(r"(.*?)(?:^|\.)\d+(?:\.|$)", module)
    return stack[1] if stack else module.rpartition(".")[0]
