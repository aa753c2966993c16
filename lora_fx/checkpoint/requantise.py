"""W̃ + Δ back into the codes of a quantised weight, rows by rows, and what that keeps of Δ.

kept = ⟨Q(W̃+Δ) − W̃, Δ⟩ / ⟨Δ, Δ⟩, noise = ‖Q(W̃+Δ) − (W̃+Δ)‖ / ‖Δ‖. Which scales a format takes
is said in its own file: new ones by its rule, or those that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.checkpoint.fold import TensorFold, prepared
from lora_fx.checkpoint.fold_stats import Stats, stats_of
from lora_fx.checkpoint.rectangles import BLOCK
from lora_fx.checkpoint.stored_rows import Space
from lora_fx.dtypes import DTYPES
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.base import QuantisedWeight, Written
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.quantised import Quantised
from lora_fx.text import by_key

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
