"""Helpers for tensors: conversion to and from arrays, whether values exist, and the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.fx import fake_tensors
from lora_fx.text import some


class AdapterTensors(nn.Module):
    """A module that holds factors of an update, below the module whose parameter is adapted."""

    def forward(self, reads_them: Callable[[], Any]) -> Any:
        """Run what reads the factors; FSDP2 gathers them for a call."""
        return reads_them()

    def extra_repr(self) -> str:
        """Return the shapes of the tensors."""
        shapes = [
            f"{name}: {list(parameter.shape)}"
            for name, parameter in self._parameters.items()
            if parameter is not None
        ]
        return ", ".join(shapes)


def has_values(tensor: torch.Tensor) -> bool:
    """Return False for a tensor without values: on the meta device, or fake."""
    return tensor.device.type != "meta" and not fake_tensors.is_fake(tensor)


def refuse_inference(model: nn.Module) -> None:
    """Raise for weights that torch excludes from every backward pass."""
    names = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if names:
        raise LoraFxError(
            f"no gradient goes through weights made in torch.inference_mode: {some(names)}",
            "make, load or copy the model outside of that block",
        )


def to_numpy(tensor: torch.Tensor | None) -> Array:
    """Return a tensor as an array; bfloat16 and 8-bit floats become ml_dtypes dtypes."""
    assert tensor is not None
    if not has_values(tensor):
        raise LoraFxError("this model has no weights", "load it with its weights first (--weights)")
    t = tensor.detach().cpu().resolve_conj().resolve_neg()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype.itemsize == 1 and t.is_floating_point():
        kind = numpy_dtype(str(t.dtype).removeprefix("torch."))
        return t.contiguous().view(torch.uint8).numpy().view(kind)
    return np.asarray(t.numpy())


def from_numpy(value: Array, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return an array as a tensor, with the dtype and device of `like` if it is given."""
    array = np.ascontiguousarray(value)
    if value.dtype.kind == "V":  # bfloat16 and float8, which numpy itself has not
        bits = array.view(f"i{value.itemsize}")
        tensor = torch.from_numpy(bits).view(getattr(torch, value.dtype.name))
    else:
        tensor = torch.from_numpy(array)
    tensor = tensor.reshape(value.shape)  # ascontiguousarray gives a scalar a dimension
    if like is None:
        return tensor
    return tensor.to(dtype=like.dtype, device=like.device)


def padding(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return paddings of each axis in the form of torch's pad, the last axis first."""
    counts = []
    for count_before, count_after in zip(reversed(before), reversed(after), strict=True):
        counts += [count_before, count_after]
    return counts


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters; the CPU for a module without parameters."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
