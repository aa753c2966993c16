"""Decide which weights stored as codes can take an update, and why others cannot.

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

from collections.abc import Iterable

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.int8 import HINT, Int8, int8_or_reason
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.quantised.read import scheme_of
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView

LOST = "an update is merged into codes only if requested"


def refuse_codes(keys: Iterable[str], base: Checkpoint, config: JsonView) -> None:
    """Raise if the base has a weight of the adapter only as codes, under other names."""
    for key in keys:
        name = base_name(key)
        info = base.tensors.get(name)
        if info is not None:
            _refuse_empty(name, info)
        scheme = codes_of(name, base, config)
        if scheme and (info is None or info.dtype not in (*FLOATING, "int8")):
            raise _refusal(name, info, scheme, base)


def codes_of(name: str, base: Checkpoint, config: JsonView) -> str:
    """The format of a weight's codes, from the base's tensors or its config.

    Empty where it has none.
    """
    scheme = scheme_of(name, base.tensors)
    method = config.get("quantization_config")
    if scheme or name in base.tensors or not isinstance(method, dict):
        return scheme
    if not name.endswith(".weight"):
        return ""
    module = name.removesuffix("weight")
    if not any(other.startswith(module) for other in base.tensors):
        return ""
    return f"{method.get('quant_method', 'quantised')}, as config.json says"


def stored_as(name: str, info: TensorInfo, base: Checkpoint, entries: list[Entry]) -> Int8 | None:
    """The int8 layout of a weight that an update can be folded into; None for plain floats.

    Args:
        name: The tensor's name.
        info: Where it lies in the base.
        base: The checkpoint.
        entries: The updates; a tensor without scales that is replaced whole may be of any dtype.

    Raises:
        LoraFxError: Codes that nothing can be folded into, with the reason.
    """
    if isinstance(info, CodesInfo):
        return None  # what is made of codes are floats
    scheme = scheme_of(name, base.tensors)
    _refuse_empty(name, info)
    replacing = [entry for entry in entries if isinstance(entry, Full)]
    is_replaced = bool(entries) and len(replacing) == len(entries)
    if not scheme and (info.dtype in FLOATING or is_replaced):
        return None
    if info.dtype != "int8":
        raise _refusal(name, info, scheme, base)
    if replacing:
        why = "a whole float tensor cannot replace it"
        raise _refusal(name, info, scheme, base, why)
    int8, why = int8_or_reason(name, info, base)
    if int8 is None:
        raise _refusal(name, info, scheme, base, why)
    return int8


def _refuse_empty(name: str, info: TensorInfo) -> None:
    """Raise for a tensor without elements, as ZeRO-3 leaves them."""
    if 0 in info.shape:
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is empty, {list(info.shape)}; expected a weight",
            "if it was saved under ZeRO-3 or FSDP, gather the shards and save it again",
        )


def _refusal(
    name: str, info: TensorInfo | None, scheme: str, base: Checkpoint, why: str = LOST
) -> LoraFxError:
    """The refusal of an update of codes.

    Args:
        name: The tensor's name.
        info: Where it lies; None where the base has its codes under other names.
        scheme: The format of the codes; may be empty.
        base: The checkpoint.
        why: The reason.
    """
    where = base.path if info is None else info.file
    what = "stored as codes" if info is None else info.dtype
    of_scheme = f" ({scheme})" if scheme else ""
    return LoraFxError(
        f"{where}: tensor {name!r} is {what}{of_scheme}; expected a float weight, or int8 with "
        f"one scale for each row: {why}",
        HINT,
    )
