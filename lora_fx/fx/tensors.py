"""Small bridges between torch and the rest: arrays, dotted names, dtypes."""

from __future__ import annotations

import contextlib
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.residual import on_base
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, retold, silenced
from lora_fx.fx import fake_tensors
from lora_fx.targets.keys import split_region
from lora_fx.text import some


class AdapterTensors(nn.Module):
    """Holds one side of an update beside the module whose parameter it adapts."""

    def extra_repr(self) -> str:
        """The shapes of its tensors."""
        return ", ".join(
            f"{n}: {list(p.shape)}" for n, p in self._parameters.items() if p is not None
        )


def has_values(tensor: torch.Tensor) -> bool:
    """False for a tensor that is a shape alone: on the meta device, or a fake one of a trace."""
    return tensor.device.type != "meta" and not fake_tensors.is_fake(tensor)


def refuse_inference(model: nn.Module) -> None:
    """Raise for weights that torch keeps from every backward pass."""
    made = [n for n, p in model.named_parameters() if p.is_inference()]
    if made:
        raise LoraFxError(
            f"no gradient goes through weights made in torch.inference_mode: {some(made)}",
            "make, load or copy the model outside of that block",
        )


def to_numpy(tensor: torch.Tensor | None) -> Array:
    """A tensor as an array; bfloat16 and floats of 8 bits become those of ml_dtypes."""
    assert tensor is not None
    if not has_values(tensor):
        raise LoraFxError("this model has no weights", "load it with weights first (--weights)")
    t = tensor.detach().cpu().resolve_conj().resolve_neg()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype.itemsize == 1 and t.is_floating_point():
        kind = numpy_dtype(str(t.dtype).removeprefix("torch."))
        return t.contiguous().view(torch.uint8).numpy().view(kind)
    return np.asarray(t.numpy())


def from_numpy(value: Array, like: torch.Tensor | None = None) -> torch.Tensor:
    """An array as a tensor, in the dtype and on the device of `like` if one is given."""
    if value.dtype.kind == "V":  # bfloat16 and float8, which numpy itself has not
        bits = np.ascontiguousarray(value).view(f"i{value.itemsize}")
        t = torch.from_numpy(bits).view(getattr(torch, value.dtype.name))
    else:
        t = torch.from_numpy(np.ascontiguousarray(value))
    t = t.reshape(value.shape)  # ascontiguousarray gives a scalar a dimension
    return t if like is None else t.to(dtype=like.dtype, device=like.device)


