"""A separate tensor for one name of a tied tensor, if an adapter saves that name alone.

PEFT's modules_to_save puts a copy of a module in the module's place, so whatever shares its tensors
keeps the old ones. The same is done here, before a capture: the model's code then reads two
tensors, and nothing that works on its graphs has to know that they were one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.bind import means_all
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.fx.dotted_names import named_tensors, owner, parameter_of
from lora_fx.fx.sharing_copy import sharing_copy

Undo = Callable[[], object]


def lone_names(adapter: Adapter, model: nn.Module) -> tuple[str, ...]:
    """Return the names of tied tensors that the adapter changes alone, not for all names.

    Args:
        adapter: As it was read; names that the model lacks are left to `bind`.
        model: Holds the tensors.
    """
    first_names, aliases = named_tensors(model)
    groups: dict[str, dict[str, Full | Dense | ReplacedRows]] = {}
    for key, entry in adapter.entries.items():
        first = first_names.get(key, "")
        if isinstance(entry, Full | Dense | ReplacedRows) and aliases.get(first):
            groups.setdefault(first, {})[key] = entry

    lone: list[str] = []
    for first, entries in groups.items():
        if not _means_all_names(entries, (first, *aliases[first]), model):
            lone += entries
    return tuple(lone)


def _means_all_names(
    entries: dict[str, Full | Dense | ReplacedRows], names: tuple[str, ...], model: nn.Module
) -> bool:
    """Whether an adapter's entries for some names of a tied tensor apply to all names."""
    full = {key: entry for key, entry in entries.items() if isinstance(entry, Full)}
    if len(full) == len(entries):
        return means_all(full, names)
    return len(entries) == 1 and _rows_of_all(next(iter(entries)), entries, model)


def _rows_of_all(key: str, entries: dict[str, Any], model: nn.Module) -> bool:
    """Whether trained rows under one name are rows of every name.

    PEFT ties the head's rows to those of the input embedding, of a model that says it is tied.
    """
    if not isinstance(entries[key], ReplacedRows) or not hasattr(model, "get_input_embeddings"):
        return False
    language_model: Any = model
    embedding = language_model.get_input_embeddings()
    config = getattr(model, "config", None)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    return is_tied and owner(model, key)[0] is embedding


def untied(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Copy the module tree; share all tensors, except that these names get their own.

    Raises:
        LoraFxError: The model cannot be copied.
    """
    tree = sharing_copy(model, f"give {', '.join(names)} separate tensors")
    untie(tree, names)
    return tree


def untie(root: nn.Module, names: Collection[str]) -> list[Undo]:
    """Give these names their own tensors with the same values; return steps that undo this.

    A module that several paths lead to is copied at the path of the name, as PEFT replaces it
    there. The steps that are returned undo this in reverse order.
    """
    paths = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    undo: list[Undo] = []
    for name in names:
        value = parameter_of(root, name).detach().clone()
        *path, leaf = name.split(".")
        module = root
        for step in path:
            child = module._modules[step]
            assert child is not None  # the tensor of this name was found in it
            if paths[id(child)] > 1:
                undo.append(partial(module._modules.__setitem__, step, child))
                child = _copied(child)
                module._modules[step] = child
            module = child
        tied = module._parameters[leaf]
        assert tied is not None
        undo.append(partial(module._parameters.__setitem__, leaf, tied))
        module._parameters[leaf] = nn.Parameter(value, tied.requires_grad)
    return undo[::-1]


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module with its own dictionaries of tensors and children."""
    copied = copy.copy(module)
    for attribute in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[attribute] = dict(module.__dict__[attribute])
    return copied
