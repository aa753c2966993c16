"""Small bridges between torch and the rest: arrays, dotted names, dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from lora_fx.errors import LoraFxError


class AdapterTensors(nn.Module):
    """Holds one side of an update beside the module whose parameter it adapts."""


def to_numpy(tensor: torch.Tensor | None) -> np.ndarray[Any, Any]:
    """A tensor as an array; bfloat16 becomes ml_dtypes.bfloat16."""
    assert tensor is not None
    if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
        raise LoraFxError("this model has no weights", "load it with weights first (--weights)")
    t = tensor.detach().cpu()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(t.numpy())


def from_numpy(value: np.ndarray[Any, Any], like: torch.Tensor | None = None) -> torch.Tensor:
    """An array as a tensor, in the dtype and on the device of `like` if one is given."""
    if value.dtype == np.dtype(ml_dtypes.bfloat16):
        t = torch.from_numpy(np.ascontiguousarray(value).view(np.int16)).view(torch.bfloat16)
    else:
        t = torch.from_numpy(np.ascontiguousarray(value))
    t = t.reshape(value.shape)  # ascontiguousarray gives a scalar a dimension
    return t if like is None else t.to(dtype=like.dtype, device=like.device)


def owner(root: nn.Module, name: str, *, create: bool = False) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the leaf; a bracketed region stays in the leaf."""
    head, bracket, tail = name.partition("[")
    path, _, leaf = head.rpartition(".")
    module = root
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            if not create:
                raise LoraFxError(f"no module {part!r} on the way to {name!r}")
            child = AdapterTensors()
            module.add_module(part, child)
        module = child
    return module, leaf + bracket + tail


def named_tensors(root: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({any name: first name}, {first name: other names}) of the tree; adapters' left out."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    skip = {n for n, m in root.named_modules() if isinstance(m, AdapterTensors)}
    for name, p in root.named_parameters(remove_duplicate=False):
        if skip and name.partition("[")[0].rpartition(".")[0] in skip:
            continue
        known = first.setdefault(id(p), name)
        canonical[name] = known
        aliases.setdefault(known, [])
        if name != known:
            aliases[known].append(name)
    return canonical, aliases
