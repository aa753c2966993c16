"""Conversion of the tensors and config of a PEFT file to an Adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_fx.adapter.adapter import INVOCATION, Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError, check_format
from lora_fx.formats.peft.build_config import MODULES_OF_NAME
from lora_fx.formats.peft.config import ALORA, ORIGIN, VERSION, check_config
from lora_fx.formats.peft.layer_reader import LayerReader
from lora_fx.formats.peft.modules_to_save import heads_of, listed_whole, saved_whole
from lora_fx.formats.peft.names import groups
from lora_fx.formats.peft.own_json import own_entries
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.target_modules import target_facts
from lora_fx.text import Json, JsonView


def decode(source: PeftFile, ours: JsonView) -> Adapter:
    """Return the adapter of a file with peft_type LORA.

    Args:
        source: The file; its notes become the adapter's.
        ours: The JSON under `lora_fx` in its header; empty for files of PEFT.
    """
    source.notes.extend(check_config(source.config, source.config_file))
    reader = LayerReader(source)
    rows: object = {}
    written_metadata: object = {}
    if ours:
        check_format(ours, f"{source.name}: metadata lora_fx")
        rows = ours.get("entries")
        written_metadata = ours.get("metadata")
    if not isinstance(rows, dict) or not isinstance(written_metadata, dict):
        raise LoraFxError(
            f"{source.name}: metadata lora_fx is damaged", "convert the adapter again"
        )

    entries: dict[str, Entry] = {}
    own_entries(rows, reader, groups(source.tensors, source.name), entries)
    undescribed = {
        name: tensor for name, tensor in source.tensors.items() if name not in reader.taken
    }
    reader.add_undescribed(undescribed, entries)

    source.notes.extend(reader.ranks.notes())
    source.notes.extend(reader.alphas.notes())
    source.notes.extend(_notes_on_missing_modules(source, entries))
    metadata = _metadata(source, reader.modules, written_metadata, is_ours=bool(ours))
    return Adapter(entries, metadata)


def _notes_on_missing_modules(source: PeftFile, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yield a note on each module in modules_to_save of which the file has no tensor.

    A model has one of the heads that PEFT lists for its task. The others are missing rightly, and
    so are all of them where the config lists no module itself.
    """
    saved = [key.rpartition(".")[0] for key, entry in entries.items() if isinstance(entry, Full)]
    listed = dict.fromkeys(listed_whole(source.config))
    present = {name for name in listed if _is_any_saved(name, saved)}
    heads = set(heads_of(source.config))
    if present & heads or not source.config.get("modules_to_save"):
        expected = [name for name in listed if name not in heads]
    else:
        expected = list(listed)
    for name in expected:
        if name not in present:
            yield f"{source.name}: modules_to_save {name!r} has no tensor in the file"


def _is_any_saved(name: str, modules: list[str]) -> bool:
    """Whether PEFT saves one of these modules if modules_to_save has only this name."""
    config = {"modules_to_save": [name]}
    return any(saved_whole(config, module) for module in modules)


def _metadata(
    source: PeftFile, modules: list[str], written_metadata: JsonView, *, is_ours: bool
) -> Json:
    """Return the metadata of the adapter.

    Args:
        source: The file. Its notes stand in the metadata.
        modules: The modules with tensors.
        written_metadata: What our JSON has.
        is_ours: Whether there is JSON of ours.
    """
    config = source.config
    metadata = target_facts(config, modules, source.name, source.notes)
    if is_ours:  # which names each update, and the config names modules in full
        metadata.pop(MODULES_OF_NAME, None)
        del metadata["peft"]
        if config.get(VERSION):
            metadata["peft"] = {VERSION: config[VERSION]}
    metadata |= written_metadata
    metadata |= {field: config[field] for field in ORIGIN if config.get(field)}
    if config.get("fan_in_fan_out"):
        metadata["fan_in_fan_out"] = True
    # PEFT wants lora_dropout 0 beside target_parameters
    written_dropout = metadata.get("dropout") if config.get("target_parameters") else 0.0
    metadata["dropout"] = float(config.get("lora_dropout") or written_dropout or 0.0)
    metadata.pop(INVOCATION, None)
    if config.get(ALORA):
        metadata[INVOCATION] = list(config[ALORA])
    metadata["notes"] = source.notes
    return metadata
