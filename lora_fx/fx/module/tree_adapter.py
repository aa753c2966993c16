"""An adapter as tensors in a module tree, of lora-fx or of the user."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.adapter.factor_tensors import FactorTensor, slots_of, with_values
from lora_fx.adapter.learning import learning, relearning
from lora_fx.adapter.lowrank import Full, LowRank, Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import factor_dtype
from lora_fx.errors import LoraFxError
from lora_fx.fx import dynamo
from lora_fx.fx.dotted_names import named_tensors, owner, parameter_of
from lora_fx.fx.module.module_base import Base
from lora_fx.fx.shards import gathered_array, refuse_shards, reshard, write_tensor
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.inputs import Named
from lora_fx.targets.found import Found


def update_tensors(root: nn.Module, updates: Updates) -> dict[str, dict[str, nn.Parameter]]:
    """Return the tensors of each update in a tree, by key and field."""
    return {
        key: {slot.field: parameter_of(root, slot.name) for slot in slots_of(key, update)}
        for key, update in updates.items()
    }


def factor_pairs(
    tensors: Mapping[str, Mapping[str, nn.Parameter]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return (a, b) by key, for updates that have both."""
    return {
        key: (by_field["a"], by_field["b"])
        for key, by_field in tensors.items()
        if "a" in by_field and "b" in by_field
    }


def write_factors(root: nn.Module, updates: Updates) -> None:
    """Write updates into a tree's tensors; a tensor of another rank gets a new parameter."""
    reshard(root)
    slots: list[FactorTensor] = []
    for key, update in updates.items():
        slots += slots_of(key, update)
    if any(parameter_of(root, slot.name).shape != slot.value.shape for slot in slots):
        refuse_shards(root)
    for slot in slots:
        parameter = parameter_of(root, slot.name)
        value = torch.from_numpy(np.array(slot.value))
        # of another rank, one size is another; parts that some tool keeps elsewhere are refused
        if _is_other_rank(parameter.shape, value.shape):
            replacement = nn.Parameter(value.to(parameter), parameter.requires_grad)
            module, _ = owner(root, slot.name)
            module.register_parameter(slot.name.rpartition(".")[2], replacement)
        else:
            write_tensor(slot.name, parameter, value)
    free_ranks(root, updates)


def _is_other_rank(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes differ in the size of one axis."""
    if len(shape) != len(other):
        return False
    return sum(a != b for a, b in zip(shape, other, strict=True)) == 1


def free_ranks(root: nn.Module, updates: Updates) -> None:
    """Tell torch.compile that the ranks of a tree's tensors may change."""
    for key, tensors in update_tensors(root, updates).items():
        if variant_of(updates[key]).peft_type:  # others have ranks elsewhere, too
            dynamo.may_vary(tensors["a"], tensors["a"].dim() - 2)
            dynamo.may_vary(tensors["b"], tensors["b"].dim() - 1)


def compile_ranks(root: nn.Module, updates: Updates) -> None:
    """Let a compiled module take other ranks without another compilation."""
    free_ranks(root, updates)
    compiled: Any = root._compiled_call_impl
    root._compiled_call_impl = dynamo.with_free_parameters(compiled)


def bound_for_loading(
    adapter: Adapter, found: Found, root: nn.Module, also: Collection[str], verb: str
) -> Adapter:
    """Bind an adapter that is to be loaded to a model.

    Args:
        adapter: As it was read.
        found: The model's targets.
        root: The model.
        also: First names of the tensors that are trained whole.
        verb: The verb that trains further tensors whole, for the hint.

    Raises:
        LoraFxError: A key or a shape that does not fit, or a whole tensor that is not in `also`.
    """
    exact, _ = as_exact_lora(adapter)
    bound = bind(exact, found)
    updates, metadata = relearning(bound.lowrank, bound.metadata)
    names, _ = named_tensors(root)
    for name in bound.full:
        if names[name] not in also:
            raise LoraFxError(
                f"the adapter holds the whole tensor {name!r}",
                f"{verb} with also_train={name!r} before loading it",
            )
    return Adapter({**bound.entries, **updates}, metadata)


def write_full_tensors(
    root: nn.Module, adapter: Adapter, originals: Mapping[str, torch.Tensor]
) -> None:
    """Write the whole tensors of an adapter; missing ones get the model's original values."""
    first_names, _ = named_tensors(root)
    values = {first_names[key]: from_numpy(entry.value) for key, entry in adapter.full.items()}
    for name, original in originals.items():
        write_tensor(name, parameter_of(root, name), values.get(name, original))


def current_adapter(
    root: nn.Module,
    updates: Updates,
    also: Mapping[str, tuple[int, ...] | None],
    metadata: Named,
    base: Base,
) -> Adapter:
    """Return the adapter with the present values of the tensors in a tree.

    Sharded tensors are gathered, so every process has to call it.

    Args:
        root: Holds the tensors.
        updates: Key → the update as it was inserted.
        also: First name of a tensor that is trained whole → its shape, where that is known.
        metadata: Further metadata of the adapter.
        base: The record of the frozen weights.
    """
    reshard(root)
    entries: dict[str, LowRank | Full] = {}
    for key, update in updates.items():
        values = {}
        for slot in slots_of(key, update):
            value = gathered_array(slot.name, parameter_of(root, slot.name), slot.value.shape)
            values[slot.field] = value.astype(factor_dtype(value.dtype.name), copy=False)
        entries[key] = with_values(update, values)
    _, aliases = named_tensors(root)
    for name, shape in also.items():
        twins = tuple(aliases.get(name, ()))
        entries[name] = Full(
            gathered_array(name, parameter_of(root, name), shape), bool(twins), twins
        )
    facts = {**learning(updates), **base.now(updates, root)}
    return Adapter(entries, {**metadata, **facts})


def changes_weight(update: LowRank, tensors: Mapping[str, nn.Parameter]) -> bool:
    """Whether an update changes the weight.

    Args:
        update: The update as it was inserted.
        tensors: Its tensors as they are now, by field.
    """
    if update.frozen:
        a_is_start = torch.equal(tensors["a"], tensors["a0"])
        return not (a_is_start and torch.equal(tensors["b"], -tensors["b0"]))
    variant = variant_of(update)
    for field, start in variant.beside(update).items():
        if not np.array_equal(to_numpy(tensors[field]), np.asarray(start)):
            return True
    return all(bool(tensors[field].any()) for field in variant.zero_where)
