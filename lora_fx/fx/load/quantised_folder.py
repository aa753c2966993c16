"""A model of transformers whose quantised weights stay the codes of its folder."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_fx.checkpoint.loaded_names import loaded_of
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.quantised.matrices import below
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import Tensors
from lora_fx.files.sealed import unsealed
from lora_fx.fx.codes import LEVELS, Stored
from lora_fx.fx.load.float_folder import misfit, on_meta, read_state
from lora_fx.fx.quantised_parameters import declare, put_codes
from lora_fx.ir.quantised import Quantised
from lora_fx.patching import patched
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXPERT = re.compile(r"\.experts\.\d+\.")
"""Tensors of one expert of several, which the model stacks."""


def quantised_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, raw: JsonView, meta: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model whose quantised weights stay the codes of its file.

    Neither the quantiser's package nor a copy of the weights as numbers is needed.

    Raises:
        LoraFxError: A format that is not read, or tensors that do not fit the model.
    """
    method = config.quantization_config
    if isinstance(method, dict):
        method = method.get("quant_method")
    del config.quantization_config
    stored: Tensors = {}
    with unsealed():
        if not meta or any(path.glob("*.safetensors")):
            stored = tensors(path)
        weights, model_names = _as_loaded(stored, quantised_weights(stored, raw), raw)
    if not weights and not meta:
        raise LoraFxError(
            f"{path}: it has quantised weights ({one_line(method, 60)}) in a format that lora-fx "
            "does not read",
            "use the checkpoint that it was quantised from",
        )

    if meta:
        module = on_meta(cls, config, path)
    else:
        with _without_parameters():
            module = cls._from_config(config)
    _expect_parameters(module, weights, path)
    plain_names = module.state_dict().keys() - weights.keys()
    state: dict[str, torch.Tensor] = {}
    if not meta:
        state = _plain_state(path, model_names, plain_names)
    _put_codes(module, weights, state, path, meta)
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as e:
        raise misfit(f"{path}: {one_line(e, 200)}") from e
    module.tie_weights()
    if not meta:
        _check_filled(module, path)

    notes = []
    for format_name, count in Counter(weight.format for weight in weights.values()).items():
        notes.append(f"{path}: {count} quantised weights are read as codes: {format_name}")
    if not weights:
        notes.append(f"{path}: its weights are quantised; the shapes are those before quantisation")
    unused = _unused_names(stored, weights, model_names, plain_names)
    if unused:
        notes.append(f"{len(unused)} tensors of {path} are not used: {some(unused, 4)}")
    return module, tuple(notes)


def _expect_parameters(
    module: PreTrainedModel, weights: Mapping[str, QuantisedWeight], path: Path
) -> None:
    """Refuse quantised weights that the model has no parameters for."""
    names = {name for name, _ in module.named_parameters()}
    unmatched = sorted(weights.keys() - names)
    if unmatched:
        raise misfit(
            f"{path}: {type(module).__name__} has no parameters for {len(unmatched)} quantised "
            f"weights: {some(unmatched, 4)}"
        )


def _plain_state(
    path: Path, model_names: Mapping[str, str], plain_names: Set[str]
) -> dict[str, torch.Tensor]:
    """The tensors of the file that are no part of a quantised weight, as the model names them."""
    state = {}
    for file_name, tensor in read_state(path).items():
        name = model_names.get(file_name, file_name)
        if name in plain_names:
            state[name] = tensor
    return state


