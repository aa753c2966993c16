"""Weights that are stored quantised, and why nothing is folded into them.

Folding means to requantise W + Δ. A typical Δ is far below a step of 4 bits, so rounding snaps
back to the same codes and the adapter is lost; in FP8 the same holds for most of it. Codes of 8
bits with a scale a row keep most of it, but need their scales written anew, which is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.checkpoint.folder import Checkpoint
from lora_fx.checkpoint.headers import WEIGHTS
from lora_fx.checkpoint.strict import TensorInfo
from lora_fx.errors import LoraFxError
from lora_fx.lowrank import Full
from lora_fx.target import base_name
from lora_fx.variant import Entry

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
        if scheme and (here is None or here.dtype not in WEIGHTS):
            raise _refusal(name, here, scheme, base)


def refuse_quantised(
    name: str, info: TensorInfo, base: Checkpoint, entries: Iterable[Entry] = ()
) -> None:
    """Raise for a tensor that is no plain float weight; one that is replaced whole may be."""
    scheme = scheme_of(name, base)
    _refuse_empty(name, info)
    entries = list(entries)
    replaced = bool(entries) and all(isinstance(e, Full) for e in entries)
    if (info.dtype in WEIGHTS or replaced) and not scheme:
        return
    raise _refusal(name, info, scheme, base)


def _refuse_empty(name: str, info: TensorInfo) -> None:
    if 0 in info.shape:
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is empty, {list(info.shape)}; expected a weight",
            "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
        )


def _refusal(name: str, info: TensorInfo | None, scheme: str, base: Checkpoint) -> LoraFxError:
    where, what = (info.file, info.dtype) if info else (base.path, "stored as codes")
    why = "requantising would lose most of the update"
    if info is not None and info.dtype == "int8":
        why = "new scales and codes for int8 are not supported yet"
    return LoraFxError(
        f"{where}: tensor {name!r} is {what}{f' ({scheme})' if scheme else ''}; expected "
        f"a float weight: {why}",
        HINT,
    )
