"""Adapters of PEFT with peft_type LOHA, LOKR or OFT."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.lycoris import loha, lokr
from lora_fx.formats.peft.config import ORIGIN, SHARED
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.peft.oft import check_oft, rotation
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.target_modules import target_facts, targets
from lora_fx.text import JsonView

KINDS = {"LOHA": "hada_", "LOKR": "lokr_", "OFT": "oft_R"}
"""PEFT's peft_type → the beginning of its tensor names."""


_KNOWN = SHARED | frozenset((
    "alpha", "bias", "block_share", "coft", "decompose_both", "decompose_factor", "eps",
    "fan_in_fan_out", "init_weights", "module_dropout", "num_cayley_neumann_terms",
    "oft_block_size", "rank_dropout", "rank_dropout_scale", "use_cayley_neumann",
    "use_effective_conv2d",
))  # fmt: skip


def read_peft(source: PeftFile, ours: JsonView) -> Adapter:
    """Return an adapter of peft_type LOHA, LOKR or OFT.

    Args:
        source: The file; its notes become the adapter's.
        ours: JSON of lora-fx in its header. Only that of LORA has entries.

    Raises:
        LoraFxError: Another tensor in the file, a factor missing, shapes that do not fit.
    """
    config = source.config
    if "entries" in ours:
        raise LoraFxError(
            f"{source.name}: metadata lora_fx together with peft_type {config['peft_type']!r}; "
            "expected 'LORA'",
            "the config was edited; save the adapter again",
        )
    _check_config(source)
    ranks = Pattern(config, "rank_pattern", "r", source.config_file)
    alphas = Pattern(config, "alpha_pattern", "alpha", source.config_file)
    tensors_of_modules = _by_module(source)
    entries: dict[str, Entry] = {}
    for module, tensors in tensors_of_modules.items():
        rank = ranks.of(module)
        alpha = alphas.of(module)
        entries[f"{module}.weight"] = _change(tensors, rank, alpha, source, module)

    source.notes.extend(ranks.notes())
    source.notes.extend(alphas.notes())
    metadata = target_facts(config, tensors_of_modules, source.name, source.notes)
    metadata |= ours.get("metadata", {})
    metadata |= {field: config[field] for field in ORIGIN if config.get(field)}
    return Adapter(entries, {**metadata, "dropout": 0.0, "notes": source.notes})


def _check_config(source: PeftFile) -> None:
    """Note unknown fields; raise for a config without the numbers that the method needs."""
    config = source.config
    for field in sorted(set(config) - _KNOWN):
        source.notes.append(f"{source.config_file}: unknown field {field!r} is ignored")
    if config["peft_type"] == "OFT":
        check_oft(source)
    elif "alpha" not in config or "r" not in config:
        raise LoraFxError(
            f"{source.config_file}: alpha or r is missing; expected both: the scale is alpha / r",
            "add the numbers that the adapter was trained with",
        )


def _by_module(source: PeftFile) -> dict[str, dict[str, Array]]:
    """Return the tensors of each module by the ends of their names, as fp32.

    Raises:
        LoraFxError: A tensor of another kind, or of a module that is no target.
    """
    peft_type = source.config["peft_type"]
    start = KINDS[peft_type]
    tensors_of_modules: dict[str, dict[str, Array]] = {}
    for name, array in source.tensors.items():
        module, _, end = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not end.startswith(start) or not module:
            raise source.error(
                name,
                f"does not belong to {peft_type}; expected only X.{start}…",
                "modules_to_save, biases and embeddings are not supported here: merge the adapter "
                "into its model with PEFT (merge_and_unload)",
            )
        if not targets(source.config, module):
            raise source.error(name, "belongs to a module that target_modules does not name")
        tensors_of_modules.setdefault(module, {})[end] = source.master(name, array)
    return tensors_of_modules


def _change(
    tensors: dict[str, Array],
    rank: float | None,
    alpha: float | None,
    source: PeftFile,
    module: str,
) -> Entry:
    """Return the change of one module."""
    peft_type = source.config["peft_type"]
    if peft_type == "OFT":
        return rotation(tensors["oft_R"], source, module)
    if peft_type == "LOKR":
        return lokr(tensors, alpha, source, module, rank)
    change = loha(tensors, alpha, source, module)
    if change.rank != rank:
        raise source.error(module, f"has rank {change.rank}; {source.config_file} has {rank:g}")
    return change
