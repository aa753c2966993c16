"""Layers that other packages have quantised, as plain layers over the same codes.

Tracing goes through none of them: bitsandbytes' parameters are lost under fake tensors, torchao's
are subclasses, kernels of GPTQ and AWQ are calls into other libraries. So a capture is one of a
second tree, in which each of them is a plain linear layer or lookup table whose weight is codes
(see lora_fx.fx.codes). The user's model is not touched, and its package is not imported.

What the tensors of a layer say is read as from a file: see lora_fx.files.quantised. Layers that
quantise x as well (bitsandbytes' LLM.int8, torchao's dynamic activations) keep it in floats here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.fx.capture.torchao import torchao_weight
from lora_fx.fx.codes import LINEAR_IN
from lora_fx.fx.quantised_parameters import put_codes
from lora_fx.fx.sharing_copy import sharing_copy
from lora_fx.fx.tensors import to_numpy
from lora_fx.ir.quantised import Quantised

PACKAGES: Mapping[str, Mapping[str, object]] = {
    "bitsandbytes": {},
    "gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_gptq": {"quant_method": "gptq"},
    "awq": {"quant_method": "awq"},
    "compressed_tensors": {"quant_method": "compressed-tensors"},
}
"""Packages whose layers are known by their class → the layout, as config.json would name it."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Beginnings of the names under which a module holds the hooks around its forward."""


class PlainLinear(nn.Linear):
    """A linear layer in the dtype of x; it trains in that which the quantised one computes in."""

    compute: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·W̃ᵀ + bias."""
        dtype = x.dtype
        if self.training and self.compute is not None:
            dtype = self.compute
        weight = _in(self.weight, dtype)
        bias = _in(self.bias, dtype)
        if dtype == x.dtype:
            return F.linear(x, weight, bias)
        return LINEAR_IN(x, weight, bias)


def _in(tensor: Any, dtype: torch.dtype) -> Any:
    if tensor is None or tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype)


def plain_layers(model: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, tuple[str, ...]]:
    """(the model without layers of other packages, notes on them for the user).

    It is the model itself where it has none.

    Args:
        model: The user's.
        dtype: That of its other parameters.

    Raises:
        LoraFxError: A layer whose tensors cannot be read, or not as codes.
    """
    coded: list[tuple[str, str, Read]] = []
    for path, layer in model.named_modules():
        coded += [(path, leaf, read) for leaf, read in _readers(path, layer)]
    if not coded:
        return model, ()

    tree = sharing_copy(model)
    counts: dict[str, int] = {}
    for path, leaf, read in coded:
        layer = model.get_submodule(path)
        kind, codes = read()
        layer_dtype = _dtype(layer, leaf, dtype)
        if _is_plain(layer):
            tree = _with_plain_layer(tree, path, layer, codes.shape, layer_dtype)
        name = f"{path}.{leaf}".lstrip(".")
        put_codes(tree, name, codes, layer_dtype, codes.shape, turned=False)
        if _quantises_x(layer):
            kind += "; x stays in floats here"
        if is_packed(layer):
            kind += "; this CPU's kernel has rounded their scales"
        counts[kind] = counts.get(kind, 0) + 1
    notes = (
        f"{count} quantised layers are read as codes: {kind}" for kind, count in counts.items()
    )
    return tree, tuple(notes)


def _with_plain_layer(
    tree: nn.Module, path: str, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> nn.Module:
    """A tree in which a plain layer replaces one layer, or the whole tree.

    Args:
        tree: The tree; edited.
        path: That of the layer.
        layer: The quantised layer, of the user's model.
        shape: That of its weight.
        dtype: The dtype of its numbers.
    """
    replaced = tree.get_submodule(path)
    plain = _plain(layer, shape, dtype)
    # hooks are the user's; what replaced forward was the package's: see _readers
    for name, attribute in vars(replaced).items():
        if name.startswith(HOOKS):
            plain.__dict__[name] = attribute
    plain.train(layer.training)
    if replaced is tree:
        tree = plain
    for parent in tree.modules():  # a layer may have several names
        names = [name for name, child in parent._modules.items() if child is replaced]
        parent._modules |= dict.fromkeys(names, plain)
    return tree


def _is_plain(layer: nn.Module) -> bool:
    """True if a layer's forward is torch's or its package's, not the user's."""
    forward = type(layer).forward
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        return True
    return forward.__module__.partition(".")[0] in PACKAGES


def _package(kind: type) -> str:
    """The package of a class or of one of its bases."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    for package in packages:
        if package in PACKAGES or package == "torchao":
            return package
    return packages[0]


