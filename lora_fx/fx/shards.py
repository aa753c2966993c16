"""Tensors that are split between processes (FSDP2, DTensor): read whole, written in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import to_numpy


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a DTensor: this process has a part of it, or a replica."""
    return hasattr(tensor, "full_tensor")


def reshard(root: nn.Module) -> None:
    """Let FSDP2 put its own tensors back, which a forward without a backward leaves gathered.

    What is gathered is a copy, in the dtype of FSDP2's mixed precision.
    """
    for module in root.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def refuse_shards(root: nn.Module) -> None:
    """Raise LoraFxError for a sharded model, before a change of the shapes of its adapter."""
    if any(is_sharded(p) for p in root.parameters()):
        raise LoraFxError(
            "a sharded model keeps the targets and ranks of its adapter",
            "load this adapter before fully_shard",
        )


def gathered_array(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> Array:
    """A copy of a tensor as an array; a sharded one is gathered: every process has to take part.

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
    """Write a whole tensor, the same in every process, into a parameter or its shards.

    Raises:
        LoraFxError: As `whole`.
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
    """Raise for a part of a sharded tensor: one of another shape, or an empty one."""
    if tuple(tensor.shape) == shape or (shape is None and tensor.numel()):
        return
    expected = f", not {list(shape)}" if shape is not None else ""
    raise LoraFxError(
        f"{name} has the shape {list(tensor.shape)} here{expected}: another tool keeps the rest "
        "of it",
        "gather it first with FSDP.summon_full_params(model) or "
        "deepspeed.zero.GatheredParameters(…)",
    )
