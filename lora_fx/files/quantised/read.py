"""Which weights of a checkpoint are quantised, how, and each of them as one `Quantised`.

The tensors beside a weight say that it is quantised, and `quantization_config` of config.json in
which layout. Shapes and bits come from headers, and where a format keeps them in a small tensor
(bitsandbytes' quant_state, compressed-tensors' weight_shape) from that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.quantised.awq import awq
from lora_fx.files.quantised.bitsandbytes import four_bits, int8
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
"""What lies beside a quantised weight NAME.weight as NAME.…, and what wrote it, the first found."""

ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point")
"""What quantises the values that a weight is multiplied with."""
PARTS = (
    *SIBLINGS, *ACTIVATIONS, "weight", "qzeros", "scales", "g_idx", "weight_shape",
    "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_scale_2", "weight_format",
    "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip
"""The last names of all tensors that a quantised weight can have."""

_BY_LENGTH = sorted(SIBLINGS, key=len, reverse=True)


Held = Mapping[str, TensorInfo | Array]
"""Tensors by name: headers of a file, or arrays of a live layer."""


def scheme_of(name: str, tensors: Held) -> str:
    """How the weight of this name is quantised, by the tensors beside it; empty where it is not."""
    module = name.removesuffix(".weight")
    found = next((w for s, w in SIBLINGS.items() if f"{module}.{s}" in tensors), "")
    return found or ("MXFP4, blocks of 4-bit codes" if f"{name}_blocks" in tensors else "")


def quantised_weights(tensors: Held, config: JsonView) -> dict[str, QuantisedWeight]:
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
        part = next((s for s in _BY_LENGTH if tensor.endswith(f".{s}")), "")
        if part:
            names[f"{tensor.removesuffix(part)}weight"] = None
        elif tensor.endswith("_blocks"):
            names[tensor.removesuffix("_blocks")] = None
    return {name: _weight(name, tensors, config) for name in names}


def parts_beside(weights: Iterable[str], tensors: Held) -> dict[str, str]:
    """What a checkpoint holds of quantised weights → the weight that it belongs to."""
    found: dict[str, str] = {}
    for name in weights:
        module = name.removesuffix(".weight")
        every = (f"{module}.{part}" for part in PARTS)
        found |= {n: name for n in (*every, f"{name}_blocks", f"{name}_scales") if n in tensors}
    return found


def _weight(name: str, tensors: Held, config: JsonView) -> QuantisedWeight:
    if f"{name}_blocks" in tensors:
        module, _, last = name.rpartition(".")
        return mxfp4_stack(Parts(module, tensors), last)
    parts = Parts(name.removesuffix(".weight"), tensors)
    told = config.get("quantization_config")
    said: JsonView = told if isinstance(told, dict) else {}
    method = said.get("quant_method")
    if any(parts.has(f"weight.quant_state.bitsandbytes__{kind}") for kind in ("nf4", "fp4")):
        return four_bits(parts)
    if parts.has("SCB"):
        return int8(parts)
    if parts.has("qweight") and (layout := _layout(said)):
        return awq(parts) if layout == "awq" else gptq(parts, 2 if layout == "gptq_v2" else 1)
    why = "pre_quant_scale beside it" if parts.has("pre_quant_scale") else altered(said)
    scaled = "weight_scale" if parts.has("weight_scale") else "weight_scale_inv"
    if not why and parts.has(scaled):
        narrow = parts.has("weight") and parts.dtype("weight") in FLOAT8
        if parts.has("weight_global_scale") or parts.has("weight_scale_2"):
            return nvfp4(parts)
        if narrow and scaled == "weight_scale_inv":
            return fp8_blocks(parts, said)
        if parts.has("weight_packed") and parts.dtype(scaled) in EXPONENTS:
            return mxfp4(parts)
        if narrow and (method != "compressed-tensors" or parts.dtype(scaled) in EXPONENTS):
            return fp8(parts)
        if method == "compressed-tensors":
            return compressed(parts)
    scheme = scheme_of(name, tensors)
    why = why or "config.json does not say in which of its layouts"

    def read(rows: slice = ALL) -> Quantised:
        raise LoraFxError(
            f"weight {one_line(repr(name), 160)} is quantised ({scheme}), and not read: {why}",
            "use the checkpoint that it was quantised from",
        )

    return QuantisedWeight(scheme, 0, (), read)


def _layout(said: JsonView) -> str:
    """gptq, gptq_v2 or awq, by a quantization_config; empty for others."""
    method, packing = said.get("quant_method"), str(said.get("packing_format", ""))
    if method == "gptq":
        layout = said.get("checkpoint_format") or "gptq"
        return layout if layout in ("gptq", "gptq_v2") else ""
    if method == "awq":
        return "awq" if str(said.get("version") or "gemm").lower() == "gemm" else ""
    # AutoRound names the layout that it wrote; its auto_gptq is version 1
    return {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing, "")
