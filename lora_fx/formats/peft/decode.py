"""From the tensors and the config of a PEFT file to an Adapter."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError, check_format
from lora_fx.formats.peft.config import ORIGIN, VERSION, check_config
from lora_fx.formats.peft.layer_reader import LayerReader
from lora_fx.formats.peft.modules_to_save import heads_of, listed_whole, saved_whole
from lora_fx.formats.peft.names import groups
from lora_fx.formats.peft.own_json import own_entries
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.target_modules import target_facts
from lora_fx.text import JsonView


def decode(source: PeftFile, ours: JsonView) -> Adapter:
    """The adapter of one file with peft_type LORA.

    Args:
        source: The file; its notes become the adapter's.
        ours: The JSON under `lora_fx` in its header; empty for files of PEFT.
    """
    tensors, config, file, notes = source.tensors, source.config, source.name, source.notes
    notes += check_config(config, source.config_file)
    reader = LayerReader(source)
    if ours:
        check_format(ours, f"{file}: metadata lora_fx")
    described, told = (ours.get("entries"), ours.get("metadata")) if ours else ({}, {})
    if not isinstance(described, dict) or not isinstance(told, dict):
        raise LoraFxError(f"{file}: metadata lora_fx is damaged", "convert the adapter again")
    metadata = dict(told)
    entries: dict[str, Entry] = {}
    own_entries(described, reader, groups(tensors, file), entries)
    left = {name: value for name, value in tensors.items() if name not in reader.taken}
    reader.theirs(left, entries)
    for pattern in (reader.ranks, reader.alphas):
        notes += pattern.notes()
    whole = [k.rpartition(".")[0] for k, entry in entries.items() if isinstance(entry, Full)]
    listed = dict.fromkeys(listed_whole(config))
    there = {n for n in listed for m in whole if saved_whole({"modules_to_save": [n]}, m)}
    heads = {*heads_of(config)}
    unsaid = heads if there & heads or not config.get("modules_to_save") else set()
    for module in (m for m in listed if m not in there | unsaid):
        notes.append(f"{file}: modules_to_save {module!r} has no tensor in the file")
    metadata |= target_facts(config, reader.modules, file, notes)
    if ours:  # which names each update, and the config names modules in full
        del metadata["peft"]
        if config.get(VERSION):
            metadata["peft"] = {VERSION: config[VERSION]}
    metadata |= {field: config[field] for field in ORIGIN if config.get(field)}
    if config.get("fan_in_fan_out"):
        metadata["fan_in_fan_out"] = True
    kept = metadata.get("dropout") if config.get("target_parameters") else 0.0  # PEFT wants it 0
    metadata["dropout"] = float(config.get("lora_dropout") or kept or 0.0)
    metadata["notes"] = notes
    return Adapter(entries, metadata)
