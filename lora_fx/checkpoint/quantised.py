"""Weights that are stored quantised, and why nothing is folded into them.

Folding means to requantise W + Δ. A typical Δ is far below a step of 4 bits, so rounding snaps
back to the same codes and the adapter is lost; in FP8 the same holds for most of it.
"""

from __future__ import annotations

from lora_fx.checkpoint.folder import Checkpoint
from lora_fx.checkpoint.headers import WEIGHTS
from lora_fx.checkpoint.strict import TensorInfo
from lora_fx.errors import LoraFxError

_SIBLINGS = {
    "qweight": "GPTQ or AWQ, 4-bit codes",
    "weight.absmax": "bitsandbytes, 4-bit codes",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    "weight_packed": "compressed-tensors, packed codes",
    "SCB": "bitsandbytes int8",
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
    return next((w for s, w in _SIBLINGS.items() if f"{module}.{s}" in base.tensors), "")


def refuse_quantised(name: str, info: TensorInfo, base: Checkpoint) -> None:
    """Raise for a tensor that is no plain float weight."""
    scheme = scheme_of(name, base)
    if 0 in info.shape:
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is empty, {list(info.shape)}; expected a weight",
            "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
        )
    if info.dtype in WEIGHTS and not scheme:
        return
    raise LoraFxError(
        f"{info.file}: tensor {name!r} is {info.dtype}{f' ({scheme})' if scheme else ''}; expected "
        "a float weight: requantising would lose most of the update",
        HINT,
    )
