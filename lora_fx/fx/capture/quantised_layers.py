"""Layers that other packages have quantised, as plain layers over the same codes.

Tracing goes through none of them: bitsandbytes' parameters are lost under fake tensors, torchao's
are subclasses, kernels of GPTQ and AWQ are calls into other libraries. So a capture is one of a
second tree, in which each of them is a plain linear layer or lookup table whose weight is codes
(see lora_fx.fx.codes). The user's model is not touched, and its package is not imported.

What the tensors of a layer say is read as from a file: see lora_fx.files.quantised. Layers that
quantise x as well (bitsandbytes' LLM.int8, torchao's dynamic activations) keep it in floats here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised import torchao
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.fx.codes import beside, store
from lora_fx.fx.tensors import owner, to_numpy
from lora_fx.ir.quantised import Quantised

PACKAGES: Mapping[str, Mapping[str, object]] = {
    "bitsandbytes": {},
    "gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_gptq": {"quant_method": "gptq"},
    "awq": {"quant_method": "awq"},
    "compressed_tensors": {"quant_method": "compressed-tensors"},
}
"""Packages whose layers are known by their class → what a config.json would say of their layout."""
PACKED = ("weight_packed", "weight_scale")
"""Parameters that compressed-tensors puts on torch's own layers."""


class PlainLinear(nn.Linear):
    """A linear layer in the dtype that the quantised one computes in; None is that of x."""

    compute: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·W̃ᵀ + bias, in the dtype of x."""
        dtype = self.compute or x.dtype
        y: torch.Tensor = F.linear(_in(x, dtype), _in(self.weight, dtype), _in(self.bias, dtype))
        return y if y.dtype == x.dtype else y.to(x.dtype)


def _in(t: Any, dtype: torch.dtype) -> Any:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def plain_layers(model: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, tuple[str, ...]]:
    """(the model without layers of other packages, what has to be said of them).

    It is the model itself where it has none.

    Args:
        model: The user's.
        dtype: That of its other parameters.

    Raises:
        LoraFxError: A layer whose tensors cannot be read, or not as codes.
    """
    found = {p: read for p, m in model.named_modules() if (read := _reader(p, m)) is not None}
    if not found:
        return model, ()
    tree, formats = beside(model), dict[str, int]()
    for path, read in found.items():
        layer, (kind, q) = model.get_submodule(path), read()
        parent, leaf = owner(tree, path)
        own = _dtype(layer, dtype)
        new = _plain(layer, q.shape, own)
        new.train(layer.training)
        parent._modules[leaf] = new
        weight = f"{path}.weight"
        store(tree, weight, q, own, q.shape, turned=False)
        formats[kind] = formats.get(kind, 0) + 1
    return tree, tuple(f"{n} layers are read as codes: {kind}" for kind, n in formats.items())


def _plain(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        rows, width = shape
        return nn.Embedding(rows, width, layer.padding_idx, device="meta", dtype=dtype)
    out, inner = shape
    bias = getattr(layer, "bias", None)
    new = PlainLinear(inner, out, bias=False, device="meta", dtype=dtype)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    if getattr(layer, "compute_type_is_set", False):
        new.compute = getattr(layer, "compute_dtype", None)
    return new


def _dtype(layer: nn.Module, others: torch.dtype | None) -> torch.dtype:
    """The dtype that a layer's numbers have before they meet x."""
    weight = getattr(layer, "weight", None)
    told = getattr(getattr(weight, "quant_state", None), "dtype", None)
    if told is None and weight is not None and weight.is_floating_point():
        told = weight.dtype  # a subclass says what it stands for
    return told or others or torch.float32


Read = Callable[[], tuple[str, Quantised]]


def _reader(path: str, layer: nn.Module) -> Read | None:
    """What reads a layer's codes; None for a layer that holds numbers."""
    held = [p for p in layer._parameters.values() if p is not None]
    package = type(layer).__module__.partition(".")[0]
    for p in held:
        if type(p.data).__module__.startswith("torchao."):
            return partial(_of_torchao, path, p.data)
    known = PACKAGES.get(package)
    if known is None and any(name in layer._parameters for name in PACKED):
        known = PACKAGES["compressed_tensors"]
    if known is None or not (held or "qweight" in layer._buffers):
        return None
    return partial(_of_state, path, layer, known)


def _of_state(path: str, layer: nn.Module, said: Mapping[str, object]) -> tuple[str, Quantised]:
    """By the tensors of the layer's state, which are those of a file."""
    state = {f"{path}.{k}": to_numpy(v) for k, v in _state(layer).items()}
    given: Callable[[Array], Array] = np.asarray
    weights = quantised_weights(state, {"quantization_config": dict(said)}, given)
    weight = weights.get(f"{path}.weight")
    if weight is None:
        raise LoraFxError(
            f"{path}: this {type(layer).__name__} holds no codes yet: {', '.join(state)}",
            "move the model to its device first, which quantises it",
        )
    return weight.format, weight.read()


def _state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's tensors as its package saves them; the layer stays as it is.

    On CPUs with AVX512-BF16 the first forward of a Linear4bit in eval mode reorders its codes in
    place, with scales in bfloat16 [blocks of a row, rows]. Its state_dict() (bitsandbytes 0.50)
    takes the order back in place as well, and forgets to turn the scales, or quantises them anew.
    """
    told = getattr(getattr(layer, "weight", None), "quant_state", None)
    if not getattr(told, "packing_format_for_cpu", False):
        return layer.state_dict()
    other: Any = copy.deepcopy(layer)
    other.weight.quant_state.original_nested = False
    state: dict[str, torch.Tensor] = other.state_dict()
    return {k: v.T.reshape(-1) if k == "weight.absmax" else v for k, v in state.items()}


def _of_torchao(path: str, weight: Any) -> tuple[str, Quantised]:
    """By the arrays of torchao's tensor classes."""
    kind, name = type(weight).__name__, f"{path}.weight"
    if kind == "NF4Tensor":
        parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
        arrays = [to_numpy(t) for t in (*parts, weight.scaler_mean, weight.nf4)]
        return "torchao nf4", torchao.nf4(name, tuple(weight.shape), *arrays)
    if not hasattr(weight, "qdata"):
        raise LoraFxError(f"{name}: torchao's {kind} is not read", "its weight-only classes are")
    zero = getattr(weight, "zero_point", None)
    q = torchao.affine(
        name,
        to_numpy(weight.qdata),
        to_numpy(weight.scale),
        None if zero is None else to_numpy(zero),
        tuple(weight.block_size or ()),
    )
    return f"torchao {kind}", q
