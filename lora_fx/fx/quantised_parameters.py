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


def store(
    root: nn.Module, name: str, q: Quantised, dtype: torch.dtype, shape: Sequence[int], turned: bool
) -> None:
    """Put codes in the place of a parameter, under all its names.

    Args:
        root: The tree; its own classes read the weight as numbers from then on.
        name: The parameter's first name.
        q: The rows [rows, columns].
        dtype: The dtype that the weight has for the model.
        shape: That of the weight.
        turned: As in `Stored`.

    Raises:
        LoraFxError: Codes that no layout of the table above holds.
    """
    kind, block, arrays = arrays_of(name, q)
    if other := taken(root, name, arrays):
        raise LoraFxError(f"{name}: its module has a {other} already", "rename that")
    parts = tuple(p for p in PARTS if p in arrays)
    stored = Stored(kind, tuple(shape), block, dtype, turned, parts)
    old = parameter_of(root, name)
    tensors = {k: from_numpy(v) for k, v in arrays.items()}
    tensors |= {k: t.float() for k, t in tensors.items() if t.is_floating_point()}
    device = old.device if old.device.type != "meta" else torch.device("cpu")
    new = nn.Parameter(tensors.pop("codes").to(device), requires_grad=False)
    for module in root.modules():
        for leaf in [n for n, p in module._parameters.items() if p is old]:
            for part, t in tensors.items():
                module.register_buffer(f"{leaf}_{part}", t.to(device))
            module.__dict__.setdefault(HELD, {})[leaf] = stored
            module.__class__ = _reading(type(module), leaf)
    replace_parameter(root, old, new)


def taken(root: nn.Module, name: str, parts: Iterable[str] = ("scale",)) -> str:
    """The name beside a parameter that its scales or zeros would take from something else."""
    p = parameter_of(root, name)
    leaves = ((m, n) for m in root.modules() for n, own in m._parameters.items() if own is p)
    names = ((m, f"{n}_{part}") for m, n in leaves for part in parts)
    return next((n for m, n in names if hasattr(m, n)), "")


def _reading(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A class whose parameter reads as numbers: what runs is the user's own code."""
    read = property(functools.partial(numbers, name=leaf))
    own = getattr(cls, "_own_class", cls)
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_own_class": own, leaf: read})


def forms(root: nn.Module) -> dict[str, Stored]:
    """First name of a parameter that is stored as codes → what they stand for."""
    held = {p: m.__dict__[HELD] for p, m in root.named_modules() if m.__dict__.get(HELD)}
    names = named_tensors(root)[0] if held else {}
    found: dict[str, Stored] = {}
    for path, stored in held.items():
        for leaf, q in stored.items():
            if name := names.get(f"{path}.{leaf}".lstrip(".")):
                found.setdefault(name, q)
    return found


def stored_of(root: nn.Module, name: str) -> Stored | None:
    """What the codes of a parameter stand for; None where it holds numbers."""
    module, leaf = owner(root, name)
    found: Stored | None = (module.__dict__.get(HELD) or {}).get(leaf)
    return found


def numbers(root: nn.Module, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight that a parameter's codes stand for; the parameter where it holds numbers.

    Args:
        root: The tree.
        name: The parameter's name.
        dtype: In which the weight is made; without it, the one that it has for the model.
    """
    (module, leaf), held = owner(root, name), parameter_of(root, name)
    stored = stored_of(root, name)
    if stored is None or held.is_floating_point():
        return held
    parts = (module._buffers.get(f"{leaf}_{part}") for part in PARTS)
    return DEQUANTISE(held, *parts, *arguments(stored, dtype or stored.dtype))


def tensors_of(root: nn.Module, name: str) -> list[torch.Tensor]:
    """The codes of a parameter, and its PARTS."""
    module, leaf = owner(root, name)
    parts = (module._buffers.get(f"{leaf}_{part}") for part in PARTS)
    return [parameter_of(root, name), *(t for t in parts if t is not None)]


def forget(root: nn.Module) -> None:
    """Make a copy whose codes became numbers an ordinary tree again."""
    for module in root.modules():
        for leaf in module.__dict__.pop(HELD, {}):
            for part in PARTS:
                module._buffers.pop(f"{leaf}_{part}", None)
        module.__class__ = getattr(type(module), "_own_class", type(module))


def put_zeros(root: nn.Module, name: str, zero: torch.Tensor) -> None:
    """Let a parameter's codes have other zeros, floats [rows, blocks].

    Another tree that shares the codes keeps its own.
    """
    codes = parameter_of(root, name)
    for module in root.modules():
        for leaf in [n for n, p in module._parameters.items() if p is codes]:
            held = module.__dict__[HELD]
            module.register_buffer(f"{leaf}_zero", zero.to(codes.device))
            stored = dataclasses.replace(held[leaf], parts=PARTS[:2])
            module.__dict__[HELD] = {**held, leaf: stored}


def declare(root: nn.Module, name: str, stored: Stored) -> None:
    """Let a tree say what a parameter's codes stand for, wherever these are."""
    module, leaf = owner(root, name)
    module.__dict__.setdefault(HELD, {})[leaf] = stored
