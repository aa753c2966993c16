"""Layers that other packages have quantised, as plain layers over the same codes.

Tracing goes through none of them: bitsandbytes' parameters are lost under fake tensors, torchao's
are subclasses, kernels of GPTQ and AWQ are calls into other libraries. So a capture is one of a
second tree, in which each of them is a plain linear layer or lookup table whose weight is codes
(see lora_fx.fx.codes). The user's model is not touched, and its package is not imported.

What the tensors of a layer say is read as from a file: see lora_fx.files.quantised. Layers that
quantise x as well (bitsandbytes' LLM.int8, torchao's dynamic activations) keep it in floats here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.consistency import checked, wrong
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.quantised.weight_parts import FLOAT8
from lora_fx.fx.codes import LINEAR_IN, beside, store
from lora_fx.fx.tensors import to_numpy
from lora_fx.ir.bit_packing import unpacked
from lora_fx.ir.quantised import Quantised

PACKAGES: Mapping[str, Mapping[str, object]] = {
    "bitsandbytes": {},
    "gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_gptq": {"quant_method": "gptq"},
    "awq": {"quant_method": "awq"},
    "compressed_tensors": {"quant_method": "compressed-tensors"},
}
"""Packages whose layers are known by their class → what a config.json would say of their layout."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""How the names of a module's hooks begin that are called around its forward."""


class PlainLinear(nn.Linear):
    """A linear layer in the dtype of x; it trains in that which the quantised one computes in."""

    compute: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·W̃ᵀ + bias."""
        dtype = (self.compute if self.training else None) or x.dtype
        given = x, _in(self.weight, dtype), _in(self.bias, dtype)
        return F.linear(*given) if dtype == x.dtype else LINEAR_IN(*given)


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
    found = [(p, *r) for p, m in model.named_modules() for r in _readers(p, m)]
    if not found:
        return model, ()
    tree, formats = beside(model), dict[str, int]()
    for path, leaf, read in found:
        layer, (kind, q) = model.get_submodule(path), read()
        old, own = tree.get_submodule(path), _dtype(layer, leaf, dtype)
        if _is_plain(layer):
            new = _plain(layer, q.shape, own)
            # hooks are the user's; what replaced forward was the package's: see _readers
            new.__dict__ |= {k: v for k, v in vars(old).items() if k.startswith(HOOKS)}
            new.train(layer.training)
            tree = new if old is tree else tree
            for parent in tree.modules():  # a layer may have several names
                names = [n for n, child in parent._modules.items() if child is old]
                parent._modules |= dict.fromkeys(names, new)
        store(tree, f"{path}.{leaf}".lstrip("."), q, own, q.shape, turned=False)
        kind += "; x stays in floats here" if _quantises_x(layer) else ""
        kind += "; this CPU's kernel has rounded their scales" if is_packed(layer) else ""
        formats[kind] = formats.get(kind, 0) + 1
    return tree, tuple(f"{n} layers are read as codes: {kind}" for kind, n in formats.items())


def _is_plain(layer: nn.Module) -> bool:
    """False where a layer has code of its own, whose weight alone is another."""
    run = type(layer).forward
    own = run in (nn.Linear.forward, nn.Embedding.forward)
    return own or run.__module__.partition(".")[0] in PACKAGES


def _package(cls: type) -> str:
    """The package that a class, or what it inherits from, is of."""
    names = [c.__module__.partition(".")[0] for c in cls.__mro__]
    return next((n for n in names if n in (*PACKAGES, "torchao")), names[0])


def _plain(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        rows, width = shape
        return nn.Embedding(rows, width, layer.padding_idx, device="meta", dtype=dtype)
    out, inner = shape
    bias = getattr(layer, "bias", None)
    new = PlainLinear(inner, out, bias=False, device="meta", dtype=dtype)
    new.compute = getattr(layer, "compute_dtype", None)  # of bitsandbytes' layers in 4 bits
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return new


def _dtype(layer: nn.Module, leaf: str, others: torch.dtype | None) -> torch.dtype:
    """The dtype that a layer's numbers have before they meet x."""
    weight = getattr(layer, leaf, None)
    state = getattr(weight, "quant_state", None)
    told = getattr(state, "original_dtype", None) or getattr(state, "dtype", None)
    if told is None and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        told = weight.dtype if weight.dtype.itemsize > 1 else None  # a subclass says it
    return told or others or torch.float32


Read = Callable[[], tuple[str, Quantised]]
PACKS = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' layers of 4 bits."""


