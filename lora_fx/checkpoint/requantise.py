"""W̃ + Δ back into the codes of a quantised weight, rows by rows, and what that keeps of Δ.

kept = ⟨Q(W̃+Δ) − W̃, Δ⟩ / ⟨Δ, Δ⟩, noise = ‖Q(W̃+Δ) − (W̃+Δ)‖ / ‖Δ‖. Which scales a format takes
is said in its own file: new ones by its rule, or those that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.fold import BLOCK, Matrix, Space, Stats, TensorFold, prepared, stats_of
from lora_fx.dtypes import DTYPES, FLOATING, Array, finfo
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.compressed_tensors import altered
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight, Written
from lora_fx.files.quantised.read import scheme_of
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored_bytes
from lora_fx.ir.quantised import Quantised
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView, by_key

LEAST = 0.5
"""What has to be kept of an update in all, unless loss is allowed."""


def recoded(
    weight: QuantisedWeight, q: Quantised, fold: TensorFold, rows: slice, space: Space
) -> tuple[Stats, list[Written]]:
    """Rows with their update, quantised anew: what changed, and what to write where.

    Args:
        weight: The weight.
        q: The rows as they are.
        fold: What is added.
        rows: Which rows.
        space: The calling thread's.

    Raises:
        LoraFxError: A value that is no number.
    """
    assert weight.anew is not None
    old = q.dequantise()
    with np.errstate(all="ignore"):  # what is no number is looked for, and named
        new, delta = fold.sum(old, rows.start, space)
        if not np.isfinite(np.dot(new.reshape(-1), new.reshape(-1))):
            raise fold.error(old, new, new, rows.start)
        after, parts = weight.anew.recode(q, rows, new, delta)
    there = after.dequantise()
    still, missed = int(np.count_nonzero(there == old)), (new - there).reshape(-1)
    stats = stats_of(old, delta, np.subtract(there, old, out=there), still)
    stats.error = float(np.dot(missed, missed))
    steps = q.scale.astype(np.float64) * q.unit
    stats.own = float(np.mean(steps**2)) * old.size / 12
    return stats, parts


def joined(parts: Sequence[Written]) -> Iterator[Written]:
    """Ranges of a tensor that follow each other along a later axis as one: fewer, longer writes."""
    for every in by_key((part.name, part) for part in parts).values():
        axis = every[0].axis
        if axis and len(every) > 1:
            every = [replace(every[0], data=np.concatenate([p.data for p in every], axis))]
        yield from every


def ranges(part: Written, info: TensorInfo) -> Iterator[tuple[int, memoryview]]:
    """What a part becomes in its tensor: offsets in bytes, and the bytes there."""
    data = np.ascontiguousarray(part.data)
    if part.axis is None:
        yield part.low, data.reshape(-1).view(np.uint8).data
        return
    here = info if part.matrix is None else info[part.matrix]
    inner = math.prod(here.shape[part.axis + 1 :]) * DTYPES[info.dtype].bits // 8
    for i, run in enumerate(data.reshape(math.prod(here.shape[: part.axis]), -1)):
        at = here.start - info.start + (i * here.shape[part.axis] + part.low) * inner
        yield at, run.view(np.uint8).data


def in_all(every: Iterable[Stats]) -> tuple[float, float]:
    """What several weights keep, and their noise; 1 and 0 where there is no update."""
    whole = Stats()
    for stats in every:
        whole.add(stats)
    return whole.gain, whole.missed or 0.0


def refuse_loss(every: Iterable[Stats], where: object) -> None:
    """Raise where most of an update is lost."""
    kept, noise = in_all(every)
    if not kept >= LEAST:
        raise LoraFxError(
            f"{where}: not written: its codes would keep {kept:.1%} of the update in all, with "
            f"noise of {noise:.2f} times its size; expected {LEAST:.0%} or more",
            "--dequantise keeps all of it; --lossy writes it all the same",
            exit_code=1,
        )


def sampled(folds: Sequence[tuple[CodesInfo, TensorFold]], count: int = 4) -> Iterator[Stats]:
    """Of some rows in the middle of some of these weights."""
    some = [(info, fold) for info, fold in folds if info.weight.anew is not None]
    some = some[:: max(1, len(some) // count)][:count]
    for info, fold in some:
        every = [*info.weight.spans(max(1, BLOCK // info.shape[-1]))]
        rows = slice(*every[len(every) // 2])
        fold = prepared(fold, info)
        yield recoded(info.weight, info.weight.read(rows), fold, rows, Space())[0]


# Weights stored as codes of 8 bits with a scale a row: what is quantised anew without being asked.
#
#     W[i, j] = codes[i, j] · scales[i] / unit        unit 127: bitsandbytes' LLM.int8, whose scales
#                                                     are the rows' largest values; 1: others
#
# W + Δ is quantised anew, row by row: the largest value of a row becomes code ±127, all others are
# rounded to the nearest code, ties to even. A row with no update, or of zeros, keeps its scale.


TOP = 127
"""The code of the largest value of a row."""


@dataclass(frozen=True)
class Int8:
    """How a weight [rows, columns] of int8 codes is stored.

    Attributes:
        scheme: How it is quantised, for people.
        name: The name of the tensor of scales.
        scales: Where that lies; one number a row.
        unit: What the scales are divided by.
    """

    scheme: str
    name: str
    scales: TensorInfo
    unit: int

    @property
    def top(self) -> np.float32:
        """The largest value of a row over its scale."""
        return np.float32(TOP / self.unit)

    def scale(self, largest: Array) -> Array:
        """The scales that make the largest value of a row code 127; none of them is zero."""
        tiny = float(finfo(self.scales.dtype).smallest_subnormal)
        return np.asarray(np.maximum(largest / self.top, largest.dtype.type(tiny)))

    def check(self, name: str, info: TensorInfo, matrix: Matrix) -> None:
        """Raise for updates whose rows are not the codes' rows, or that need the float original."""
        for p in matrix.parts:
            why = ""
            if p.transposed or (matrix.rows, matrix.columns) != info.shape:
                why = "the update is for a weight stored [in, out]; int8 codes are stored [out, in]"
            elif p.mutated:
                why = f"the update is for a base that {p.mutated} changed before"
            if why:
                raise LoraFxError(f"{info.file}: tensor {name!r} is int8: {why}", HINT)

    def weight(self, codes: TensorInfo) -> QuantisedWeight:
        """The weight whose codes lie there."""
        module, _, part = self.name.rpartition(".")
        parts = Parts(module, {f"{module}.weight": codes, self.name: self.scales})

        def read(rows: slice = ALL) -> Quantised:
            scale = parts.read(part, rows).reshape(-1, 1)
            block = 1, codes.shape[1]
            return Quantised(parts.read("weight", rows), scale, None, block, unit=1 / self.unit)

        anew = parts.rescaling(("weight", part), 1, self.scale)
        return QuantisedWeight(self.scheme, 8, codes.shape, read, 1, anew)


