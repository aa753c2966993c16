"""An adapter as tensors in a module tree, of lora-fx or of the user."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.adapter.factor_tensors import FactorTensor, slots_of, with_values
from lora_fx.adapter.learning import learning, relearning
from lora_fx.adapter.lowrank import Full, LowRank, Updates
from lora_fx.adapter.runtime_scale import RUNTIME_SCALE
from lora_fx.adapter.target_union import taken_out
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import factor_dtype
from lora_fx.errors import LoraFxError
from lora_fx.fx import dynamo
from lora_fx.fx.adapter_with_base import check_evaluated
from lora_fx.fx.dotted_names import named_tensors, owner, parameter_of
from lora_fx.fx.module.module_base import Base
from lora_fx.fx.shards import gathered_array, refuse_shards, reshard, write_tensor
from lora_fx.fx.tensors import AdapterTensors, from_numpy, to_numpy
from lora_fx.inputs import Named
from lora_fx.targets.found import Found
from lora_fx.text import some


def update_tensors(root: nn.Module, updates: Updates) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of each update in a tree, by key and field."""
    tensors: dict[str, dict[str, nn.Parameter]] = {}
    for key, update in updates.items():
        saved = [slot for slot in slots_of(key, update) if slot.saved]
        tensors[key] = {slot.field: parameter_of(root, slot.name) for slot in saved}
    return tensors


def place_factors(
    root: nn.Module, updates: Updates, device_of: Callable[[str], torch.device]
) -> None:
    """Register the tensors of updates that a tree lacks, and fill up those of lower rank.

    A parameter that is there stays the same object, for the optimizers that have it.

    Args:
        root: The tree.
        updates: Their values are those of the tensors that are there, up to their ranks.
        device_of: Key → the device of its tensors.
    """
    for key, update in updates.items():
        for slot in slots_of(key, update):
            module, leaf = owner(root, slot.name, create=lambda _: AdapterTensors())
            # fp32 masters, whatever the base's dtype; complex64 of complex weights
            master = slot.value.astype(factor_dtype(slot.value.dtype.name))
            # in torch's own memory, which is aligned: see FxEmitter.parameter
            tensor = from_numpy(master).clone().to(device_of(key))
            parameter = module._parameters.get(leaf)
            if not slot.saved:
                module.register_buffer(leaf, tensor, persistent=False)
            elif parameter is None:
                module.register_parameter(leaf, nn.Parameter(tensor, slot.trained))
            elif parameter.shape != tensor.shape:
                parameter.data = tensor.to(parameter)
                parameter.grad = None


def factor_pairs(
    tensors: Mapping[str, Mapping[str, nn.Parameter]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return (a, b) by key, for updates that have both."""
    return {
        key: (by_field["a"], by_field["b"])
        for key, by_field in tensors.items()
        if "a" in by_field and "b" in by_field
    }


def write_factors(root: nn.Module, updates: Updates, anew: Collection[str] = ()) -> None:
    """Write updates into a tree's tensors; a tensor of another rank gets a new parameter.

    Args:
        root: Holds the tensors.
        updates: The updates.
        anew: Further keys whose tensors get new parameters, which no optimizer moves.
    """
    reshard(root)
    slots: list[FactorTensor] = []
    replaced: set[str] = set()
    for key, update in updates.items():
        for slot in slots_of(key, update):
            if not slot.saved:
                module, leaf = owner(root, slot.name)
                module.get_buffer(leaf).fill_(float(slot.value))
                continue
            slots.append(slot)
            if key in anew:
                replaced.add(slot.name)
    others = [slot for slot in slots if parameter_of(root, slot.name).shape != slot.value.shape]
    if others or replaced:
        refuse_shards(root)
    for slot in slots:
        parameter = parameter_of(root, slot.name)
        value = torch.from_numpy(np.array(slot.value))
        # of another rank, one size is another; parts that some tool keeps elsewhere are refused
        if slot.name in replaced or _is_other_rank(parameter.shape, value.shape):
            replacement = nn.Parameter(value.to(parameter), parameter.requires_grad)
            module, leaf = owner(root, slot.name)
            module.register_parameter(leaf, replacement)
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


def compile_ranks(root: nn.Module) -> None:
    """Let a compiled module take other ranks without another compilation."""
    compiled: Any = root._compiled_call_impl
    root._compiled_call_impl = dynamo.with_free_parameters(compiled)


def warn_of_compiling(misfits: Sequence[str]) -> None:
    """Warn that the next call of a compiled model compiles again.

    Args:
        misfits: The updates that the compiled program has no place for; none where it belongs to
            the last adapter alone.
    """
    reason = some(misfits) or "the last adapter had a program of its own"
    warnings.warn(
        f"the next call compiles again: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


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
        LoraFxError: A key or a shape that does not fit, or a whole tensor that is not in `also`;
            updates that were evaluated on another base.
    """
    exact, _ = as_exact_lora(adapter)
    bound = bind(exact, found)
    check_evaluated(bound, found, lambda name: to_numpy(parameter_of(root, name)))
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
    installed: Updates | None = None,
) -> Adapter:
    """Return the adapter with the present values of the tensors in a tree.

    Sharded tensors are gathered, so every process has to call it.

    Args:
        root: Holds the tensors.
        updates: Key → the update as it was inserted.
        also: First name of a tensor that is trained whole → its shape, where that is known.
        metadata: Further metadata of the adapter.
        base: The record of the frozen weights.
        installed: The updates as they lie in the tree, where a union of targets completes them.

    Raises:
        LoraFxError: Training has changed numbers there that are no part of the adapter.
    """
    reshard(root)
    entries: dict[str, LowRank | Full] = {}
    for key, in_tree in (installed or updates).items():
        values = {}
        for slot in slots_of(key, in_tree):
            if slot.saved:
                value = gathered_array(slot.name, parameter_of(root, slot.name), slot.value.shape)
                values[slot.field] = value.astype(factor_dtype(value.dtype.name), copy=False)
        if RUNTIME_SCALE.of(in_tree) is None:
            entries[key] = with_values(updates[key], values)
        else:
            taken = taken_out(key, updates.get(key), values)
            entries |= {} if taken is None else {key: taken}
    _, aliases = named_tensors(root)
    for name, shape in also.items():
        if name in updates:  # of the base's value, which the tensor then has
            continue
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
