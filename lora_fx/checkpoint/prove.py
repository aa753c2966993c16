"""Is a merged checkpoint what its plan says? And how the tensors of any two checkpoints differ.

What was merged is reopened. Untouched tensors are compared with the base's byte by byte. Rows of
every touched tensor are computed again in fp64, by the definition, and compared within what
fp32 and one rounding allow:

    |new − exact| ≤ ½ ulp(exact) + u·(|W| + |exact| + Σ (r + 3)·s·|B||A|)

u is 2⁻²³, or 2⁻⁵² where the fold is done in fp64. DoRA's factor scales the bound, and its norm
adds √columns·u·|exact|. A tensor that several merges have changed is allowed their sum. An int8
weight is quantised anew, so its scales are those of the largest exact values of the rows, and
½ ulp is half of a new step. Other codes that are made anew have to be the nearest by their scales.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Rotation
from lora_fx.checkpoint.fold import (
    BLOCK,
    Rectangle,
    Space,
    TensorFold,
    arithmetic,
    in_dtype,
    one_blas_thread,
    prepared,
    read_block,
)
from lora_fx.checkpoint.merge_plan import MergePlan, Stage, TensorChange
from lora_fx.dtypes import DTYPES, Array, finfo, numpy_dtype
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import same_bytes, stored_elements
from lora_fx.text import Json, strict_json

Weights = Mapping[str, QuantisedWeight]
ROWS = 4
"""Rows of every touched tensor that a merge computes again before it is done."""


def prove(
    plan: MergePlan, out: Checkpoint, *, rows: int | None = ROWS, threads: int = 1
) -> Iterator[Difference]:
    """What differs between a merged checkpoint and what the plan says it should be.

    Args:
        plan: The plan of the merge.
        out: The merged checkpoint, reopened.
        rows: Rows of every touched tensor to compute again; None for all.
        threads: How many work at a time.
    """
    for name in (*plan.base.tensors, *plan.added):
        if name not in out.tensors:
            yield Difference(name, "is missing")
    anew = any(c.requantised for c in plan.changes.values())
    weights = quantised_weights(out.tensors, out.config()) if anew else {}

    def tensor(name: str) -> list[Difference]:
        return list(_tensor(plan, out, weights, name, rows))

    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        for found in pool.map(tensor, out.tensors):
            yield from found


def _tensor(
    plan: MergePlan, out: Checkpoint, weights: Weights, name: str, rows: int | None
) -> Iterator[Difference]:
    info, change, old = out.tensors[name], plan.changes.get(name), plan.base.tensors.get(name)
    wanted = change or old
    if wanted is None:
        yield Difference(name, "is not in the base")
    elif (wanted.shape, wanted.dtype) != (info.shape, info.dtype):
        expected = f"{wanted.dtype} {list(wanted.shape)}"
        yield Difference(name, f"is {info.dtype} {list(info.shape)}; expected {expected}")
    elif change is not None:
        yield from _recomputed(change, out, weights, rows)
    elif old is not None and not same_bytes(old, info):
        yield Difference(name, "no adapter changes it, but its bytes are not the base's")


def _recomputed(
    change: TensorChange, out: Checkpoint, weights: Weights, rows: int | None
) -> Iterator[Difference]:
    info = out.tensors[change.name]
    if change.scales_of:
        return  # looked at with the codes
    if change.fold is None:
        want = np.asarray(change.value).astype(numpy_dtype(change.dtype)).reshape(info.shape)
        if not same_bytes(info, want):
            yield Difference(change.name, "is not the adapter's whole tensor")
        return
    worst, at = 0.0, 0
    stages = _exact(change, change.fold)
    made = weights[stages[0][0].name] if change.requantised else None
    if (int8 := change.int8) is not None:
        there, old = out.tensors.get(int8.name), int8.scales
        if there is None or (there.dtype, there.shape) != (old.dtype, old.shape):
            return  # said of the scales
        made = replace(int8, scales=there).weight(info)
    for low, high in _samples(change, rows):
        if made is None:
            ratio = _ratio(change.source, stages, info, low, high)
        else:
            ratio = _ratio_codes(change, made, stages[0][0], low, high)
        if not ratio <= worst:
            worst, at = ratio, low
    if not worst <= 1.0:
        what = f"differs from W + ΔW by {worst:.3g} times what rounding allows, at rows from {at}"
        yield Difference(change.name, what, worst)


def _samples(change: TensorChange, rows: int | None) -> Iterator[tuple[int, int]]:
    assert change.fold is not None
    matrix = change.fold.matrix
    if rows is None or rows >= matrix.rows:
        yield from change.spans(max(1, matrix.rows_per_block // 4))
        return
    digest = hashlib.sha256(change.name.encode()).digest()
    some = random.Random(int.from_bytes(digest[:8], "little"))  # numpy's is slow to import
    for row in sorted(some.sample(range(matrix.rows), rows)):
        yield row, row + 1


def _exact(change: TensorChange, last: TensorFold) -> list[Stage]:
    """The folds of a change, oldest first, with every factor in fp64."""
    stages = [*change.earlier, (last, change.dtype)]
    wide = [(replace(f, matrix=in_dtype(f.matrix, np.float64)), dtype) for f, dtype in stages]
    (first, dtype), *later = wide  # which need no more than rows: verify allows no other
    return [(prepared(first, change.weight), dtype), *later]


def _ratio(source: TensorInfo, stages: list[Stage], info: TensorInfo, low: int, high: int) -> float:
    """The largest error of rows low ≤ i < high, as a multiple of what is allowed."""
    columns = stages[0][0].matrix.columns
    want = read_block(source, low, high, columns).astype(np.float64)
    new = read_block(info, low, high, columns).astype(np.float64)
    allowed, dtype = np.zeros_like(want), source.dtype
    for fold, narrow in stages:
        want, size = _stage(fold, want, low, high)
        for row in fold.rows:
            if low <= row < high:
                allowed[row - low] = 0.0  # what was there before is gone
        u = float(np.finfo(arithmetic(dtype, narrow)).eps)
        rounded = half_ulp(np.abs(want) + allowed, narrow)
        allowed = allowed + rounded + u * (np.abs(want) + size)
        dtype = narrow
    return float(_rows(np.abs(new - want), allowed).max(initial=0.0))


def _ratio_codes(
    change: TensorChange, made: QuantisedWeight, exact: TensorFold, low: int, high: int
) -> float:
    """Codes are the nearest by their scales, and the whole is no worse than by exact scales."""
    assert change.codes is not None and change.codes.weight.anew is not None
    before = change.codes.weight
    first = low - low % before.shape[-2]
    start = low - (low - first) % before.step
    rows = slice(*next(before.spans(high - start + before.step - 1, start)))
    q, after = before.read(rows), made.read(rows)
    old = q.dequantise().astype(np.float64)
    want, size = _stage(exact, old, rows.start, rows.stop)
    slack = 2 * float(np.finfo(np.float32).eps) * (np.abs(want) + size)
    narrow = want.astype(np.float32)
    there = after.dequantise()
    if not np.isfinite(there).all():
        return math.inf
    nearest = after.nearest(narrow, made.bits).dequantise()
    error = np.abs(there - want)
    ratio = float(_rows(error, np.abs(nearest - want) + slack).max(initial=0.0)) / 1.001
    best = change.codes.weight.anew.recode(q, rows, narrow, (want - old).astype(np.float32))[0]
    whole = float(np.linalg.norm(error))
    allowed = 1.1 * float(np.linalg.norm(best.dequantise() - want)) + float(np.linalg.norm(slack))
    ratio = max(ratio, whole / allowed if whole else 0.0)
    if change.int8 is None or not ratio <= 1.0:
        return ratio
    # a row may keep a scale that holds W + Δ as fp32 sees it
    largest = np.abs(want).max(axis=1, keepdims=True, initial=0.0)
    exactly, room = change.int8.scale(largest), slack.max(axis=1, keepdims=True) / change.int8.top
    scaled = np.abs(after.scale - exactly) / (room + half_ulp(exactly, change.int8.scales.dtype))
    same = after.scale.view(np.uint8) == q.scale.view(np.uint8)
    kept = np.where(same.all(axis=1), _rows(error, slack), np.inf)
    return max(ratio, float(np.minimum(scaled[:, 0], kept).max(initial=0.0)))


def _stage(fold: TensorFold, old: Array, low: int, high: int) -> tuple[Array, Array]:
    """W + ΔW of rows low ≤ i < high, and what its rounding errors are proportional to."""
    want = fold.sum(old, low, Space())[0]
    size = np.abs(old)
    for i, p in enumerate(fold.matrix.parts):
        lo, hi = max(low, p.top), min(high, p.bottom)
        if lo < hi:
            view = (slice(lo - low, hi - low), slice(p.left, p.right))
            size[view] += _size(p, lo, hi, old[view])
            if p.reads_weight:
                factor = fold.factor(i, p, old[view] + p.delta(lo, hi), lo, hi)
                size[view] *= np.abs(factor)
                size[view] += np.sqrt(fold.matrix.columns) * np.abs(want[view])
    return want, size


def _rows(error: Array, allowed: Array) -> Array:
    """The largest error of each row as a multiple of what is allowed; infinite for NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0.0, 0.0, error / allowed)
    return np.asarray(np.where(np.isnan(ratio), np.inf, ratio).max(axis=1, initial=0.0))


