"""A model of transformers with the weights of a folder, none of which is quantised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import first_bytes, is_pickle
from lora_fx.files.sealed import unsealed
from lora_fx.fx.tensors import pickled
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def float_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, meta: bool, *, strict: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model of a class and its notes."""
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
            "is config.json that of this model?",
        ) from e
    return module, judge(module, info, path, strict=strict)


def on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    if config.dtype is None:  # as from_pretrained does: the first floating tensor decides
        with contextlib.suppress(LoraFxError), unsealed():  # no weights here is fine
            names = (getattr(torch, t.dtype, None) for t in tensors(folder).values())
            config.dtype = next((d for d in names if d is not None and d.is_floating_point), None)
    with torch.device("meta"):
        return cls._from_config(config)


@unsealed()
def read_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors; memory-mapped, so that only what the model keeps is read."""
    from safetensors.torch import load_file

    found = tensors(path)
    if not found:
        raise LoraFxError(f"{path}: holds no tensor", "is the download complete?")
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(info.file for info in found.values()):
        held = pickled(file, mapped=True) if is_pickle(first_bytes(file)) else load_file(file)
        state |= {n: t for n, t in held.items() if found[n].file == file}
    return state


def judge(module: PreTrainedModel, info: JsonView, path: Path, *, strict: bool) -> tuple[str, ...]:
    """Refuse weights that do not fit; say which are random."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise misfit(f"{path}: tensor {name!r} is {list(found)}, expected {list(expected)}")
    problems = [*info["error_msgs"], *(info.get("conversion_errors") or {}).values()]
    if problems:
        raise misfit(f"{path}: {one_line(problems[0], 200)}")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    total = len(module.state_dict())
    if (strict and (missing or unexpected)) or 2 * len(missing) > total:
        what = [f"{len(n)} of its tensors {w}: {some(n, 4)}" for n, w in
                ((missing, "are missing"), (unexpected, "are unexpected")) if n]  # fmt: skip
        raise misfit(f"{path} does not fit {type(module).__name__}: {'; '.join(what)}")
    notes = (
        (missing, f"random weights: {len(missing)} tensors are not in {path}: {some(missing, 4)}"),
        (unexpected, f"unused: {len(unexpected)} tensors of {path}: {some(unexpected, 4)}"),
    )
    return tuple(note for names, note in notes if names)


def misfit(what: str) -> LoraFxError:
    """An error about weights that do not fit their model."""
    return LoraFxError(what, "is config.json that of these weights?")