def _put_codes(
    module: PreTrainedModel,
    weights: Mapping[str, QuantisedWeight],
    state: Mapping[str, torch.Tensor],
    path: Path,
    meta: bool,
) -> None:
    """Put codes in the place of parameters; on the meta device only their kind and shape.

    The weights that the codes stand for have the dtype of the first floating tensor of `state`.

    Raises:
        LoraFxError: A quantised weight has another shape than its parameter.
    """
    parameters = dict(module.named_parameters())
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    for name, weight in weights.items():
        parameter = parameters[name]
        is_transposed = _is_conv1d(module, name)
        _check_codes(name, weight, parameter, is_transposed, path)
        if meta:
            kind = _kind_of_codes(weight)
            shape = tuple(parameter.shape)
            declare(module, name, Stored(kind, shape, 1, parameter.dtype, is_transposed))
        else:
            with unsealed():
                codes = weight.read()
            put_codes(module, name, codes, dtype or torch.float32, parameter.shape, is_transposed)


def _is_conv1d(module: nn.Module, name: str) -> bool:
    """Whether a parameter is that of a Conv1D of transformers, stored [in, out]."""
    layer = module.get_submodule(name.rpartition(".")[0])
    return type(layer).__name__ == "Conv1D"


def _check_codes(
    name: str, weight: QuantisedWeight, parameter: nn.Parameter, is_transposed: bool, path: Path
) -> None:
    """Refuse codes whose shape differs from the parameter's, if the file has the shape."""
    shape = parameter.shape
    expected = tuple(shape[::-1]) if is_transposed else tuple(shape)
    if weight.bits and weight.shape != expected:
        raise misfit(
            f"{path}: tensor {name!r} has codes of {list(weight.shape)}, expected {list(shape)}"
        )


def _kind_of_codes(weight: QuantisedWeight) -> str:
    """The kind of the codes of a weight, as in `LEVELS`; int4 … for whole numbers."""
    kind = weight.format.rpartition(" ")[2]
    if kind in LEVELS:
        return kind
    return f"int{weight.bits}"


def _check_filled(module: nn.Module, path: Path) -> None:
    """Refuse a model of whose parameters some got no tensor."""
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise LoraFxError(
            f"{path}: {len(empty)} tensors are missing: {some(empty, 4)}",
            "is the download complete?",
        )


def _unused_names(
    stored: Tensors,
    weights: Mapping[str, QuantisedWeight],
    model_names: Mapping[str, str],
    plain_names: Set[str],
) -> list[str]:
    """Tensors of the file that are neither weights of the model nor a part of quantised ones."""
    layers = tuple(name.removesuffix("weight") for name in weights)
    unused = set()
    for file_name in stored:
        if EXPERT.search(file_name):
            continue
        name = model_names.get(file_name, file_name)
        if name in plain_names:
            continue
        if name.endswith(".bias") or not name.startswith(layers):
            unused.add(name)
    return sorted(unused)


def _as_loaded(
    stored: Tensors, weights: Mapping[str, QuantisedWeight], raw: JsonView
) -> tuple[dict[str, QuantisedWeight], dict[str, str]]:
    """Quantised weights as the model names and stacks them, and other names: file → model."""
    infos = dict(stored)
    any_info = next(iter(stored.values()), None)
    if any_info is not None:
        for name, weight in weights.items():
            infos[name] = replace(any_info, shape=weight.shape)
    loaded = loaded_of(infos, raw)
    model_names = {file_name: name for name, file_name in loaded.names.items()}

    stacked = dict(weights)
    for name, stack in loaded.stacks.items():
        members = [stacked.pop(part.tensor) for part in stack.parts if part.tensor in weights]
        if len(members) == len(stack.parts):
            read = partial(_read_stacked, name, members)
            stacked[name] = replace(members[0], shape=stack.info.shape, read=read)
    by_model_name = {model_names.get(name, name): weight for name, weight in stacked.items()}
    return by_model_name, model_names


def _read_stacked(name: str, members: Sequence[QuantisedWeight]) -> Quantised:
    """The codes of a stack: the codes of its members, concatenated."""
    return below(name, [member.read() for member in members])


def _without_parameters() -> contextlib.AbstractContextManager[None]:
    """A block in which modules are built with their buffers, and with parameters on meta."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        plain(self, name, parameter)

    return patched(nn.Module, register_parameter=register)
