"""Weights that are stored quantised: which an update can be folded into, and why not the others.

Folding means to requantise W + Δ. A typical Δ is far below a step of 4 bits, so rounding snaps
back to the same codes and the adapter is lost; in FP8 the same holds for most of it. int8 with a
scale a row keeps most of it. Two layouts of it are taken, by what their own libraries write:

===================  ===============  ============================  ==================
scheme               codes            scales                        W[i, j]
===================  ===============  ============================  ==================
bitsandbytes         NAME.weight      NAME.SCB [out]                codes · SCB / 127
compressed-tensors   NAME.weight      NAME.weight_scale [out, 1]    codes · scale
===================  ===============  ============================  ==================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.int8 import TOP, Int8
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import WEIGHTS, TensorInfo
from lora_fx.targets.target import base_name

_SIBLINGS = {
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
HINT = (
    "merge into the unquantised original and quantise after, or keep the adapter as a branch "
    "of its own"
)


def scheme_of(name: str, base: Checkpoint) -> str:
    """How the weight of this name is quantised, by the tensors beside it; empty where it is not."""
    module = name.removesuffix(".weight")
    found = next((w for s, w in _SIBLINGS.items() if f"{module}.{s}" in base.tensors), "")
    return found or ("MXFP4, blocks of 4-bit codes" if f"{name}_blocks" in base.tensors else "")


def refuse_codes(keys: Iterable[str], base: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raise where a weight that an adapter means is there as codes only, under other names."""
    for key in keys:
        name = base_name(key)
        scheme, here = scheme_of(name, base), base.tensors.get(name)
        if here is not None:
            _refuse_empty(name, here)
        method = config.get("quantization_config")
        if not scheme and here is None and name.endswith(".weight") and isinstance(method, dict):
            module = name.removesuffix("weight")
            if any(n.startswith(module) for n in base.tensors):
                scheme = f"{method.get('quant_method', 'quantised')}, as config.json says"
        if scheme and (here is None or here.dtype not in (*WEIGHTS, "int8")):
            raise _refusal(name, here, scheme, base)


def stored_as(
    name: str, info: TensorInfo, base: Checkpoint, entries: Iterable[Entry] = ()
) -> Int8 | None:
    """How a weight is stored that an update can be folded into; None where as plain floats.

    Args:
        name: Of the tensor.
        info: Of the base.
        base: The checkpoint.
        entries: The updates; a tensor without scales that is replaced whole may be of any dtype.

    Raises:
        LoraFxError: Codes that nothing can be folded into, with the reason.
    """
    scheme = scheme_of(name, base)
    _refuse_empty(name, info)
    entries = list(entries)
    replaced = bool(entries) and all(isinstance(e, Full) for e in entries)
    if (info.dtype in WEIGHTS or replaced) and not scheme:
        return None
    if info.dtype != "int8":
        raise _refusal(name, info, scheme, base)
    if any(isinstance(e, Full) for e in entries):
        raise _refusal(name, info, scheme, base, "a whole float tensor cannot take its place")
    found, why = _int8(name, info, base)
    if found is None:
        raise _refusal(name, info, scheme, base, why)
    return found


def _int8(name: str, info: TensorInfo, base: Checkpoint) -> tuple[Int8 | None, str]:
    """The layout of int8 codes, or why it is none of those that are taken."""
    module, tensors = name.removesuffix(".weight"), base.tensors
    scb, scale = tensors.get(f"{module}.SCB"), tensors.get(f"{module}.weight_scale")
    if (scb is None) == (scale is None) or not name.endswith(".weight"):
        return None, "its scales are not there as SCB or weight_scale"
    if len(info.shape) != 2:
        return None, f"its shape is {list(info.shape)}; expected [out, in]"
    rows = info.shape[0]
    if scb is not None:
        if scb.shape != (rows,) or scb.dtype not in WEIGHTS:
            return None, f"SCB is {scb.dtype} {list(scb.shape)}; expected float32 [{rows}]"
        order = _first_byte(tensors.get(f"{module}.weight_format"))
        if order:
            return None, f"weight_format is {order}, an order for GPUs; expected 0, row by row"
        return Int8("bitsandbytes int8", f"{module}.SCB", scb, float(TOP)), ""
    assert scale is not None
    for other in ("weight_zero_point", "weight_g_idx", "weight_global_scale"):
        if f"{module}.{other}" in tensors:
            return None, f"{other} beside it: only symmetric codes with a scale a row are taken"
    if scale.shape != (rows, 1) or scale.dtype not in WEIGHTS:
        what = f"weight_scale is {scale.dtype} {list(scale.shape)}"
        return None, f"{what}; expected a float a row, [{rows}, 1]"
    config = base.config().get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        return None, "config.json does not say that weight_scale is that of compressed-tensors"
    for change in ("transform_config", "sparsity_config"):
        if config.get(change):
            return None, f"config.json has a {change}: its weights are not the model's"
    return Int8("compressed-tensors int8", f"{module}.weight_scale", scale, 1.0), ""


def _first_byte(info: TensorInfo | None) -> int:
    if info is None or info.stop == info.start:
        return 0
    with open(info.file, "rb") as f:
        f.seek(info.start)
        return (f.read(1) or b"\0")[0]


def _refuse_empty(name: str, info: TensorInfo) -> None:
    if 0 in info.shape:
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is empty, {list(info.shape)}; expected a weight",
            "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
        )


def _refusal(
    name: str,
    info: TensorInfo | None,
    scheme: str,
    base: Checkpoint,
    why: str = "requantising would lose most of the update",
) -> LoraFxError:
    where, what = (info.file, info.dtype) if info else (base.path, "stored as codes")
    return LoraFxError(
        f"{where}: tensor {name!r} is {what}{f' ({scheme})' if scheme else ''}; expected "
        f"a float weight, or int8 with a scale a row: {why}",
        HINT,
    )
