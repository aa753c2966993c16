"""Tensors of a PEFT file besides the low-rank ones: trained tokens, biases, whole modules.

* `X.token_adapter.trainable_tokens_delta` [n, dim] holds rows of X's weight as trained (not what
  is added to them); their numbers are in trainable_token_indices of the config.
* `X.base_layer.bias` and plain `Y.bias` are trained biases of the base where bias is lora_only
  or all; PEFT adds s · (bias of B) to them where lora_bias is on as well.
* `Y.…` under no other name is a module of modules_to_save, whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeGuard

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import TRAINS
from lora_fx.formats.peft.modules_to_save import HEADS, saved_whole
from lora_fx.formats.peft.names import DELTA, OWN, PREFIX, WRAPPER, Group, unknown_name, unwrapped
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.text import JsonView, is_whole


def read_rest(
    names: Iterable[str],
    source: PeftFile,
    layers: Mapping[str, Group],
    entries: dict[str, Entry],
) -> None:
    """Add the trained tokens, biases and whole tensors under these names to `entries`.

    Args:
        names: The names of tensors that belong to no low-rank layer.
        source: The file.
        layers: Its low-rank layers.
        entries: Those of the layers; biases of B may get the trained bias beneath them.

    Raises:
        LoraFxError: A tensor that PEFT would not read, or that the config contradicts.
    """
    training_only = [
        f".{tensor}" for field, (tensor, _) in TRAINS.items() if source.config.get(field)
    ]
    for name in names:
        short = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        if any(tensor in short for tensor in training_only):
            continue
        if short.endswith(DELTA):
            module = short.removesuffix(DELTA)
            rows = _trained_rows(name, module, source)
            source.add(entries, f"{unwrapped(module)}.weight", rows, name)
        elif short.endswith(".bias") and _is_trained_bias(short, source, layers):
            _add_bias(entries, unwrapped(short), name, source)
        elif _is_whole(name, short, source, has_layers=bool(layers)):
            _add_whole(entries, short, name, source)
    _check_tokens(source, entries)


def _add_whole(entries: dict[str, Entry], short: str, name: str, source: PeftFile) -> None:
    """Add a tensor of a module that was trained whole."""
    # PEFT asked to save embeddings writes a trained one twice, under its wrapper as well.
    key = short.replace(".modules_to_save.", ".")
    # PEFT writes an unlisted one into the model's own tensor, which may have other names
    is_listed = saved_whole(source.config, short.rpartition(".")[0])
    full = replace(source.full(name), tied=not is_listed)
    previous = entries.get(key)
    if isinstance(previous, Full) and np.array_equal(previous.value, full.value):
        return
    source.add(entries, key, full, name)


def _is_trained_bias(short: str, source: PeftFile, layers: Mapping[str, Group]) -> bool:
    """True for a bias that PEFT trained; raises for one that the config denies."""
    mode = source.config.get("bias") or "none"
    module = short.removesuffix(".bias")
    if any(mark in short for mark in (".lora_", ".original_module.", ".modules_to_save.")):
        return False
    if not module.endswith(f".{WRAPPER}"):
        if mode == "all":
            return True
        is_layer = any(group.module == module for group in layers.values())
        return mode == "lora_only" and is_layer
    if mode != "none":
        return True
    if f"{PREFIX}{module}.weight" in source.tensors:
        return False  # a copy of the whole frozen layer
    raise LoraFxError(
        f"{source.name}: {PREFIX + short!r} is a trained bias of the base; expected none, because "
        f"bias is 'none' in {source.config_file}",
        "set bias to what the adapter was trained with",
    )


def _add_bias(entries: dict[str, Entry], key: str, name: str, source: PeftFile) -> None:
    """Add a trained bias of the base."""
    # PEFT trains such a bias where it is, so all names of a shared one
    trained = replace(source.full(name), tied=True)
    previous = entries.get(key)
    if isinstance(previous, Dense):  # lora_bias: PEFT adds it to the trained bias, in this order
        bias_of_b = previous.value * np.float32(previous.scale)
        entries[key] = replace(trained, value=trained.value + bias_of_b)
        return
    if isinstance(previous, Full) and np.array_equal(previous.value, trained.value):
        return  # of a module that is saved whole as well
    source.add(entries, key, trained, name)


def _trained_rows(name: str, module: str, source: PeftFile) -> ReplacedRows:
    """Trained rows of an embedding with their numbers."""
    value = source.factor(name)
    config = source.config.get("trainable_token_indices")
    if not config:
        raise LoraFxError(
            f"{source.name}: {name!r} holds rows of an embedding; expected the row numbers in "
            f"trainable_token_indices of {source.config_file}",
            "copy the config of this same adapter next to the file",
        )
    index = _indices_of(config, unwrapped(module)) if isinstance(config, dict) else config
    if not _are_row_numbers(index) or value.ndim != 2 or len(value) != len(index):
        raise LoraFxError(
            f"{source.name}: {name!r} is {list(value.shape)} and trainable_token_indices has "
            f"{index!r} for it; expected [n, dim] and n different numbers",
            f"correct {source.config_file}",
        )
    return ReplacedRows(tuple(index), value)


def _indices_of(config: JsonView, module: str) -> object:
    """The numbers that trainable_token_indices gives a module by the ends of names.

    None where no entry fits, or several that differ.
    """
    fitting = [indices for name, indices in config.items() if module.endswith(name)]
    if not fitting or any(indices != fitting[0] for indices in fitting):
        return None
    return fitting[0]


def _are_row_numbers(index: object) -> TypeGuard[list[int]]:
    """True for a list of different whole numbers from 0 up."""
    if not isinstance(index, list):
        return False
    if not all(is_whole(number) and number >= 0 for number in index):
        return False
    return len(set(index)) == len(index)


def _check_tokens(source: PeftFile, entries: Mapping[str, Entry]) -> None:
    """Raise for tokens in the config that no tensor holds; PEFT stores tied ones once."""
    config = source.config.get("trainable_token_indices")
    if not config:
        return
    stored = [list(entry.index) for entry in entries.values() if isinstance(entry, ReplacedRows)]
    if isinstance(config, dict):
        missing = [indices for indices in config.values() if indices not in stored]
    else:
        missing = [] if stored else [config]
    if missing:
        raise LoraFxError(
            f"{source.config_file}: trainable_token_indices has {missing[0]!r}; expected a tensor "
            f"X{DELTA} for them in {source.name}",
            "the file is incomplete; save or fetch it again",
        )


_ANY_HEAD = {"modules_to_save": list(itertools.chain.from_iterable(HEADS.values()))}
"""A config that lists every head that PEFT adds to modules_to_save."""


def _is_whole(name: str, short: str, source: PeftFile, *, has_layers: bool) -> bool:
    """True for a whole tensor to keep, False for one that is noted; raises for others.

    Args:
        name: The tensor's name.
        short: The name without PEFT's prefix; empty where it has none.
        source: The file.
        has_layers: Whether the file has low-rank layers too.
    """
    if _is_frozen_copy(short, source):
        # PEFT stores the frozen embedding again when the embedding is a target.
        source.notes.append(f"{source.name}: {name!r} is a copy of the base weight; not read")
        return False
    module = short.rpartition(".")[0]
    if name.startswith(OWN) or ".lora_" in short or not module:
        raise unknown_name(name, source.name)
    if saved_whole(source.config, module):
        return True
    is_table = source.tensors[name].ndim == 2 and short.endswith(".weight")
    if has_layers and (is_table or saved_whole(_ANY_HEAD, module)):
        # PEFT stores resized embeddings and heads so, without listing them, beside updates.
        source.notes.append(f"{source.name}: {name!r} replaces a whole tensor of the model")
        return True
    raise unknown_name(name, source.name)


def _is_frozen_copy(short: str, source: PeftFile) -> bool:
    """True for a tensor that PEFT keeps beside a trained one: of a layer, or of a saved module."""
    if ".original_module." in short:
        return True
    module = short.rpartition(".")[0]
    if not module.endswith(f".{WRAPPER}"):
        return False
    start = f"{PREFIX}{module.removesuffix(f'.{WRAPPER}')}.lora_"
    return any(name.startswith(start) for name in source.tensors)
