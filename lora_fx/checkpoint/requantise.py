"""W̃ + Δ back into the codes of a quantised weight, rows by rows, and what that keeps of Δ.

kept = ⟨Q(W̃+Δ) − W̃, Δ⟩ / ⟨Δ, Δ⟩, noise = ‖Q(W̃+Δ) − (W̃+Δ)‖ / ‖Δ‖. Which scales a format takes
is said in its own file: new ones by its rule, or those that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.checkpoint.fold import BLOCK, Space, Stats, TensorFold, prepared, stats_of
from lora_fx.dtypes import DTYPES
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.base import QuantisedWeight, Written
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.quantised import Quantised

LEAST = 0.5
"""What has to be kept of an update in all, unless loss is allowed."""


def spans(
    weight: QuantisedWeight, most: int, low: int = 0, high: int | None = None
) -> Iterator[tuple[int, int]]:
    """Ranges of about `most` rows that can be quantised for themselves, in one matrix each."""
    matrix = weight.shape[-2]
    high = math.prod(weight.shape[:-1]) if high is None else high
    each = max(weight.step, most // weight.step * weight.step)
    while low < high:
        stop = min(high, low - low % matrix + matrix, low + each)
        yield low, stop
        low = stop


def recoded(
    weight: QuantisedWeight, q: Quantised, fold: TensorFold, rows: slice
) -> tuple[Stats, Quantised, list[Written]]:
    """Rows with their update, quantised anew: what changed, the value, and what to write where.

    Args:
        weight: The weight.
        q: The rows as they are.
        fold: What is added.
        rows: Which rows.

    Raises:
        LoraFxError: A value that is no number.
    """
    assert weight.recode is not None
    old = q.dequantise()
    with np.errstate(all="ignore"):  # what is no number is looked for below, and named
        new, delta = fold.sum(old, rows.start, Space())
        if not np.isfinite(np.dot(new.reshape(-1), new.reshape(-1))):
            raise fold.error(old, new, new, rows.start)
    after, parts = weight.recode(q, rows, new, delta)
    there = after.dequantise()
    still = int(np.count_nonzero(there == old))
    missed = (new - there).reshape(-1)
    there -= old
    stats = stats_of(old, delta, there, still)
    stats.error = float(np.dot(missed, missed))
    return stats, after, parts


def joined(parts: Sequence[Written]) -> list[Written]:
    """Ranges of a tensor that follow each other along a later axis as one: fewer, longer writes."""
    found: dict[str, list[Written]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    result: list[Written] = []
    for every in found.values():
        axis = every[0].axis
        if axis and len(every) > 1:
            every = [replace(every[0], data=np.concatenate([p.data for p in every], axis))]
        result += every
    return result


def ranges(part: Written, info: TensorInfo) -> Iterator[tuple[int, memoryview]]:
    """What a part becomes in its tensor: offsets in bytes, and the bytes there."""
    data = np.ascontiguousarray(part.data)
    if part.axis is None:
        yield part.low, data.reshape(-1).view(np.uint8).data
        return
    shape, size, start = info.shape, DTYPES[info.dtype].bits // 8, 0
    if part.matrix is not None:
        shape = shape[1:]
        start = part.matrix * math.prod(shape) * size
    inner = math.prod(shape[part.axis + 1 :]) * size
    for i, run in enumerate(data.reshape(math.prod(shape[: part.axis]), -1)):
        at = start + (i * shape[part.axis] + part.low) * inner
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


def sampled(folds: Sequence[tuple[CodesInfo, TensorFold]], count: int = 4) -> list[Stats]:
    """Of some rows in the middle of some of these weights."""
    some = [(info, fold) for info, fold in folds if info.weight.recode is not None]
    some = some[:: max(1, len(some) // count)][:count]
    found = []
    for info, fold in some:
        every = [*spans(info.weight, max(1, BLOCK // info.shape[-1]))]
        rows = slice(*every[len(every) // 2])
        fold = prepared(fold, info)
        found.append(recoded(info.weight, info.weight.read(rows), fold, rows)[0])
    return found
