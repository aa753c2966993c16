"""Find the quantised weights of a checkpoint and their formats, and read them.

The tensors beside a weight say that it is quantised, and `quantization_config` of config.json in
which layout. Shapes and bits come from headers, and where a format keeps them in a small tensor
(bitsandbytes' quant_state, compressed-tensors' weight_shape) from that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.quantised.awq import awq
from lora_fx.files.quantised.bitsandbytes import STATE, four_bits, int8
from lora_fx.files.quantised.compressed_tensors import altered, compressed
from lora_fx.files.quantised.float_scales import EXPONENTS
from lora_fx.files.quantised.fp4 import mxfp4, mxfp4_stack, nvfp4
from lora_fx.files.quantised.fp8 import fp8, fp8_blocks
from lora_fx.files.quantised.gptq import gptq
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import FLOAT8, Parts
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.quantised import Quantised
from lora_fx.text import JsonView

SIBLINGS = {
    "qweight": "GPTQ or AWQ, 4-bit codes",
    "weight.absmax": "bitsandbytes, 4-bit codes",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    "weight_packed": "compressed-tensors, packed codes",
    "SCB": "bitsandbytes int8",
    "W_q": "HQQ codes",
    "codes": "AQLM codes",
    "weight.SCB": "bitsandbytes int8",
    "weight._data": "optimum-quanto codes",
    "weight_scale": "compressed-tensors or FP8 with a scale",
    "weight_scale_inv": "FP8 in blocks",
}
"""Tensors NAME.… of a quantised weight NAME.weight → its format; the first match decides."""

ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point")
"""Parts that quantise the values that a weight is multiplied with."""
PARTS = (
    *SIBLINGS, *ACTIVATIONS, "weight", "qzeros", "scales", "g_idx", "weight_shape",
    "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_scale_2", "weight_format",
    "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip
"""The last names of all tensors that a quantised weight can have."""

_BY_LENGTH = sorted(SIBLINGS, key=len, reverse=True)
_TensorsOrArrays = Mapping[str, TensorInfo | Array]
"""Tensors by name: headers of a file, or arrays of a live layer."""


def scheme_of(name: str, tensors: _TensorsOrArrays) -> str:
    """The format of a quantised weight, from the tensors with it; empty if it is not quantised."""
    module = name.removesuffix(".weight")
    for sibling, scheme in SIBLINGS.items():
        if f"{module}.{sibling}" in tensors:
            return scheme
    if f"{name}_blocks" in tensors:
        return "MXFP4, blocks of 4-bit codes"
    return ""


def quantised_weights(tensors: _TensorsOrArrays, config: JsonView) -> dict[str, QuantisedWeight]:
    """Every quantised weight of a checkpoint by its name as the model has it, in file order.

    Args:
        tensors: All tensors: headers, or arrays of a live layer.
        config: Its config.json.

    Raises:
        LoraFxError: Headers of a known format that do not fit each other. A format that is not
            read is no error here: its weights have 0 bits, and the error comes from their `read`.
    """
    names: dict[str, None] = {}
    for tensor in tensors:
        sibling = next((name for name in _BY_LENGTH if tensor.endswith(f".{name}")), "")
        if sibling:
            names[f"{tensor.removesuffix(sibling)}weight"] = None
        elif tensor.endswith("_blocks"):
            names[tensor.removesuffix("_blocks")] = None
    return {name: _weight(name, tensors, config) for name in names}


def parts_beside(weights: Iterable[str], tensors: _TensorsOrArrays) -> dict[str, str]:
    """The tensors of a checkpoint that belong to quantised weights → the weight's name."""
    weight_of: dict[str, str] = {}
    for weight in weights:
        module = weight.removesuffix(".weight")
        possible = [f"{module}.{part}" for part in PARTS]
        for tensor in (*possible, f"{weight}_blocks", f"{weight}_scales"):
            if tensor in tensors:
                weight_of[tensor] = weight
    return weight_of


def _weight(name: str, tensors: _TensorsOrArrays, config: JsonView) -> QuantisedWeight:
    """A quantised weight, by the first of these that has an answer.

    1. Parts that only one format has: gpt-oss, bitsandbytes.
    2. GPTQ and AWQ, where config.json says which layout.
    3. The formats with scales beside the weight, unless something else was done to the weight.
    4. A weight that is not read.
    """
    if f"{name}_blocks" in tensors:
        module, _, last_name = name.rpartition(".")
        return mxfp4_stack(Parts(module, tensors), last_name)
    parts = Parts(name.removesuffix(".weight"), tensors)
    if parts.has(f"{STATE}nf4") or parts.has(f"{STATE}fp4"):
        return four_bits(parts)
    if parts.has("SCB"):
        return int8(parts)

    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict):
        quantisation = {}
    if parts.has("qweight"):
        layout = _layout(quantisation)
        if layout == "awq":
            return awq(parts)
        if layout:
            return gptq(parts, 2 if layout == "gptq_v2" else 1)

    if parts.has("pre_quant_scale"):
        return _unread(name, tensors, "it has a pre_quant_scale")
    alteration = altered(quantisation)
    if alteration:
        return _unread(name, tensors, alteration)
    weight = _with_scales(parts, quantisation)
    if weight is None:
        return _unread(name, tensors, "config.json does not give its layout")
    return weight


def _with_scales(parts: Parts, quantisation: JsonView) -> QuantisedWeight | None:
    """A weight of a format that has weight_scale or weight_scale_inv; None for any other."""
    scale = "weight_scale" if parts.has("weight_scale") else "weight_scale_inv"
    if not parts.has(scale):
        return None
    if parts.has("weight_global_scale") or parts.has("weight_scale_2"):
        return nvfp4(parts)
    is_float8 = parts.has("weight") and parts.dtype("weight") in FLOAT8
    if is_float8 and scale == "weight_scale_inv":
        return fp8_blocks(parts, quantisation)
    has_exponents = parts.dtype(scale) in EXPONENTS
    if parts.has("weight_packed") and has_exponents:
        return mxfp4(parts)
    is_compressed = quantisation.get("quant_method") == "compressed-tensors"
    if is_float8 and (has_exponents or not is_compressed):
        return fp8(parts)
    if is_compressed:
        return compressed(parts)
    return None


def _unread(name: str, tensors: _TensorsOrArrays, why: str) -> QuantisedWeight:
    """A weight in a format that is not read; its `read` raises with the reason."""
    scheme = scheme_of(name, tensors)

    def read(rows: slice = ALL) -> Quantised:
        raise LoraFxError(
            f"weight {one_line(repr(name), 160)} is quantised ({scheme}) and cannot be read: {why}",
            "use the checkpoint that it was quantised from",
        )

    return QuantisedWeight(scheme, 0, (), read)


def _layout(quantisation: JsonView) -> str:
    """gptq, gptq_v2 or awq, by a quantization_config; empty for others."""
    method = quantisation.get("quant_method")
    if method == "gptq":
        layout = quantisation.get("checkpoint_format") or "gptq"
        return layout if layout in ("gptq", "gptq_v2") else ""
    if method == "awq":
        version = quantisation.get("version") or "gemm"
        return "awq" if str(version).lower() == "gemm" else ""
    # AutoRound names the layout that it wrote; its auto_gptq is version 1
    packing = str(quantisation.get("packing_format", ""))
    return {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing, "")
