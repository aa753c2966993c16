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
"""PEFT's peft_type → what its tensor names begin with."""


_KNOWN = SHARED | frozenset((
    "alpha", "bias", "block_share", "coft", "decompose_both", "decompose_factor", "eps",
    "fan_in_fan_out", "init_weights", "module_dropout", "num_cayley_neumann_terms",
    "oft_block_size", "rank_dropout", "rank_dropout_scale", "use_cayley_neumann",
    "use_effective_conv2d",
))  # fmt: skip


def read_peft(source: PeftFile, ours: JsonView) -> Adapter:
    """An adapter of PEFT's peft_type LOHA, LOKR or OFT.

    Args:
        source: The file; its notes become the adapter's.
        ours: JSON of lora-fx in its header; only LORA has one.

    Raises:
        LoraFxError: Another tensor in the file, a factor missing, shapes that do not fit.
    """
    config, file, config_file = source.config, source.name, source.config_file
    kind = KINDS[config["peft_type"]]
    if ours:
        raise LoraFxError(
            f"{file}: metadata lora_fx beside peft_type {config['peft_type']!r}; expected 'LORA'",
            "the config was edited; save the adapter again",
        )
    odd = sorted(set(config) - _KNOWN)
    source.notes.extend(f"{config_file}: unknown field {k!r} is ignored" for k in odd)
    if kind == "oft_R":
        check_oft(source)
    elif "alpha" not in config or "r" not in config:
        raise LoraFxError(
            f"{config_file}: alpha or r is missing; expected both: the scale is alpha / r",
            "add the numbers that the adapter was trained with",
        )
    ranks = Pattern(config, "rank_pattern", "r", config_file)
    alphas = Pattern(config, "alpha_pattern", "alpha", config_file)
    groups: dict[str, dict[str, Array]] = {}
    for name, array in source.tensors.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not part.startswith(kind) or not module:
            raise source.error(
                name,
                f"is not of {config['peft_type']}; expected X.{kind}… only",
                "modules_to_save, biases and embeddings beside it are not supported: merge it into "
                "its model with PEFT (merge_and_unload)",
            )
        if not targets(config, module):
            raise source.error(name, "is of a module that target_modules leaves out")
        groups.setdefault(module, {})[part] = source.master(name, array)
    entries: dict[str, Entry] = {}
    for module, parts in groups.items():
        rank, alpha = ranks.of(module), alphas.of(module)
        if kind == "oft_R":
            entries[f"{module}.weight"] = rotation(parts["oft_R"], source, module)
        elif kind == "lokr_":
            entries[f"{module}.weight"] = lokr(parts, alpha, source, module, rank)
        else:
            entries[f"{module}.weight"] = change = loha(parts, alpha, source, module)
            if change.rank != rank:
                raise source.error(module, f"has rank {change.rank}; {config_file} says {rank:g}")
    for pattern in (ranks, alphas):
        source.notes.extend(pattern.notes())
    metadata = {field: config[field] for field in ORIGIN if config.get(field)}
    metadata |= target_facts(config, groups, file, source.notes)
    return Adapter(entries, {**metadata, "dropout": 0.0, "notes": source.notes})
