"""The fields of PEFT's adapter_config.json: their meaning, and the values that are refused.

PEFT's fields and their meaning are those of peft 0.21.2, `peft/tuners/lora/config.py` and
`peft/utils/other.py` (get_pattern_key). A field that changes the maths and is not supported here
is refused; a field that PEFT 0.21.2 does not know becomes a note.
"""

from __future__ import annotations

import numpy as np

from lora_fx.adapter.invocation import checked
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.text import JsonView, is_whole

MERGE = "merge it into its model with PEFT (merge_and_unload) and use the merged model"
_CONVERT = (
    "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which turns it into a plain LoRA for the original weights"
)
REFUSED: dict[str, tuple[str, str]] = {
    "arrow_config": ("Arrow routes between adapters token by token", "load it with PEFT"),
    "layer_replication": ("layers of the base model are repeated", MERGE),
    "megatron_config": ("the layers are Megatron's parallel ones", MERGE),
}
TRAINS = {
    "monteclora_config": ("lora_monteclora_sampler", "MonteCLoRA samples its factors in training"),
    "velora_config": ("lora_velora_embed", "VeLoRA compresses what it keeps for backward"),
}
"""Fields that act only in training, with tensors that nothing else needs: PEFT itself merges
such an adapter as W + s·B·A."""
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights unchanged, as true, false and null do."""
REDONE = ("pissa", "olora")
"""Values that change the base in a way that `lora_fx.adapter.residual` recomputes from the base
alone."""
KASA = {"beta": 1e-4, "gamma": 1e-3}
"""The kasa_config that lora-fx writes: PEFT's defaults, for a loss that users may add."""
_NOT_REDONE = {
    "pissa_niter_": "its fast SVD starts from random numbers",
    "corda": "the subtracted part depends on training data",
    "lora_ga": "the subtracted part depends on gradients of training data",
    "loftq": "it quantised the weights",
}
_LISTS = ("target_parameters", "modules_to_save")
_FLAGS = (
    "use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying",
)  # fmt: skip
_NOT_WITH_ALORA = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
GROUP = 16
"""PEFT's default of qalora_group_size."""
FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
"""Fields on which modules are adapted; readers keep them in metadata["peft"]."""
VERSION = "peft_version"
"""Another field in metadata["peft"]: PEFT's reading of expert stacks depends on the version."""

ORIGIN = ("task_type", "base_model_name_or_path", "revision")
"""Fields that adapter metadata has too: the task, and the base model."""
SHARED = frozenset((
    *FIELDS, VERSION, *ORIGIN, "alpha_pattern", "auto_mapping", "inference_mode", "peft_type", "r",
    "rank_pattern",
))  # fmt: skip
"""Fields that LORA, LOHA and LOKR configs have in common."""
ALORA = "alora_invocation_tokens"
"""The tokens from which on the adapter acts; for LoRA on linear layers without another variant."""
KNOWN = SHARED | frozenset((
    ALORA, *REFUSED, *TRAINS, *_LISTS, *_FLAGS, "bias", "corda_config", "eva_config",
    "init_lora_weights",
    "kasa_config", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "trainable_token_indices", "use_bdlora",
))  # fmt: skip


def check_config(config: JsonView, where: str) -> list[str]:
    """Check a config and return notes about it.

    Args:
        config: The JSON object.
        where: Its file, for messages.

    Raises:
        LoraFxError: A field gives the tensors another meaning than s·B·A.
    """
    _check_supported(config, where)
    _check_types(config, where)
    if config.get("use_dora") and config.get("lora_bias"):
        raise LoraFxError(
            f"{where}: use_dora and lora_bias are both true; expected one of them, as PEFT does",
            "correct the flags to what the adapter was trained with",
        )
    _check_init(config, where)
    if config.get("use_qalora"):
        _check_groups(config, where)
    if config.get(ALORA):
        _check_invocation(config, where)
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise wrong_field(f"{where}: lora_dropout is {dropout!r}; expected a number in [0, 1)")
    if "lora_alpha" not in config:
        raise LoraFxError(
            f"{where}: lora_alpha is missing; expected a number: the scale is lora_alpha / r",
            "add the lora_alpha that the adapter was trained with",
        )
    unknown = sorted(set(config) - KNOWN)
    notes = [f"{where}: unknown field {name!r} is ignored" for name in unknown]
    for name, (_, why) in TRAINS.items():
        if config.get(name):
            notes.append(f"{where}: {name}: {why}; read as W + s·B·A")
    return notes


def _check_supported(config: JsonView, where: str) -> None:
    """Raise for a field that is on and changes the maths."""
    for name, (why, hint) in REFUSED.items():
        value = config.get(name)
        # Not plain truth: a list may have only a 0.
        if value not in (None, False, [], {}, ""):
            raise LoraFxError(f"{where}: {name} is {value!r}; expected no {name}: {why}", hint)


def _check_types(config: JsonView, where: str) -> None:
    """Raise for a mode, a list of names or a flag with a value of another type."""
    if (config.get("bias") or "none") not in ("none", "all", "lora_only"):
        raise wrong_field(
            f"{where}: bias is {config['bias']!r}; expected 'none', 'all' or 'lora_only'"
        )
    for name in _LISTS:
        value = config.get(name)
        if value is not None and not _are_names(value):
            raise wrong_field(f"{where}: {name} is {value!r}; expected a list of names")
    for flag in _FLAGS:
        if config.get(flag) not in (None, True, False):
            raise wrong_field(f"{where}: {flag} is {config[flag]!r}; expected true or false")


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(texts_of(value)) == len(value)