def _plain(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        rows, width = shape
        return nn.Embedding(rows, width, layer.padding_idx, device="meta", dtype=dtype)
    out, inner = shape
    bias = getattr(layer, "bias", None)
    plain = PlainLinear(inner, out, bias=False, device="meta", dtype=dtype)
    plain.compute = getattr(layer, "compute_dtype", None)  # of bitsandbytes' layers in 4 bits
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def _dtype(layer: nn.Module, leaf: str, others: torch.dtype | None) -> torch.dtype:
    """The dtype that a layer's numbers have before they meet x."""
    weight: Any = getattr(layer, leaf, None)
    state = getattr(weight, "quant_state", None)
    dtype = getattr(state, "original_dtype", None) or getattr(state, "dtype", None)
    is_float = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    if dtype is None and is_float and weight.dtype.itemsize > 1:  # a subclass says it
        dtype = weight.dtype
    return dtype or others or torch.float32


Read = Callable[[], tuple[str, Quantised]]
PACKS = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' layers of 4 bits."""


def _readers(path: str, layer: nn.Module) -> Iterator[tuple[str, Read]]:
    """The parameters of a layer that hold codes, each with the function that reads them.

    Raises:
        LoraFxError: A layer whose forward is no more that of its class, which codes cannot keep.
    """
    parameters = {n: p for n, p in layer._parameters.items() if p is not None}
    of_torchao = {n: p for n, p in parameters.items() if _package(type(p.data)) == "torchao"}
    for leaf, parameter in of_torchao.items():
        yield leaf, partial(torchao_weight, path, parameter.data)

    config = _config_of_package(layer, parameters)
    is_coded = config is not None and _holds_codes(layer, parameters)
    if is_coded:
        yield "weight", partial(_of_state, path, layer, config or {})

    if not is_coded and not of_torchao:
        return
    is_plain = _is_plain(layer)
    is_replaced = _has_foreign_forward(layer)
    if (is_replaced and is_plain) or (is_coded and not is_plain):
        raise LoraFxError(
            f"{path}: this quantised {type(layer).__name__} has a custom forward",
            "move what it adds to x·Wᵀ into a hook, or into the module around it",
        )


def _config_of_package(
    layer: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, object] | None:
    """The config.json that would describe a layer's layout; None for a layer of no package."""
    is_awq = "Awq" in type(layer).__name__  # gptqmodel's
    config = PACKAGES.get("awq" if is_awq else _package(type(layer)))
    if config is None and _is_compressed(parameters):
        return PACKAGES["compressed_tensors"]
    return config


def _holds_codes(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a layer of a package holds more than plain numbers."""
    if _is_compressed(parameters) or "qweight" in layer._buffers:
        return True
    return not all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters.values())


def _has_foreign_forward(layer: nn.Module) -> bool:
    """Whether the forward of a layer was replaced, neither by its package nor by accelerate."""
    forward = layer.__dict__.get("forward")
    if forward is None:
        return False
    # accelerate's is a partial
    function = getattr(forward, "func", getattr(forward, "__func__", forward))
    package = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
    return package not in PACKAGES and package != "accelerate"


def _is_compressed(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether these are the parameters of a layer of compressed-tensors."""
    if "weight_packed" in parameters:
        return True
    weight = parameters.get("weight")
    is_narrow = weight is not None and weight.dtype.itemsize == 1
    return is_narrow and "weight_scale" in parameters


def _of_state(path: str, layer: nn.Module, config: Mapping[str, object]) -> tuple[str, Quantised]:
    """Read the codes from the layer's state, whose tensors are named as in a file."""
    state = {f"{path}.{name}": to_numpy(tensor) for name, tensor in _tensors(layer).items()}
    weights = quantised_weights(state, {"quantization_config": dict(config)})
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
    codes = weight.data
    scales = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
    if is_packed(layer):  # in tiles of 32 rows, whose halves lie in the halves of a byte
        halves = codes.reshape(-1, 32)
        tiles = torch.cat([halves & 15, halves >> 4], 1).reshape(len(codes) // 32, -1, 32, 2)
        pairs = tiles.transpose(1, 2).reshape(-1, 2)
        codes = pairs[:, :1] << 4 | pairs[:, 1:]
        scales["weight.absmax"] = state.absmax.T.reshape(-1)
    return {"weight": codes, **scales}


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
                f"{path}: bitsandbytes has packed this layer for this CPU, and a packed layer has "
                "no gradient",
                "load the model again and attach before its first run, or use lora_fx.insert",
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
    if hasattr(weight, "SCB") and isinstance(layer, nn.Linear):
        return True  # bitsandbytes' LLM.int8
    for name in ("act_quant_kwargs", "activation_quantization"):  # torchao's
        if getattr(weight, name, None) is not None:
            return True
    scheme = getattr(layer, "quantization_scheme", None)  # compressed-tensors'
    return getattr(scheme, "input_activations", None) is not None