# Weights that are stored quantised: which an update can be folded into, and why not the others.
#
# Folding means to requantise W + Δ. A typical Δ is far below a step of 4 bits, so rounding snaps
# back to the same codes and the adapter is lost; in FP8 the same holds for most of it. int8 with a
# scale a row keeps most of it. Two layouts of it are taken, by what their own libraries write:
#
# ===================  ===============  ============================  ==================
# scheme               codes            scales                        W[i, j]
# ===================  ===============  ============================  ==================
# bitsandbytes         NAME.weight      NAME.SCB [out]                codes · SCB / 127
# compressed-tensors   NAME.weight      NAME.weight_scale [out, 1]    codes · scale
# ===================  ===============  ============================  ==================


HINT = (
    "merge into the unquantised original and quantise after, or keep the adapter as a branch "
    "of its own"
)
LOST = "codes take an update only where that is asked for"


def refuse_codes(keys: Iterable[str], base: Checkpoint, config: JsonView) -> None:
    """Raise where a weight that an adapter means is there as codes only, under other names."""
    for key in keys:
        name = base_name(key)
        here = base.tensors.get(name)
        if here is not None:
            _refuse_empty(name, here)
        scheme = codes_of(name, base, config)
        if scheme and (here is None or here.dtype not in (*FLOATING, "int8")):
            raise _refusal(name, here, scheme, base)