def _check_groups(config: JsonView, where: str) -> None:
    """Raise for a QA-LoRA config that PEFT does not support."""
    size = config.get("qalora_group_size", GROUP)
    if not is_whole(size) or size < 1:
        raise wrong_field(
            f"{where}: qalora_group_size is {size!r}; expected a whole number from 1 up"
        )
    flags = [name for name in ("use_dora", "use_bdlora") if config.get(name)]
    other = mutation(config) or next(iter(flags), "")
    if other:
        raise wrong_field(f"{where}: use_qalora and {other}; expected one of them, as PEFT does")


def _check_invocation(config: JsonView, where: str) -> None:
    """Raise for wrong tokens, and for what acts on every token beside them.

    PEFT has no layer for another variant with invocation tokens (`resolve_lora_variant`). A
    changed base and biases of B act before the invocation, too.
    """
    checked(config[ALORA], f"{where}: {ALORA}")
    flags = [name for name in _NOT_WITH_ALORA if config.get(name)]
    other = next(iter(flags), "") or mutation(config)
    if other:
        raise wrong_field(f"{where}: {ALORA} and {other}; expected one of them, as PEFT does")


WIDEST = 1 << 24
"""The most elements of A after QA-LoRA's groups are expanded: rank 256 of 65,536 inputs."""


def group_of(config: JsonView, a: Array, where: str) -> int:
    """Return the group size that QA-LoRA uses on an adapter's linear layers; 0 for none.

    Args:
        config: PEFT's.
        a: [rank, in/group].
        where: The file and the tensor, for messages.

    Raises:
        LoraFxError: A group so large that A, with a column for each input, fits no real layer.
    """
    if not config.get("use_qalora"):
        return 0
    size = config.get("qalora_group_size", GROUP)
    if not is_whole(size):
        return 0
    if size * a.size > WIDEST:
        raise wrong_field(
            f"{where} is {list(a.shape)} for groups of {size} inputs (qalora_group_size); "
            f"expected at most {WIDEST} elements with one column for each input"
        )
    return size


def wrong_field(what: str) -> LoraFxError:
    """Return an error for a field with a value that PEFT does not write."""
    return LoraFxError(what, "correct the file, or save the adapter again with PEFT")


def mutation(config: JsonView) -> str:
    """Return pissa, olora or kasa, if PEFT subtracted a part of linear base weights; else empty."""
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    if name in REDONE:
        return name
    return "kasa" if config.get("kasa_config") else ""


def whole_factor(config: JsonView, module: str, half: str, stored: Array, where: str) -> Array:
    """Return a BD-LoRA factor as a full block-diagonal matrix; its file stacks the blocks.

    Args:
        config: PEFT's. In peft 0.21.2 a module is meant where its name holds one of the listed
            texts; see BdLoraLinearVariant.
        module: Its name.
        half: a or b.
        stored: [n·rows, columns] of n blocks; written out [n·rows, n·columns].
        where: The file, for messages.
    """
    options = config.get("use_bdlora") or {}
    if not isinstance(options, dict):
        return stored
    names = texts_of(options.get(f"target_modules_bd_{half}"))
    if not any(name in module for name in names):
        return stored

    n = options.get("nblocks")
    if type(n) is not int or n < 1 or stored.ndim != 2 or len(stored) % n:
        raise wrong_field(
            f"{where}: use_bdlora gives {n!r} blocks; expected a number that divides the "
            f"{len(stored)} rows of factor {half.upper()} of {module!r}"
        )
    rows = len(stored) // n
    columns = stored.shape[1]
    blocks = np.zeros((n, rows, n, columns), stored.dtype)
    blocks[range(n), :, range(n)] = stored.reshape(n, rows, columns)
    return blocks.reshape(n * rows, n * columns)


def _check_init(config: JsonView, where: str) -> None:
    """Raise for an initialisation that changed the base weights and cannot be repeated."""
    init = config.get("init_lora_weights", True)
    problem = f"{where}: init_lora_weights is {init!r}"
    if mutation(config) == "olora" and config.get("fan_in_fan_out"):
        raise LoraFxError(
            f"{problem} with fan_in_fan_out, where PEFT computes the QR of the transposed weight",
            MERGE,
        )
    name = str(init).lower()
    if config.get("kasa_config") and name in REDONE:
        raise LoraFxError(
            f"{problem} together with kasa_config; expected one initialisation", MERGE
        )
    if init in (True, False, None) or name in REDONE:
        return
    for prefix, why in _NOT_REDONE.items():
        if name.startswith(prefix):
            raise LoraFxError(
                f"{problem}; expected one that keeps the base weights, or {' or '.join(REDONE)}: "
                f"this one changes the weights, which cannot be repeated because {why}",
                _CONVERT,
            )
    if name not in KEEPS_BASE:
        raise LoraFxError(
            f"{problem}; expected a value of peft 0.21.2: others may change the base weights",
            _CONVERT,
        )


def texts_of(value: object) -> tuple[str, ...]:
    """Return the texts of a list from a file; empty for any other value."""
    if not isinstance(value, list):
        return ()
    return tuple(text for text in value if isinstance(text, str) and text)
