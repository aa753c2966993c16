"""Find layers that an adapter's config adapts and its file lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.renaming import Renaming
from lora_fx.formats.peft.target_modules import missing
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


def missing_layers_of(adapter: Adapter, rename: Renaming) -> dict[str, str]:
    """Base modules that PEFT would have adapted and the adapter lacks → their target_modules entry.

    PEFT compares target_modules with the names of the model that it was given, which are the
    file's, or those that transformers 5 makes of them. Where the adapter's own names do not tell
    which, a module counts only if both say so. Experts that the file has one by one may have been
    stacks there, and no modules; they count where the adapter has an update of one.
    """
    config = adapter.metadata.get("peft")
    if not isinstance(config, Mapping):
        return {}
    names = _names_of(adapter)
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    weights = _adaptable_weights(rename, has_experts=any(map(_EXPERT.search, adapted)))
    names_file, names_model = rename.tellers(map(base_name, names))
    if names_file == names_model:
        by_file = _missing_of(config, weights, adapted, rename, loaded=False)
        by_model = _missing_of(config, weights, adapted, rename, loaded=True)
        return {module: entry for module, entry in by_file.items() if module in by_model}
    return _missing_of(config, weights, adapted, rename, loaded=names_model)


def _names_of(adapter: Adapter) -> list[str]:
    """The keys of an adapter, and other names of the same tensors."""
    names = list(adapter.entries)
    for low in adapter.lowrank.values():
        names += [low.use, *low.origin.twins]
    return names


def _adaptable_weights(rename: Renaming, *, has_experts: bool) -> list[str]:
    """The weights of a base whose modules PEFT can adapt."""
    weights = []
    for name, info in rename.tensors.items():
        if not name.endswith(".weight") or len(info.shape) < 2:
            continue
        if has_experts or not _EXPERT.search(name):
            weights.append(name)
    return weights


def _missing_of(
    config: JsonView, weights: list[str], adapted: list[str], rename: Renaming, *, loaded: bool
) -> dict[str, str]:
    """The missing modules under the names of the file, or of the loaded model.

    Args:
        config: The adapter's, of PEFT.
        weights: Those of the base that could be adapted.
        adapted: Modules that the adapter has updates of.
        rename: The adapter's names and the base's.
        loaded: target_modules are of the names of the loaded model.
    """
    modules: dict[str, str] = {}
    for name in weights:
        module = rename.back(name, loaded=loaded).removesuffix(".weight")
        modules[module] = name.removesuffix(".weight")
    unmet = missing(config, modules, adapted)
    return {modules[module]: entry for module, entry in unmet.items()}
