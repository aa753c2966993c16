"""A model of transformers whose quantised weights stay the codes of its folder."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_fx.checkpoint.loaded_names import loaded_of
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.quantised.base import QuantisedWeight, below
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import Tensors
from lora_fx.files.sealed import unsealed
from lora_fx.fx.codes import LEVELS, Stored, declare, store
from lora_fx.fx.load.float_folder import misfit, on_meta, read_state
from lora_fx.patching import patched
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


EXPERT = re.compile(r"\.experts\.\d+\.")


def quantised_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, raw: JsonView, meta: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model whose quantised weights stay the codes of its file.

    Neither the quantiser's package nor a copy of the weights as numbers is needed.

    Raises:
        LoraFxError: A format that is not read, or tensors that do not fit the model.
    """
    said = config.quantization_config
    kind = said.get("quant_method") if isinstance(said, dict) else said
    del config.quantization_config
    with unsealed():
        held = {} if meta and not any(path.glob("*.safetensors")) else tensors(path)
        found, back = _loaded(held, quantised_weights(held, raw), raw)
    if not found and not meta:
        raise LoraFxError(
            f"{path}: quantised weights ({one_line(kind, 60)}), none of which is read",
            "use the checkpoint that it was quantised from",
        )
    with contextlib.nullcontext() if meta else _without_parameters():
        module = on_meta(cls, config, path) if meta else cls._from_config(config)
    own = dict(module.named_parameters())
    if lost := sorted(found.keys() - own.keys()):
        raise misfit(
            f"{path}: {type(module).__name__} has no parameters for {len(lost)} quantised weights: "
            f"{some(lost, 4)}"
        )
    plain = module.state_dict().keys() - found.keys()
    stored = {} if meta else {back.get(n, n): t for n, t in read_state(path).items()}
    state = {n: t for n, t in stored.items() if n in plain}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    for name, weight in found.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        turned, shape = type(layer).__name__ == "Conv1D", own[name].shape
        if weight.bits and weight.shape != tuple(shape[::-1] if turned else shape):
            raise misfit(
                f"{path}: {name!r} has codes of {list(weight.shape)}, expected {list(shape)}"
            )
        if meta:
            kind = weight.format.rpartition(" ")[2]
            kind = kind if kind in LEVELS else f"int{weight.bits}"
            declare(module, name, Stored(kind, tuple(shape), 1, own[name].dtype, turned))
        else:
            with unsealed():
                codes = weight.read()
            store(module, name, codes, dtype or torch.float32, shape, turned)
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as e:
        raise misfit(f"{path}: {one_line(e, 200)}") from e
    module.tie_weights()
    empty = [n for n, p in module.named_parameters() if p.is_meta and not meta]
    if empty:
        raise LoraFxError(
            f"{path}: {len(empty)} tensors are missing: {some(empty, 4)}",
            "is the download complete?",
        )
    kinds = Counter(w.format for w in found.values())
    notes = [f"{path}: {n} weights are read as codes: {kind}" for kind, n in kinds.items()]
    if not found:
        notes.append(f"{path}: its weights are quantised; shapes are those from before")
    parts = tuple(n.removesuffix("weight") for n in found)
    names = {back.get(n, n) for n in held if not EXPERT.search(n)}
    other = (n for n in names - plain if n.endswith(".bias") or not n.startswith(parts))
    if unused := sorted(other):
        notes.append(f"unused: {len(unused)} tensors of {path}: {some(unused, 4)}")
    return module, tuple(notes)


def _loaded(
    held: Tensors, found: Mapping[str, QuantisedWeight], raw: JsonView
) -> tuple[dict[str, QuantisedWeight], dict[str, str]]:
    """Quantised weights as the model names and stacks them, and other names: file → model."""
    some = next(iter(held.values()), None)
    sized = {n: replace(some, shape=w.shape) for n, w in found.items()} if some else {}
    loaded = loaded_of({**held, **sized}, raw)
    back = {old: new for new, old in loaded.names.items()}
    new = dict(found)
    for name, stack in loaded.stacks.items():
        parts = [new.pop(p.tensor) for p in stack.parts if p.tensor in found]
        if len(parts) == len(stack.parts):
            read = partial(lambda n, ws: below(n, [w.read() for w in ws]), name, parts)
            new[name] = replace(parts[0], shape=stack.info.shape, read=read)
    return {back.get(n, n): w for n, w in new.items()}, back


def _without_parameters() -> contextlib.AbstractContextManager[None]:
    """A block in which modules are built with their buffers, and with parameters on meta."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, p: nn.Parameter | None) -> None:
        plain(self, name, None if p is None else nn.Parameter(p.to("meta"), p.requires_grad))

    return patched(nn.Module, register_parameter=register)