def _size(p: Rectangle, low: int, high: int, weight: Array) -> Array:
    """(r + 3)·s·|B||A|: what rounding errors of the product are proportional to."""
    c = p.change
    if isinstance(c, Rotation):
        wide = replace(c, turn=np.abs(c.turn))
        return np.asarray(wide.of(np.abs(weight)) * (c.turn.shape[-1] + 3))
    if isinstance(c, LowRank):
        absolute = replace(c, a=np.abs(c.a), b=np.abs(c.b), alpha=abs(c.alpha))
        size = replace(p, change=absolute).delta(low, high) * (c.rank + 3)
    else:
        size = np.abs(p.delta(low, high)) * 64.0
    return np.asarray(size)


def half_ulp(x: Array, dtype: str) -> Array:
    """Half the spacing of `dtype` at x, a little more for ties; x in fp64."""
    info = finfo(dtype)
    _, exponent = np.frexp(np.abs(x))
    low = np.maximum(np.where(x == 0, int(info.minexp), exponent - 1), int(info.minexp))
    return np.asarray(np.ldexp(0.5 * (1 + 2.0**-10), low - int(info.nmant)))


# Two checkpoints compared tensor by tensor: names, shapes, dtypes and values, streamed.
#
# rel = max|a − b| / max|b| of a tensor, both in fp64. Equal bytes are equal, whatever they mean;
# NaN or an infinity on one side only, and a difference where b is all zero, are infinite.


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what it should be.

    Attributes:
        tensor: Its name.
        what: In words.
        ratio: In the proof of a merge, the largest error over what is allowed.
        rel: Between two files, max|a − b| / max|b|.
        max_abs: Between two files, max|a − b|.
        elements: How many elements of two files differ.
    """

    tensor: str
    what: str
    ratio: float = math.inf
    rel: float = math.inf
    max_abs: float = math.inf
    elements: int | None = None

    def to_json(self) -> Json:
        """Plain values; an infinite difference is null."""
        row: Json = strict_json(vars(self))
        return {"key": row.pop("tensor"), **row}


def unlike(a: Tensors, b: Tensors, tol: float = 0.0) -> Iterator[Difference]:
    """Every tensor of `a` that is not that of `b`, the reference.

    Args:
        a: Tensors of one checkpoint.
        b: Tensors of the other.
        tol: Gate on rel. Above 0, tensors of different dtypes are compared by their values; at 0
            they differ.
    """
    yield from (Difference(name, "is missing in A", elements=0) for name in b if name not in a)
    for name, ours in a.items():
        theirs = b.get(name)
        if theirs is None:
            yield Difference(name, "is missing in B", elements=0)
        elif ours.shape != theirs.shape:
            what = f"is {list(ours.shape)}; expected {list(theirs.shape)}"
            yield Difference(name, what, elements=0)
        elif ours.dtype != theirs.dtype and not tol:
            yield Difference(name, f"is {ours.dtype}; expected {theirs.dtype}", elements=0)
        else:
            found = _values(name, ours, theirs)
            if found is not None and not found.rel <= tol:
                yield found


def _values(name: str, ours: TensorInfo, theirs: TensorInfo) -> Difference | None:
    """How the values of two tensors of one shape differ; None where they are equal."""
    if same_bytes(ours, theirs):
        return None
    if DTYPES[ours.dtype].bits % 8 or DTYPES[theirs.dtype].bits % 8 or "complex" in ours.dtype:
        return Difference(name, "its bytes differ", elements=0)
    gap = top = 0.0
    count = 0
    size = math.prod(ours.shape)
    for low in range(0, size, BLOCK):
        x, y = (stored_elements(t, low, min(low + BLOCK, size)) for t in (ours, theirs))
        count += int(np.count_nonzero(x != y))
        wide, reference = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(reference)
        same = np.isfinite(wide) == finite
        if not same.all() or not np.array_equal(wide[~finite], reference[~finite]):
            what = "has NaN or infinite values where the other has not"
            return Difference(name, what, elements=0)
        gap = max(gap, float(np.abs(wide - reference)[finite].max(initial=0.0)))
        top = max(top, float(np.abs(reference)[finite].max(initial=0.0)))
    if not count:  # −0 and 0
        return None
    rel = gap / top if top else math.inf
    share = count / size
    what = f"{count} of {size} elements ({share:.1%}) differ, by up to {gap:.2e} (rel {rel:.2e})"
    return Difference(name, what, math.inf, max(rel, math.ulp(0.0)), gap, count)
