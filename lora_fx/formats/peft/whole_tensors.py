"""What a PEFT file holds beside low-rank tensors: trained tokens, biases, whole modules.

* `X.token_adapter.trainable_tokens_delta` [n, dim] holds rows of X's weight as trained (not what
  is added to them); their numbers are in trainable_token_indices of the config.
* `X.base_layer.bias` and plain `Y.bias` are trained biases of the base where bias is lora_only
  or all; PEFT adds s · (bias of B) to them where lora_bias is on as well.
* `Y.…` under no other name is a module of modules_to_save, whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import TRAINS
from lora_fx.formats.peft.modules_to_save import HEADS, saved_whole
from lora_fx.formats.peft.names import DELTA, OWN, PREFIX, WRAPPER, Group, unknown_name, unwrapped
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.text import is_whole


def read_rest(
    names: Iterable[str], source: PeftFile, found: Mapping[str, Group], entries: dict[str, Entry]
) -> None:
    """Add what these tensors say to `entries`.

    Args:
        names: The names of tensors that belong to no low-rank layer.
        source: The file.
        found: Its low-rank layers.
        entries: Those of the layers; biases of B may get the trained bias beneath them.

    Raises:
        LoraFxError: A tensor that PEFT would not read, or that the config contradicts.
    """
    idle = [f".{part}" for field, (part, _) in TRAINS.items() if source.config.get(field)]
    for name in names:
        short = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        if any(part in short for part in idle):
            continue
        if short.endswith(DELTA):
            module = short.removesuffix(DELTA)
            source.add(entries, f"{unwrapped(module)}.weight", _rows(name, module, source), name)
        elif short.endswith(".bias") and _is_trained_bias(short, source, found):
            # PEFT trains such a bias where it is, so all names of a shared one
            full = replace(source.full(name), tied=True)
            _add_bias(entries, unwrapped(short), full, name, source)
        elif _is_whole(name, short, source, bool(found)):
            # PEFT asked to save embeddings writes a trained one twice, under its wrapper as well.
            key = short.replace(".modules_to_save.", ".")
            # PEFT writes an unlisted one into the model's own tensor, which may have other names
            listed = saved_whole(source.config, short.rpartition(".")[0])
            full, old = replace(source.full(name), tied=not listed), entries.get(key)
            if not isinstance(old, Full) or not np.array_equal(old.value, full.value):
                source.add(entries, key, full, name)
    _check_tokens(source, entries)


def _is_trained_bias(short: str, source: PeftFile, found: Mapping[str, Group]) -> bool:
    """True for a bias that PEFT trained; raises for one that the config denies."""
    bias = source.config.get("bias") or "none"
    module = short.removesuffix(".bias")
    if ".lora_" in short or ".original_module." in short or ".modules_to_save." in short:
        return False
    if not module.endswith(f".{WRAPPER}"):
        wrapped = any(g.module == module for g in found.values())
        return bias == "all" or (bias == "lora_only" and wrapped)
    if bias == "none":
        if f"{PREFIX}{module}.weight" in source.tensors:
            return False  # a copy of the whole frozen layer
        raise LoraFxError(
            f"{source.name}: {PREFIX + short!r} is a trained bias of the base; expected none, as "
            f"bias is 'none' in {source.config_file}",
            "set bias to what the adapter was trained with",
        )
    return True


def _add_bias(entries: dict[str, Entry], key: str, full: Full, name: str, source: PeftFile) -> None:
    old = entries.get(key)
    if isinstance(old, Dense):  # lora_bias: PEFT adds it to the trained bias, in this order
        entries[key] = replace(full, value=full.value + old.value * np.float32(old.scale))
    elif isinstance(old, Full) and np.array_equal(old.value, full.value):
        return  # of a module that is saved whole as well
    else:
        source.add(entries, key, full, name)


def _rows(name: str, module: str, source: PeftFile) -> ReplacedRows:
    """Trained rows with their numbers."""
    value = source.factor(name)
    config = source.config.get("trainable_token_indices")
    if not config:
        raise LoraFxError(
            f"{source.name}: {name!r} holds rows of an embedding; expected their numbers in "
            f"trainable_token_indices of {source.config_file}",
            "put the config of this very adapter beside the file",
        )
    index = config
    if isinstance(config, dict):
        fits = [v for k, v in config.items() if unwrapped(module).endswith(k)]
        index = fits[0] if fits and all(f == fits[0] for f in fits) else None
    if (
        not isinstance(index, list)
        or not all(is_whole(i) and i >= 0 for i in index)
        or len(set(index)) != len(index)
        or value.shape[:1] != (len(index),)
        or value.ndim != 2
    ):
        raise LoraFxError(
            f"{source.name}: {name!r} is {list(value.shape)} and trainable_token_indices gives "
            f"{index!r} for it; expected [n, dim] and n different numbers",
            f"correct {source.config_file}",
        )
    return ReplacedRows(tuple(index), value)


def _check_tokens(source: PeftFile, entries: Mapping[str, Entry]) -> None:
    """Raise for tokens in the config that no tensor holds; PEFT stores tied ones once."""
    config = source.config.get("trainable_token_indices")
    if not config:
        return
    rows = [list(e.index) for e in entries.values() if isinstance(e, ReplacedRows)]
    if isinstance(config, dict):
        lost = [v for v in config.values() if v not in rows]
    else:
        lost = [] if rows else [config]
    if lost:
        raise LoraFxError(
            f"{source.config_file}: trainable_token_indices gives {lost[0]!r}; expected a tensor "
            f"X{DELTA} for them in {source.name}",
            "the file is incomplete; save or fetch it again",
        )


_ANY_HEAD = {"modules_to_save": [name for names in HEADS.values() for name in names]}


def _is_whole(name: str, short: str, source: PeftFile, low_rank: bool) -> bool:
    """True for a whole tensor to keep, False for one that is noted; raises for others."""
    module = short.rpartition(".")[0]
    value = source.tensors[name]
    outer = module.removesuffix(f".{WRAPPER}")
    frozen = outer != module and any(n.startswith(f"{PREFIX}{outer}.lora_") for n in source.tensors)
    if frozen or ".original_module." in short:
        # PEFT stores the frozen embedding again when the embedding is a target.
        source.notes.append(f"{source.name}: {name!r} is a copy of the base weight; not read")
        return False
    if not name.startswith(OWN) and ".lora_" not in short and module:
        if saved_whole(source.config, module):
            return True
        table = value.ndim == 2 and short.endswith(".weight")
        if low_rank and (table or saved_whole(_ANY_HEAD, module)):
            # PEFT stores resized embeddings and heads so, without listing them, beside updates.
            source.notes.append(f"{source.name}: {name!r} replaces a whole tensor of the model")
            return True
    raise unknown_name(name, source.name)
