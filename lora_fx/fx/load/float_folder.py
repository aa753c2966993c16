"""A model of transformers with the weights of a folder, none of which is quantised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import Tensors, first_bytes, is_pickle
from lora_fx.files.sealed import unsealed
from lora_fx.fx.torch_pickles import pickled
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def float_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, meta: bool, *, strict: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model of a class with the weights of a folder or file, and notes.

    Args:
        cls: The class.
        config: Says how large the model is.
        path: The weights: a folder or a file.
        meta: Build without weights, on the meta device.
        strict: Every weight must have its parameter, and the reverse.

    Raises:
        LoraFxError: The model cannot be built, or the weights do not fit.
    """
    try:
        if meta:
            return on_meta(cls, config, path), ()
        state = read_state(path)
        module, info = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True,
        )  # fmt: skip
    except LoraFxError:
        raise
    except Exception as e:  # model classes raise whatever their config makes them raise
        raise LoraFxError(
            f"{config.name_or_path}: {cls.__name__} cannot be built: "
            f"{type(e).__name__}: {one_line(e, 200)}",
            "is config.json the config of this model?",
        ) from e
    return module, judge(module, info, path, strict=strict)


def on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    if config.dtype is None:  # as from_pretrained does: the first floating tensor decides
        with contextlib.suppress(LoraFxError), unsealed():  # no weights here is fine
            config.dtype = _first_floating_dtype(tensors(folder))
    with torch.device("meta"):
        return cls._from_config(config)


def _first_floating_dtype(stored: Tensors) -> torch.dtype | None:
    for info in stored.values():
        dtype: torch.dtype | None = getattr(torch, info.dtype, None)
        if dtype is not None and dtype.is_floating_point:
            return dtype
    return None


@unsealed()
def read_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, memory-mapped, so that only tensors that the model keeps are read."""
    from safetensors.torch import load_file

    infos = tensors(path)
    if not infos:
        raise LoraFxError(f"{path}: holds no tensors", "is the download complete?")
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(info.file for info in infos.values()):
        if is_pickle(first_bytes(file)):
            stored = pickled(file, mapped=True)
        else:
            stored = load_file(file)
        for name, tensor in stored.items():
            if infos[name].file == file:
                state[name] = tensor
    return state


def judge(module: PreTrainedModel, info: JsonView, path: Path, *, strict: bool) -> tuple[str, ...]:
    """Refuse weights that do not fit; say which are random.

    Args:
        module: The model as transformers loaded it.
        info: What transformers says of the loading.
        path: The weights, for messages.
        strict: No tensor may be missing or left over; else up to half may be missing.
    """
    for name, shape, expected in sorted(info["mismatched_keys"]):
        raise misfit(f"{path}: tensor {name!r} is {list(shape)}, expected {list(expected)}")
    problems = [*info["error_msgs"], *(info.get("conversion_errors") or {}).values()]
    if problems:
        raise misfit(f"{path}: {one_line(problems[0], 200)}")

    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    is_inexact = bool(missing or unexpected)
    if (strict and is_inexact) or 2 * len(missing) > len(module.state_dict()):
        faults = []
        if missing:
            faults.append(f"{len(missing)} of its tensors are missing: {some(missing, 4)}")
        if unexpected:
            faults.append(f"{len(unexpected)} of its tensors are unexpected: {some(unexpected, 4)}")
        raise misfit(f"{path} does not fit {type(module).__name__}: {'; '.join(faults)}")

    notes = []
    if missing:
        notes.append(
            f"{len(missing)} tensors have random values, since they are not in {path}: "
            f"{some(missing, 4)}"
        )
    if unexpected:
        notes.append(f"{len(unexpected)} tensors of {path} are not used: {some(unexpected, 4)}")
    return tuple(notes)


def misfit(what: str) -> LoraFxError:
    """An error about weights that do not fit their model."""
    return LoraFxError(what, "is config.json the config of these weights?")