def codes_of(name: str, base: Checkpoint, config: JsonView) -> str:
    """The format of the codes that a base has of a weight, as its tensors or its config tell.

    Empty where it has none.
    """
    scheme = scheme_of(name, base.tensors)
    method = config.get("quantization_config")
    if scheme or name in base.tensors or not isinstance(method, dict):
        return scheme
    module = name.removesuffix("weight")
    if not name.endswith(".weight") or not any(n.startswith(module) for n in base.tensors):
        return ""
    return f"{method.get('quant_method', 'quantised')}, as config.json says"


def stored_as(name: str, info: TensorInfo, base: Checkpoint, entries: list[Entry]) -> Int8 | None:
    """How a weight is stored that an update can be folded into; None where as plain floats.

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
    replaced = bool(entries) and all(isinstance(e, Full) for e in entries)
    if (info.dtype in FLOATING or replaced) and not scheme:
        return None
    found, why = _int8(name, info, base) if info.dtype == "int8" else (None, LOST)
    if info.dtype == "int8" and any(isinstance(e, Full) for e in entries):
        found, why = None, "a whole float tensor cannot take its place"
    if found is None:
        raise _refusal(name, info, scheme, base, why)
    return found


def int8_of(name: str, base: Checkpoint) -> Int8 | None:
    """The layout of a weight's int8 codes, where it is one of those above."""
    info = base.tensors.get(name)
    return _int8(name, info, base)[0] if info is not None and info.dtype == "int8" else None


def _int8(name: str, info: TensorInfo, base: Checkpoint) -> tuple[Int8 | None, str]:
    """The layout of int8 codes, or why it is none of those that are taken."""
    module, tensors = name.removesuffix(".weight"), base.tensors
    found = [part for part in ("SCB", "weight_scale") if f"{module}.{part}" in tensors]
    if len(found) != 1 or not name.endswith(".weight"):
        return None, "its scales are not there as SCB or weight_scale"
    if len(info.shape) != 2:
        return None, f"its shape is {list(info.shape)}; expected [out, in]"
    scales, rows, why = tensors[f"{module}.{found[0]}"], info.shape[0], ""
    if found == ["SCB"]:
        scheme, unit, shape, expected = "bitsandbytes", TOP, [rows], f"float32 [{rows}]"
        form = tensors.get(f"{module}.weight_format")
        order = stored_bytes(form, 0, 1)[0] if form is not None and form.stop > form.start else 0
        if order:
            why = f"weight_format is {order}, an order for GPUs; expected 0, row by row"
    else:
        scheme, unit, shape = "compressed-tensors", 1, [rows, 1]
        expected = f"a float a row, [{rows}, 1]"
        config = base.config().get("quantization_config")
        if not isinstance(config, dict) or config.get("quant_method") != scheme:
            why = f"config.json does not say that weight_scale is that of {scheme}"
        else:
            why = altered(config)
        for other in ("weight_zero_point", "weight_g_idx", "weight_global_scale"):
            if f"{module}.{other}" in tensors:
                why = f"{other} beside it: only symmetric codes with a scale a row are taken"
    if not why and ([*scales.shape] != shape or scales.dtype not in FLOATING):
        why = f"{found[0]} is {scales.dtype} {list(scales.shape)}; expected {expected}"
    made = Int8(f"{scheme} int8", f"{module}.{found[0]}", scales, unit)
    return (None, why) if why else (made, "")


def _refuse_empty(name: str, info: TensorInfo) -> None:
    if 0 in info.shape:
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is empty, {list(info.shape)}; expected a weight",
            "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
        )


def _refusal(
    name: str, info: TensorInfo | None, scheme: str, base: Checkpoint, why: str = LOST
) -> LoraFxError:
    where, what = (info.file, info.dtype) if info else (base.path, "stored as codes")
    return LoraFxError(
        f"{where}: tensor {name!r} is {what}{f' ({scheme})' if scheme else ''}; expected "
        f"a float weight, or int8 with a scale a row: {why}",
        HINT,
    )
