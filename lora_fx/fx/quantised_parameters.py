"""Parameters of a tree that hold codes: put there, read, declared and taken away."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.codes import DEQUANTISE, HELD, PARTS, Stored, arguments, arrays_of
from lora_fx.fx.dotted_names import named_tensors, owner, parameter_of, replace_parameter
from lora_fx.fx.tensors import from_numpy
from lora_fx.ir.quantised import Quantised


def put_codes(
    root: nn.Module, name: str, q: Quantised, dtype: torch.dtype, shape: Sequence[int], turned: bool
) -> None:
    """Put codes in the place of a parameter, under all its names.

    Args:
        root: The tree; its own classes read the weight as numbers from then on.
        name: The parameter's first name.
        q: The rows [rows, columns].
        dtype: The dtype that the weight has for the model.
        shape: The shape of the weight.
        turned: As in `Stored`.

    Raises:
        LoraFxError: Codes that no layout of the table in lora_fx.fx.codes holds.
    """
    kind, block, arrays = arrays_of(name, q)
    occupied = occupied_name(root, name, arrays)
    if occupied:
        raise LoraFxError(f"{name}: its module already has a {occupied}", "rename that attribute")
    parts = tuple(part for part in PARTS if part in arrays)
    stored = Stored(kind, tuple(shape), block, dtype, turned, parts)

    parameter = parameter_of(root, name)
    device = parameter.device
    if device.type == "meta":
        device = torch.device("cpu")
    tensors = {part: _in_float32(from_numpy(array)) for part, array in arrays.items()}
    codes = nn.Parameter(tensors.pop("codes").to(device), requires_grad=False)
    for module, leaf in _places_of(root, parameter):
        for part, tensor in tensors.items():
            module.register_buffer(f"{leaf}_{part}", tensor.to(device))
        module.__dict__.setdefault(HELD, {})[leaf] = stored
        module.__class__ = _reading(type(module), leaf)
    replace_parameter(root, parameter, codes)


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _places_of(root: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module that holds a parameter, with the leaf under which it does."""
    places = []
    for module in root.modules():
        for leaf, own_parameter in module._parameters.items():
            if own_parameter is parameter:
                places.append((module, leaf))
    return places


def occupied_name(root: nn.Module, name: str, parts: Iterable[str] = ("scale",)) -> str:
    """The name of a module's attribute that the scales or zeros of a parameter would replace."""
    for module, leaf in _places_of(root, parameter_of(root, name)):
        for part in parts:
            buffer_name = f"{leaf}_{part}"
            if hasattr(module, buffer_name):
                return buffer_name
    return ""


def _reading(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A class whose parameter reads as numbers, so that the user's own code can run."""
    attributes = {
        "__module__": cls.__module__,
        "_own_class": getattr(cls, "_own_class", cls),
        leaf: property(functools.partial(numbers, name=leaf)),
    }
    return type(cls.__name__, (cls,), attributes)


def forms(root: nn.Module) -> dict[str, Stored]:
    """First name of a parameter that is stored as codes → the meaning of its codes."""
    stored_by_path = {
        path: module.__dict__[HELD]
        for path, module in root.named_modules()
        if module.__dict__.get(HELD)
    }
    if not stored_by_path:
        return {}
    first_names = named_tensors(root)[0]
    stored_by_name: dict[str, Stored] = {}
    for path, stored_by_leaf in stored_by_path.items():
        for leaf, stored in stored_by_leaf.items():
            name = first_names.get(f"{path}.{leaf}".lstrip("."))
            if name:
                stored_by_name.setdefault(name, stored)
    return stored_by_name


def stored_of(root: nn.Module, name: str) -> Stored | None:
    """The meaning of a parameter's codes; None where it holds numbers."""
    module, leaf = owner(root, name)
    stored: Stored | None = (module.__dict__.get(HELD) or {}).get(leaf)
    return stored


def numbers(root: nn.Module, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight of a parameter's codes as numbers; the parameter itself if it holds numbers.

    Args:
        root: The tree.
        name: The parameter's name.
        dtype: The dtype of the weight; without it, the one that it has for the model.
    """
    module, leaf = owner(root, name)
    parameter = parameter_of(root, name)
    stored = stored_of(root, name)
    if stored is None or parameter.is_floating_point():
        return parameter
    buffers = [module._buffers.get(f"{leaf}_{part}") for part in PARTS]
    return DEQUANTISE(parameter, *buffers, *arguments(stored, dtype or stored.dtype))


def tensors_of(root: nn.Module, name: str) -> list[torch.Tensor]:
    """The codes of a parameter, and its PARTS that exist."""
    module, leaf = owner(root, name)
    buffers = [module._buffers.get(f"{leaf}_{part}") for part in PARTS]
    return [parameter_of(root, name), *(buffer for buffer in buffers if buffer is not None)]


def forget(root: nn.Module) -> None:
    """Make a copy whose codes became numbers an ordinary tree again."""
    for module in root.modules():
        for leaf in module.__dict__.pop(HELD, {}):
            for part in PARTS:
                module._buffers.pop(f"{leaf}_{part}", None)
        module.__class__ = getattr(type(module), "_own_class", type(module))


def replace_zeros(root: nn.Module, name: str, zero: torch.Tensor) -> None:
    """Let a parameter's codes have other zeros, floats [rows, blocks].

    Another tree that shares the codes keeps its own.
    """
    codes = parameter_of(root, name)
    for module, leaf in _places_of(root, codes):
        stored_by_leaf = module.__dict__[HELD]
        module.register_buffer(f"{leaf}_zero", zero.to(codes.device))
        stored = dataclasses.replace(stored_by_leaf[leaf], parts=PARTS[:2])
        module.__dict__[HELD] = {**stored_by_leaf, leaf: stored}


def declare(root: nn.Module, name: str, stored: Stored) -> None:
    """Record in a tree the meaning of a parameter's codes, wherever these are stored."""
    module, leaf = owner(root, name)
    module.__dict__.setdefault(HELD, {})[leaf] = stored
