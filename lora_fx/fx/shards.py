"""Tensors that are split between processes (FSDP2, DTensor): read whole, written in shards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import to_numpy


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a DTensor, of which this process has a part or a replica."""
    return hasattr(tensor, "full_tensor")


def reshard(root: nn.Module) -> None:
    """Let FSDP2 shard its tensors again, which a forward without backward leaves gathered.

    The gathered tensors are copies, in the dtype of FSDP2's mixed precision.
    """
    for module in root.modules():
        if _is_unit(module):
            module.reshard()  # type: ignore[operator]


def _is_unit(module: nn.Module) -> bool:
    """True for a module that FSDP2's fully_shard was called on."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def uncalled_units(
    module: nn.Module, is_called: Callable[[nn.Module], bool]
) -> dict[nn.Module, None]:
    """Return the units of FSDP2 below a module that no call runs, each once.

    FSDP2 gathers a unit's tensors when the unit is called. A program reads the tensors of a norm or
    a head without calling it.

    Args:
        module: The module whose function a program runs.
        is_called: Whether a program calls a module; that call covers the units below it.
    """
    units: dict[nn.Module, None] = {}
    if not (dist.is_available() and dist.is_initialized()):
        return units
    for child in module.children():
        if is_called(child):
            continue
        if _is_unit(child):
            units[child] = None
        units |= uncalled_units(child, is_called)
    return units


def run_gathered(units: Iterable[nn.Module], run: Callable[[], Any]) -> Any:
    """Run a function inside the calls of units, which gather their tensors and run it."""
    for unit in units:
        run = functools.partial(unit, run)
    return run()


def is_any_sharded(root: nn.Module) -> bool:
    """True for a tree with a DTensor in it."""
    return any(is_sharded(parameter) for parameter in root.parameters())


def refuse_shards(root: nn.Module) -> None:
    """Raise LoraFxError for a sharded model, whose adapter cannot change its shapes."""
    if is_any_sharded(root):
        raise LoraFxError(
            "a sharded model keeps the targets and ranks of its adapter",
            "load this adapter before fully_shard",
        )


def gathered_array(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> Array:
    """Copy a tensor to an array; every process has to take part to gather a sharded tensor.

    Args:
        name: The name of the tensor, for the error.
        tensor: The tensor, or this process' part of it.
        shape: The shape that it has to have, where that is known.

    Raises:
        LoraFxError: A part that another tool left, which nothing here can gather.
    """
    gathered: Any = tensor.detach()
    if is_sharded(gathered):
        gathered = gathered.full_tensor()
    _refuse_part(name, gathered, shape)
    return to_numpy(gathered.clone())  # what numpy has seen cannot be resized, as FSDP1 does


def write_tensor(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole tensor, which all processes pass, into a parameter or its shards.

    Raises:
        LoraFxError: As `gathered_array`.
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = distribute_tensor(
            value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    _refuse_part(name, parameter, tuple(value.shape))
    with torch.no_grad():
        parameter.copy_(value)


def _refuse_part(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise for a part of a sharded tensor: a tensor of another shape, or an empty one."""
    if tuple(tensor.shape) == shape or (shape is None and tensor.numel()):
        return
    expected = f", not {list(shape)}" if shape is not None else ""
    raise LoraFxError(
        f"{name} has the shape {list(tensor.shape)} here{expected}: another tool keeps the rest "
        "of it",
        "gather it first: for FSDP1 inside FSDP.summon_full_params(model)",
    )
