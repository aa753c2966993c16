"""adapter_config.json of PEFT as we write it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lora_fx.formats.peft.config import ORIGIN
from lora_fx.text import Json, JsonView, plain_number


def build_config(
    numbers: Mapping[str, tuple[int, float]],
    modules: Iterable[str],
    whole: Iterable[str],
    metadata: JsonView,
    fields: JsonView,
) -> Json:
    """The config of an adapter.

    Args:
        numbers: (rank, alpha) by the name that PEFT compares with its patterns.
        modules: Names for target_modules.
        whole: Modules that are saved whole.
        metadata: dropout, task_type, base_model_name_or_path and revision are taken from here.
        fields: More fields (use_rslora, use_dora, target_parameters …); None leaves one out.
    """
    ranks = {name: rank for name, (rank, _) in numbers.items()}
    alphas = {name: plain_number(alpha) for name, (_, alpha) in numbers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    targets = sorted(set(modules))
    config = {
        "peft_type": "LORA",
        **{field: metadata.get(field) for field in ORIGIN},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(k)}": v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(k)}": v for k, v in alphas.items() if v != alpha},
        "lora_dropout": float(metadata.get("dropout") or 0.0),
        "target_modules": targets,
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "init_lora_weights": True,
    }
    more = {"exclude_modules": _exclude(targets) or None, **fields}
    return config | {k: v for k, v in more.items() if v is not None}


def _exclude(modules: Sequence[str]) -> str:
    """A pattern of what target_modules would match by accident, or an empty text.

    PEFT also adapts modules whose name ends in `.NAME`; for a NAME without dots (`head`, or `0`
    of a Sequential) such modules are likely, and may be of a class that PEFT cannot adapt.
    """
    short = [re.escape(name) for name in modules if "." not in name]
    if not short:
        return ""
    all_ = "|".join(re.escape(name) for name in modules)
    return rf"(?!(?:{all_})\Z).+\.(?:{'|'.join(short)})"


def _most_common(values: Iterable[float]) -> float:
    """The most frequent value, the smallest of several; PEFT's default where there is none."""
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v)) if counts else 8