def padding(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Zeros before and behind each axis as torch's pad takes them, from the last axis on."""
    pairs = zip(reversed(before), reversed(after), strict=True)
    return [count for pair in pairs for count in pair]


def with_base(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with the whole tensors that its changes of biases and its trained rows make.

    An update of a base from which its start took a part becomes one of the base as it is.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    entries = dict(adapter.entries)
    for key, entry in adapter.entries.items():
        if key not in tensors:
            continue
        if isinstance(entry, LowRank) and entry.mutated:
            stored = to_numpy(tensors[key])
            turned = adapter.metadata.get("fan_in_fan_out")
            entries[key] = on_base(stored.T if turned else stored, entry, repr(key))
        elif isinstance(entry, Dense | ReplacedRows):
            value = to_numpy(tensors[key]).astype(np.float32)
            if isinstance(entry, ReplacedRows):
                value[list(entry.index)] = entry.value
                entries[key] = Full(value, tied=True)  # one name alone has a tensor of its own here
            elif value.ndim == 1 and value.shape == entry.value.shape:
                entries[key] = Full(value + np.float32(entry.scale) * entry.value, tied=True)
    return replace(adapter, entries=entries)


def owner(
    root: nn.Module, name: str, *, create: Callable[[str], nn.Module] | None = None
) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the leaf; a bracketed region stays in the leaf.

    Args:
        root: The tree.
        name: The dotted name of a tensor.
        create: Path → the module to put there where there is none; without it that is an error.
    """
    head, region = split_region(name) if name.endswith("]") else (name, "")
    *path, leaf = head.split(".")
    module = root
    for i, part in enumerate(path, 1):
        child = module._modules.get(part)
        if child is None:
            if create is None:
                raise LoraFxError(
                    f"no module {part!r} on the way to {name!r}", "named_modules() lists the names"
                )
            if hasattr(module, part):
                raise LoraFxError(f"the name {part!r} of {name!r} is taken", "rename that tensor")
            child = create(".".join(path[:i]))
            module.add_module(part, child)
        module = child
    return module, leaf + region


def parameter_of(root: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a dotted name.

    Raises:
        LoraFxError: There is none.
    """
    module, leaf = owner(root, name)
    p = module._parameters.get(leaf)
    if p is None:
        raise LoraFxError(
            f"{name!r} is no parameter of the model", "named_parameters() lists the names"
        )
    return p


def replace_parameter(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put one parameter in the place of another, under all names that the other has in a tree."""
    for module in root.modules():
        for leaf, p in module._parameters.items():
            if p is old:
                module._parameters[leaf] = new


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU for a module without."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def all_tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers under all their names."""
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def named_tensors(root: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({any name: first name}, {first name: other names}) of the tree; adapters' left out."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    skip = {n for n, m in root.named_modules() if isinstance(m, AdapterTensors)}
    for name, p in root.named_parameters(remove_duplicate=False):
        head = name.rpartition("[")[0] if name.endswith("]") else name
        if head.rpartition(".")[0] in skip:
            continue
        known = first.setdefault(id(p), name)
        canonical[name] = known
        aliases.setdefault(known, [])
        if name != known:
            aliases[known].append(name)
    return canonical, aliases


# Tensors out of a pickle that torch.save wrote; the one place where one is opened.


def pickled(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file, by torch's unpickler that runs no code (weights_only=True).

    Args:
        path: A state dict, name → tensor.
        mapped: Map the file, so that only what is used is read; not for torch's oldest format.

    Raises:
        LoraFxError: It holds anything but tensors, or is damaged.
    """
    refused = f"{path}: torch will not read it as tensors alone"
    with retold(refused, "it may hold code; get the tensors as safetensors"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    for name, value in state.items() if isinstance(state, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise LoraFxError(
                f"{path}: holds a {type(value).__name__} at {name!r}; expected a tensor by name",
                "is it a file that save_pretrained wrote?",
            )
    return dict(state)


def pickled_places(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name → (dtype, shape, first byte in the file) of the tensors of a pickle; none are read.

    The byte is -1 of a tensor whose numbers do not lie in the file as they are, row by row.
    """
    # Under the mode torch notes where a storage lies, instead of reading it. It then looks at no
    # size, and ends the process where bytes would have to be turned.
    sizes = _records(path)
    mode = fake_tensors.FakeTensorMode() if sizes else contextlib.nullcontext()
    with silenced(levels={fake_tensors.LOGGER: logging.CRITICAL}):
        try:
            with mode:
                state = pickled(path)
        except LoraFxError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            # torch 2.15 checks the indices of sparse tensors, which have no numbers under the mode
            state = pickled(path, mapped=True)
    places = {}
    for name, t in state.items():
        at, shape = -1, tuple(t.shape)
        if t.layout is torch.strided and not (t.is_neg() or t.is_conj()):
            first: int = getattr(t.untyped_storage(), "_checkpoint_offset", None) or 0
            start = int(t.storage_offset()) * t.element_size()
            fits = t.is_contiguous() and start + t.nbytes <= sizes.get(first, -1)
            at = first + start if fits and math.prod(n or 1 for n in shape) < 1 << 60 else -1
        places[name] = (str(t.dtype).removeprefix("torch."), shape, at)
    return places


def _records(path: Path) -> dict[int, int]:
    """First byte → bytes of the parts of an archive, where these are a little-endian machine's.

    Empty for an archive with compression, and for what is none.
    """
    damaged = contextlib.suppress(zipfile.BadZipFile, OSError, RuntimeError)
    sizes: dict[int, int] = {}
    with damaged, zipfile.ZipFile(path) as file, path.open("rb") as raw:
        for info in file.infolist():
            turned = info.filename.endswith("/byteorder") and file.read(info) != b"little"
            if info.compress_type != zipfile.ZIP_STORED or turned:
                return {}
            raw.seek(info.header_offset + 26)  # the lengths of the name and of what follows it
            lengths = raw.read(2), raw.read(2)
            at = raw.tell() + sum(int.from_bytes(n, "little") for n in lengths)
            sizes[at] = min(info.compress_size, path.stat().st_size - at)
    return sizes


def read_pickle(path: Path) -> dict[str, Array]:
    """The tensors of a pickle as arrays; see `pickled`."""
    tensors: dict[str, Array] = {}
    for name, value in pickled(path).items():
        try:
            tensors[name] = to_numpy(value.contiguous())
        except (TypeError, RuntimeError) as error:
            raise LoraFxError(
                f"{path}: tensor {name!r} has dtype {value.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            ) from error
    return tensors


# Tensors that are split between processes (FSDP2, DTensor): read whole, written in parts.


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a DTensor: this process has a part of it, or a replica."""
    return hasattr(tensor, "full_tensor")


def settle(root: nn.Module) -> None:
    """Let FSDP2 put its own tensors back, which a forward without a backward leaves gathered.

    What is gathered is a copy, in the dtype of FSDP2's mixed precision.
    """
    for module in root.modules():
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def refuse_shards(root: nn.Module) -> None:
    """Raise LoraFxError for a sharded model, before a change of the shapes of its adapter."""
    if any(is_sharded(p) for p in root.parameters()):
        raise LoraFxError(
            "a sharded model keeps the targets and ranks of its adapter",
            "load this one before fully_shard",
        )


def whole(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> Array:
    """A copy of a tensor as an array; a sharded one is gathered: every process has to take part.

    Args:
        name: The name of the tensor, for the error.
        tensor: The tensor, or this process' part of it.
        shape: The shape that it has to have, where that is known.

    Raises:
        LoraFxError: A part that another tool left, which nothing here can gather.
    """
    t: Any = tensor.detach()
    t = _fits(name, t.full_tensor() if is_sharded(t) else t, shape)
    return to_numpy(t.clone())  # a storage that numpy has seen cannot be resized, as FSDP1 does


def put(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole tensor, the same in every process, into a parameter or its shards.

    Raises:
        LoraFxError: As `whole`.
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        held: Any = parameter
        value = distribute_tensor(
            value.to(held.device), held.device_mesh, held.placements, src_data_rank=None
        )
    _fits(name, parameter, tuple(value.shape))
    with torch.no_grad():
        parameter.copy_(value)


def _fits(name: str, t: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    if tuple(t.shape) == shape or (shape is None and t.numel()):
        return t
    expected = f", not {list(shape)}" if shape is not None else ""
    raise LoraFxError(
        f"{name} has the shape {list(t.shape)} here{expected}: another tool keeps the rest",
        "gather it first: FSDP.summon_full_params(model), deepspeed.zero.GatheredParameters(…)",
    )
