"""A tiny Llama folder, an adapter of it that has a probe, and merges that went wrong."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.passes.verbs.probe_adapter import add_to_adapter
from tests.fx.train.language_models import folder
from tests.probe.nets import multiplied

INCLUDE = ["q_proj", "v_proj", "down_proj"]
SHARD = "model.safetensors"
Tensors = dict[str, Array]


captured = functools.cache(lambda base: lora_fx.capture(str(base)))
"""The capture of a folder, which is made once."""


def module_of(base: Path, seed: int = 1) -> AdaptedModule:
    """The model of a folder with an adapter of rank 2, as if it had been trained."""
    module = lora_fx.insert(captured(base), rank=2, alpha=4, include=INCLUDE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.07 * torch.randn(parameter.shape, generator=generator))
    return module


def with_probe(module: AdaptedModule, path: Path, kind: str = "full") -> Path:
    """Save the module's adapter as train does."""
    lora_fx.save_adapter(module.adapter(), path)
    _, notes = add_to_adapter(str(path), module, kind)
    assert not notes
    return path


def made(path: Path) -> Path:
    """A folder with a base, and an adapter with a probe, named `adapter`."""
    folder(path / "base")
    with_probe(module_of(path / "base"), path / "adapter")
    return path


def merged_without_words(base: Path, adapter: Adapter, out: Path) -> Tensors:
    """The tensors of a merge of any adapter."""
    lora_fx.merge(base, adapter, out, force=True)
    return load_file(out / SHARD)


def changed(folder_of_all: Path, change: Callable[[Adapter], Adapter]) -> Tensors:
    """The tensors of the base with the adapter changed."""
    adapter = lora_fx.load_adapter(folder_of_all / "adapter")
    return merged_without_words(folder_of_all / "base", change(adapter), folder_of_all / "other")


def base_tensors(folder_of_all: Path) -> Tensors:
    return load_file(folder_of_all / "base" / SHARD)


def other_base(folder_of_all: Path) -> Tensors:
    """A merge into another base."""
    tensors = load_file(folder_of_all / "merged" / SHARD)
    return {name: (value + np.float32(0.01)) for name, value in tensors.items()}


def with_nan(folder_of_all: Path) -> Tensors:
    tensors = load_file(folder_of_all / "merged" / SHARD)
    name = "model.layers.0.mlp.down_proj.weight"
    value = tensors[name].copy()
    value[0, 0] = np.nan
    return {**tensors, name: value}


def without_v(adapter: Adapter) -> Adapter:
    """An adapter without a group: every v."""
    for layer in range(2):
        adapter = multiplied(adapter, 0, f"model.layers.{layer}.self_attn.v")
    return adapter


def another(folder_of_all: Path) -> Tensors:
    adapter = module_of(folder_of_all / "base", seed=7).adapter()
    return merged_without_words(folder_of_all / "base", adapter, folder_of_all / "other")


SPOILT: Mapping[str, tuple[Callable[[Path], Tensors], str]] = {
    "as it is": (lambda path: load_file(path / "merged" / SHARD), "right"),
    "the base alone": (base_tensors, "no effect"),
    "twice the scale": (
        lambda path: changed(path, functools.partial(multiplied, factor=2)), "scaled by 2",
    ),
    "half the scale": (
        lambda path: changed(path, functools.partial(multiplied, factor=0.5)), "scaled by 0.5",
    ),
    "a scale between": (
        lambda path: changed(path, functools.partial(multiplied, factor=1.4)), "scaled by 1.4",
    ),
    "a group left out": (lambda path: changed(path, without_v), "without v"),
    "another adapter": (another, "differs"),
    "another base": (other_base, "differs"),
    "not a number": (with_nan, "not finite"),
}  # fmt: skip
"""What the weights of a merged folder are under its header, and the verdict on it."""


def put(tensors: Tensors, path: Path) -> None:
    """Write other tensors under the header of a folder's shard."""
    with safe_open(path / SHARD, "np") as file:
        metadata = file.metadata()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()},
              path / SHARD, metadata)  # fmt: skip


def put_text(path: Path, text: str | None) -> None:
    """Write another probe into the header of a folder's shard; None takes it out."""
    with safe_open(path / SHARD, "np") as file:
        metadata = dict(file.metadata())
    metadata.pop("lora_fx.probe")
    if text is not None:
        metadata["lora_fx.probe"] = text
    save_file(load_file(path / SHARD), path / SHARD, metadata)


def text_of(path: Path) -> str:
    """The probe in a folder's shard."""
    with safe_open(path / SHARD, "np") as file:
        return str(file.metadata()["lora_fx.probe"])


def cast(path: Path, dtype: torch.dtype) -> None:
    """Store a folder in another dtype, and say so in its config."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    with safe_open(path / SHARD, "np") as file:
        metadata = file.metadata()
    save({name: value.to(dtype) for name, value in load(path / SHARD).items()},
         path / SHARD, metadata)  # fmt: skip
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**config, "dtype": name}))


def copy(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to))


def renamed(adapter: Adapter) -> Adapter:
    """The same updates in another order, which is the same adapter."""
    return replace(adapter, entries=dict(reversed([*adapter.entries.items()])))