def _readers(path: str, layer: nn.Module) -> Iterator[tuple[str, Read]]:
    """The parameters of a layer that hold codes, each with what reads them.

    Raises:
        LoraFxError: A layer whose forward is no more that of its class, which codes cannot keep.
    """
    held = {n: p for n, p in layer._parameters.items() if p is not None}
    tensors = {n: p for n, p in held.items() if _package(type(p.data)) == "torchao"}
    for leaf, p in tensors.items():
        yield leaf, partial(_of_torchao, path, p.data)
    awq = "Awq" in type(layer).__name__  # gptqmodel's
    known = PACKAGES.get("awq" if awq else _package(type(layer)))
    if known is None and _is_compressed(held):
        known = PACKAGES["compressed_tensors"]
    packed = _is_compressed(held) or "qweight" in layer._buffers
    numbers = all(type(p) is nn.Parameter and p.is_floating_point() for p in held.values())
    coded = known is not None and (packed or not numbers)
    if coded:
        yield "weight", partial(_of_state, path, layer, known or {})
    given = layer.__dict__.get("forward") if coded or tensors else None
    given = getattr(given, "func", getattr(given, "__func__", given))  # accelerate's is a partial
    where = getattr(given, "__globals__", {}).get("__name__", "").partition(".")[0]
    replaced = given is not None and where not in (*PACKAGES, "accelerate")
    if (replaced and _is_plain(layer)) or (coded and not _is_plain(layer)):
        raise LoraFxError(
            f"{path}: this quantised {type(layer).__name__} has a forward of its own",
            "put what it does beside x·Wᵀ into a hook, or into the module around it",
        )


def _is_compressed(held: Mapping[str, nn.Parameter]) -> bool:
    weight = held.get("weight")
    narrow = weight is not None and weight.dtype.itemsize == 1
    return "weight_packed" in held or ("weight_scale" in held and narrow)


def _of_state(path: str, layer: nn.Module, said: Mapping[str, object]) -> tuple[str, Quantised]:
    """By the tensors of the layer's state, which are those of a file."""
    state = {f"{path}.{k}": to_numpy(v) for k, v in _tensors(layer).items()}
    weights = quantised_weights(state, {"quantization_config": dict(said)})
    weight = weights.get(f"{path}.weight")
    if weight is None:
        raise LoraFxError(
            f"{path}: this {type(layer).__name__} holds no codes yet: {', '.join(state)}",
            "move the model to its device first, which quantises it",
        )
    return weight.format, weight.read()


