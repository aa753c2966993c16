"""W̃ + Δ written back into a quantised weight's codes, block by block, and the share of Δ kept.

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
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.quantised.quantised_weight import QuantisedWeight, Written
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.quantised import Quantised
from lora_fx.text import by_key

LEAST = 0.5
"""The least share of an update that codes must keep, unless `lossy` is given."""


def recoded(
    weight: QuantisedWeight, codes: Quantised, fold: TensorFold, rows: slice, space: Space
) -> tuple[Stats, list[Written]]:
    """Quantise rows with their update again; returns their statistics and the ranges to write.

    Args:
        weight: The weight.
        codes: The rows as they are.
        fold: What is added.
        rows: Which rows.
        space: The calling thread's.

    Raises:
        LoraFxError: A value that is no number.
    """
    assert weight.anew is not None
    old = codes.dequantise()
    with np.errstate(all="ignore"):  # what is no number is looked for, and named
        folded, delta = fold.sum(old, rows.start, space)
        flat = folded.reshape(-1)
        if not np.isfinite(np.dot(flat, flat)):
            raise fold.error(old, folded, folded, rows.start)
        new_codes, written = weight.anew.recode(codes, rows, folded, delta)
    stored = new_codes.dequantise()
    still = int(np.count_nonzero(stored == old))
    missed = (folded - stored).reshape(-1)
    stats = stats_of(old, delta, np.subtract(stored, old, out=stored), still)
    stats.error = float(np.dot(missed, missed))
    steps = codes.scale.astype(np.float64) * codes.unit
    stats.own = float(np.mean(steps**2)) * old.size / 12
    return stats, written


def joined(written: Sequence[Written]) -> Iterator[Written]:
    """Join ranges that follow each other along a later axis: fewer, longer writes."""
    for ranges_of_tensor in by_key((part.name, part) for part in written).values():
        first = ranges_of_tensor[0]
        if first.axis and len(ranges_of_tensor) > 1:
            data = np.concatenate([part.data for part in ranges_of_tensor], first.axis)
            yield replace(first, data=data)
        else:
            yield from ranges_of_tensor


def ranges(part: Written, info: TensorInfo) -> Iterator[tuple[int, memoryview]]:
    """The bytes that a range becomes in its tensor, with their offsets."""
    data = np.ascontiguousarray(part.data)
    if part.axis is None:
        yield part.low, data.reshape(-1).view(np.uint8).data
        return
    matrix = info if part.matrix is None else info[part.matrix]
    length = matrix.shape[part.axis]
    entry_bytes = math.prod(matrix.shape[part.axis + 1 :]) * DTYPES[info.dtype].bits // 8
    runs = data.reshape(math.prod(matrix.shape[: part.axis]), -1)
    for i, run in enumerate(runs):
        offset = matrix.start - info.start + (i * length + part.low) * entry_bytes
        yield offset, run.view(np.uint8).data


def in_all(blocks: Iterable[Stats]) -> tuple[float, float]:
    """The share of the update that weights keep, and their noise; 1 and 0 without update."""
    total = Stats()
    for stats in blocks:
        total.add(stats)
    return total.gain, total.missed or 0.0


def refuse_loss(blocks: Iterable[Stats], where: object) -> None:
    """Raise if most of an update is lost."""
    gain, noise = in_all(blocks)
    if not gain >= LEAST:
        raise LoraFxError(
            f"{where}: not written: its codes would keep only {gain:.1%} of the update, with "
            f"noise of {noise:.2f} times its size; expected {LEAST:.0%} or more",
            "--dequantise keeps all of the update; --lossy writes the codes anyway",
            exit_code=1,
        )


def sampled(folds: Sequence[tuple[CodesInfo, TensorFold]], count: int = 4) -> Iterator[Stats]:
    """Requantise some rows in the middle of some weights, as a sample of them all."""
    writable = [(info, fold) for info, fold in folds if info.weight.anew is not None]
    step = max(1, len(writable) // count)
    for info, fold in writable[::step][:count]:
        spans = [*info.weight.spans(max(1, BLOCK // info.shape[-1]))]
        low, high = spans[len(spans) // 2]
        rows = slice(low, high)
        stats, _ = recoded(info.weight, info.weight.read(rows), prepared(fold, info), rows, Space())
        yield stats
