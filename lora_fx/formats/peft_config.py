"""adapter_config.json of PEFT: what we write, and what we refuse to read.

PEFT's fields and their meaning are those of peft 0.21.2, `peft/tuners/lora/config.py` and
`peft/utils/other.py` (get_pattern_key). A field that changes the maths and is not supported here
is refused; a field that PEFT 0.21.2 does not know becomes a note.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.lowrank import LowRank

MERGE = "merge it into its model with PEFT (merge_and_unload) and use the merged model"
_CONVERT = (
    "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which turns it into a plain LoRA for the original weights"
)
REFUSED: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA rescales every output by a trained magnitude", MERGE),
    "alora_invocation_tokens": ("aLoRA acts only after certain tokens", "load it with PEFT"),
    "arrow_config": ("Arrow routes between adapters token by token", "load it with PEFT"),
    "kasa_config": ("KaSA cuts the base weight and adds a diagonal", MERGE),
    "monteclora_config": ("MonteCLoRA samples its factors", "load it with PEFT"),
    "use_bdlora": ("BD-LoRA stores the blocks of a block-diagonal factor", MERGE),
    "use_qalora": ("QA-LoRA pools its inputs in groups", "load it with PEFT"),
    "velora_config": ("VeLoRA compresses the activations it trains on", "load it with PEFT"),
    "layer_replication": ("layers of the base model are repeated", MERGE),
    "trainable_token_indices": ("single rows of an embedding are trained", MERGE),
    "lora_bias": ("each B has a bias", MERGE),
    "target_parameters": ("which parameter a tensor belongs to is told by nesting only", MERGE),
    "megatron_config": ("the layers are Megatron's parallel ones", MERGE),
    "ensure_weight_tying": ("one update is shared by an embedding and its head", MERGE),
}
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights as they are."""

KNOWN = frozenset(REFUSED) | frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)


def check_config(config: Mapping[str, Any], where: str) -> list[str]:
    """Notes on a config that can be read.

    Args:
        config: The JSON object.
        where: Its file, for messages.

    Raises:
        LoraFxError: A field says that the tensors mean something else than s·B·A.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoraFxError(f"{where}: peft_type is {kind!r}; expected 'LORA'", MERGE)
    for name, (why, hint) in REFUSED.items():
        value = config.get(name)
        # Not plain truth: alora_invocation_tokens and token indices may be a list with only a 0.
        if value not in (None, False, [], {}, ""):
            raise LoraFxError(f"{where}: {name} is {value!r}; expected it off: {why}", hint)
    if (config.get("bias") or "none") != "none":
        raise LoraFxError(
            f"{where}: bias is {config['bias']!r}; expected 'none': biases of the base are trained",
            MERGE,
        )
    init = config.get("init_lora_weights", True)
    if init not in _KEEPS_BASE:
        raise LoraFxError(
            f"{where}: init_lora_weights is {init!r}; expected one that keeps the base weights: "
            "this one changes them, so the adapter does not fit the original model",
            _CONVERT,
        )
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise LoraFxError(f"{where}: lora_dropout is {dropout!r}; expected a number in [0, 1)")
    if config.get("use_rslora") not in (None, True, False):
        raise LoraFxError(
            f"{where}: use_rslora is {config['use_rslora']!r}; expected true or false"
        )
    if "lora_alpha" not in config:
        raise LoraFxError(
            f"{where}: lora_alpha is missing; expected a number: the scale is lora_alpha / r",
            "add the lora_alpha that the adapter was trained with",
        )
    unknown = sorted(set(config) - KNOWN)
    return [f"{where}: unknown field {name!r} is ignored" for name in unknown]


class Pattern:
    """rank_pattern or alpha_pattern with its default: module name → number.

    PEFT takes the first pattern, in the order of the file, that matches the end of the name from
    a dot on; then a pattern that equals the name; then the default.
    """

    def __init__(self, config: Mapping[str, Any], table: str, default: str, where: str) -> None:
        """Compile the patterns of `config[table]`; the default is `config.get(default)`."""
        self.where, self.table = where, table
        given = config.get(table) or {}
        if not isinstance(given, dict):
            raise LoraFxError(f"{where}: {table} is {given!r}; expected an object")
        self.default = None if default not in config else self._number(default, config[default])
        self.numbers = {k: self._number(f"{table} {k!r}", v) for k, v in given.items()}
        self.unmatched = set(self.numbers)
        try:
            self.regexes = {k: re.compile(rf"(.*\.)?({k})$") for k in self.numbers}
        except re.error as error:
            raise LoraFxError(f"{where}: {table} holds a bad pattern: {error}") from error

    def of(self, module: str) -> float | None:
        """The number of one module; None where the config gives none."""
        hits = [k for k, regex in self.regexes.items() if regex.match(module)]
        hits += [module] if module in self.numbers else []
        self.unmatched -= set(hits)
        return self.numbers[hits[0]] if hits else self.default

    def check_matched(self) -> None:
        """Raise for a pattern that matched no module: its number would be lost in silence."""
        if self.unmatched:
            raise LoraFxError(
                f"{self.where}: {self.table} {sorted(self.unmatched)[0]!r} matches no tensor of "
                "the adapter",
                "correct the pattern or take it out",
            )

    def _number(self, what: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise LoraFxError(f"{self.where}: {what} is {value!r}; expected a number")
        return float(value)


def targets(config: Mapping[str, Any], module: str) -> bool:
    """True when PEFT would put an adapter on this module, by target_modules alone."""
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, module) is not None
        except re.error:
            return False
    return any(module == name or module.endswith(f".{name}") for name in _texts(wanted))


def listed_whole(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in modules_to_save."""
    return _texts(config.get("modules_to_save"))


def saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """True when modules_to_save lists the module or one around it (PEFT compares endings)."""
    names = listed_whole(config)
    path = module.split(".")
    return any(".".join(path[: i + 1]).endswith(names) for i in range(len(path)))


def conflicts(saved: str, module: str) -> bool:
    """True when PEFT, told to save `saved` whole, leaves out or wraps a low-rank `module`."""
    try:
        return module.endswith(saved) or bool(re.match(rf"(^|.*\.){saved}($|\..*)", module))
    except re.error:  # PEFT takes the name for a pattern, and would fail on this one
        return True


def build_config(
    modules: Mapping[str, LowRank],
    whole: Iterable[str],
    metadata: Mapping[str, Any],
    *,
    variant: str,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The config of an adapter.

    Args:
        modules: Module name → update, for every update in PEFT's own terms.
        whole: Modules that are saved whole.
        metadata: dropout, task_type, base_model_name_or_path and revision are taken from here.
        variant: lora or rslora.
        fan_in_fan_out: True when every linear weight is stored [in, out].
    """
    ranks = {name: low.rank for name, low in modules.items()}
    alphas = {name: _plain(low.alpha) for name, low in modules.items()}
    rank, alpha = _most_common(ranks.values(), 8), _most_common(alphas.values(), 8)
    config = {
        "peft_type": "LORA",
        "task_type": metadata.get("task_type"),
        "base_model_name_or_path": metadata.get("base_model_name_or_path"),
        "revision": metadata.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(k)}": v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(k)}": v for k, v in alphas.items() if v != alpha},
        "lora_dropout": float(metadata.get("dropout") or 0.0),
        "use_rslora": variant == "rslora",
        "target_modules": sorted(modules),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
    }
    exclude = _exclude(sorted(modules))
    if exclude:
        config["exclude_modules"] = exclude
    return config


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


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a list that a file should hold; nothing where it holds something else."""
    return tuple(v for v in value if isinstance(v, str) and v) if isinstance(value, list) else ()


def _most_common(values: Iterable[float], default: int) -> float:
    """The most frequent value, the smallest of several; `default` where there is none."""
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v)) if counts else default


def _plain(alpha: float) -> float:
    """An int where the number is whole: that is what PEFT writes."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)