def _tensors(layer: nn.Module) -> Mapping[str, torch.Tensor]:
    """The tensors that a layer's package would put into a file."""
    weight: Any = layer._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is None and not isinstance(layer, nn.Embedding):
        return layer.state_dict()
    # bitsandbytes has none of a table, and that of a packed layer changes it in place, wrongly
    if state is None:
        scale = getattr(weight, "SCB", None)
        return {} if scale is None else {"weight": weight.data, "SCB": scale}
    codes, told = weight.data, {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    if is_packed(layer):  # in tiles of 32 rows, whose halves lie in the halves of a byte
        halves = codes.reshape(-1, 32)
        tiles = torch.cat([halves & 15, halves >> 4], 1).reshape(len(codes) // 32, -1, 32, 2)
        pairs = tiles.transpose(1, 2).reshape(-1, 2)
        codes = pairs[:, :1] << 4 | pairs[:, 1:]
        told["weight.absmax"] = state.absmax.T.reshape(-1)
    return {"weight": codes, **told}


def is_packed(layer: nn.Module) -> bool:
    """True where bitsandbytes has put the weight into an order for this CPU, without gradient."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def keep_trainable(model: nn.Module) -> list[nn.Module]:
    """Forbid bitsandbytes to pack the layers of a live model at their next run in eval mode.

    Returns:
        Those that may pack themselves; `let_pack` allows it again.

    Raises:
        LoraFxError: It has done so, and nothing gives the scales back that it rounded.
    """
    for path, layer in model.named_modules():
        if is_packed(layer):
            raise LoraFxError(
                f"{path}: bitsandbytes has packed this layer for this CPU, and it has no gradient",
                "load the model anew and attach before its first run, or use lora_fx.insert",
            )
    layers = [m for m in model.modules() if getattr(m, PACKS, False)]
    let_pack(layers, packs=False)
    return layers


def let_pack(layers: Iterable[nn.Module], *, packs: bool = True) -> None:
    """Undo keep_trainable."""
    for layer in layers:
        setattr(layer, PACKS, packs)


def _quantises_x(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    scheme = getattr(layer, "quantization_scheme", None)  # compressed-tensors'
    names = ("act_quant_kwargs", "activation_quantization")  # torchao's
    told = [*(getattr(weight, n, None) for n in names), getattr(scheme, "input_activations", None)]
    llm_int8 = hasattr(weight, "SCB") and isinstance(layer, nn.Linear)
    return llm_int8 or any(t is not None for t in told)


def _of_torchao(path: str, weight: Any) -> tuple[str, Quantised]:
    """By the arrays of torchao's tensor classes."""
    kind, name = type(weight).__name__, f"{path}.weight"
    if kind == "NF4Tensor":
        parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
        arrays = [to_numpy(t) for t in (*parts, weight.scaler_mean, weight.nf4)]
        return "torchao nf4", nf4(name, tuple(weight.shape), *arrays)
    if not hasattr(weight, "qdata"):
        raise LoraFxError(f"{name}: torchao's {kind} is not read", "its weight-only classes are")
    data, scale, zero = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    given = to_numpy(data), to_numpy(scale), None if zero is None else to_numpy(zero)
    return f"torchao {kind}", affine(name, *given, tuple(weight.block_size or ()))


# The arrays of torchao's tensor classes (0.18).
#
#     IntxUnpackedToInt8Tensor   qdata int8 in the shape of the weight, scale and zero_point a
#                                number a block, block_size a number an axis
#     Int8Tensor                 the same; zero_point may be None
#     Float8Tensor               qdata float8; block_size may be empty: one scale
#     NF4Tensor                  quantized_data uint8, the first code in the high half, blocks along
#                                the flattened weight; quantized_scalers int8 [blocks],
#                                quantization_factor [scaler blocks] and scaler_mean in the dtype of
#                                the weight: scale = quantized_scalers / factor + mean; nf4 [16]
#
# W = (qdata − zero_point) · scale, made in float32 or in the dtype of the weight
# (`_dequantize_affine_no_dtype_check`, `_dequantize_affine_float8` in quantization/quant_primitives
# .py); the scales of NF4Tensor are rounded to that dtype twice, its products once
# (`get_original_weight`, quantization/quantize_/workflows/nf4/nf4_tensor.py).


def affine(
    where: str, qdata: Array, scale: Array, zero_point: Array | None, block_size: Sequence[int]
) -> Quantised:
    """A tensor of the first three classes.

    Args:
        where: The name of the weight, for messages.
        qdata: Codes.
        scale: A number a block.
        zero_point: The same; None for none.
        block_size: One number an axis; empty for one block.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    if qdata.dtype != np.int8 and str(qdata.dtype) not in FLOAT8:
        raise wrong(where, f"has qdata of {qdata.dtype}", "int8 or float8")
    block = tuple(map(int, block_size)) or qdata.shape
    if scale.size == 1:
        scale = scale.reshape(1)
    return checked(where, Quantised(qdata, scale, zero_point, block))


def nf4(
    where: str,
    shape: tuple[int, ...],
    data: Array,
    scalers: Array,
    factor: Array,
    mean: Array,
    levels: Array,
) -> Quantised:
    """An NF4Tensor.

    Args:
        where: The name of the weight, for messages.
        shape: Of the weight.
        data: quantized_data.
        scalers: quantized_scalers.
        factor: quantization_factor.
        mean: scaler_mean.
        levels: nf4.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    size, blocks, outer = math.prod(shape), scalers.size, factor.size
    if data.dtype != np.uint8 or 2 * data.size != size or not blocks or size % blocks:
        found = f"of {list(shape)} has {data.size} bytes of {data.dtype} in {blocks} blocks"
        raise wrong(where, found, "two codes a byte and blocks of one length")
    if not outer or blocks % outer or mean.size != 1 or not factor.all():
        found = f"has {blocks} scales in {outer} blocks with {mean.size} means"
        raise wrong(where, found, "blocks of one length, factors that are not 0, one mean")
    wide = scalers.reshape(outer, -1).astype(factor.dtype) / factor.reshape(-1, 1)
    scale = wide.reshape(-1) + mean.reshape(1)
    codes = unpacked(data.reshape(-1), 4, high=True).reshape(shape)
    return checked(where, Quantised(codes, scale, None, (size // blocks,), levels))
