"""The adapter_config.json that lora-fx writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from lora_fx.formats.peft.config import ORIGIN
from lora_fx.text import Json, JsonView, plain_number

MODULES_OF_NAME = "modules_of_name"
"""Of an adapter's metadata: last part of a name → how many modules of the model have it."""


def build_config(
    numbers: Mapping[str, tuple[int, float]],
    modules: Iterable[str],
    saved_modules: Iterable[str],
    metadata: JsonView,
    fields: JsonView,
) -> Json:
    """Return the config of an adapter.

    Args:
        numbers: (rank, alpha) by the name that PEFT compares with its patterns.
        modules: Names for target_modules.
        saved_modules: Modules that are saved whole.
        metadata: dropout, task_type, base_model_name_or_path and revision are taken from here,
            and how many modules of the model have a name.
        fields: More fields (use_rslora, use_dora, target_parameters …); None leaves one out.
    """
    ranks = {name: rank for name, (rank, _) in numbers.items()}
    alphas = {name: plain_number(alpha) for name, (_, alpha) in numbers.items()}
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    names = set(modules)
    whole_leaves = _whole_leaves(names, metadata.get(MODULES_OF_NAME))
    single_names = {name for name in names if name.rpartition(".")[2] not in whole_leaves}
    config: Json = {
        "peft_type": "LORA",
        **{field: metadata.get(field) for field in ORIGIN},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern_table(ranks, rank),
        "alpha_pattern": _pattern_table(alphas, alpha),
        "lora_dropout": float(metadata.get("dropout") or 0.0),
        "target_modules": sorted(single_names | whole_leaves),
        "modules_to_save": sorted(saved_modules) or None,
        "bias": "none",
        "init_lora_weights": True,
    }
    exclude_modules = _exclude(sorted(names), sorted(single_names))
    if exclude_modules:
        config["exclude_modules"] = exclude_modules
    config |= {name: value for name, value in fields.items() if value is not None}
    return config


def _pattern_table(numbers: Mapping[str, float], default: float) -> Json:
    """Return rank_pattern or alpha_pattern: the modules whose number is not the default."""
    return {f"^{re.escape(name)}": number for name, number in numbers.items() if number != default}


def _whole_leaves(names: Collection[str], modules_of_name: object) -> set[str]:
    """Return the last parts of names of which every module of the model is adapted.

    PEFT adapts all modules of such a name, so that it stands for them. A name that this adapter
    has lost a module of, since it was made, does not.
    """
    if not isinstance(modules_of_name, dict):
        return set()
    counts = Counter(name.rpartition(".")[2] for name in names)
    return {leaf for leaf, count in counts.items() if modules_of_name.get(leaf) == count}


def _exclude(modules: Sequence[str], single_names: Sequence[str]) -> str:
    """Return an exclude_modules pattern for accidental target_modules matches; empty if none.

    PEFT also adapts modules whose name ends in `.NAME`; for a NAME without dots (`head`, or `0`
    of a Sequential) such modules are likely, and may be of a class that PEFT cannot adapt.

    Args:
        modules: All that are adapted.
        single_names: Those that are named one by one.
    """
    without_dots = [re.escape(name) for name in single_names if "." not in name]
    if not without_dots:
        return ""
    any_module = "|".join(re.escape(name) for name in modules)
    any_end = "|".join(without_dots)
    return rf"(?!(?:{any_module})\Z).+\.(?:{any_end})"


def _most_common(values: Iterable[float]) -> float:
    """Return the most frequent value, the smallest of equals; PEFT's default without values."""
    counts = Counter(values)
    if not counts:
        return 8
    return min(counts, key=lambda value: (-counts[value], value))
