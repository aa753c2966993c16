"""Check that a merged checkpoint is what its plan says.

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
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Rotation
from lora_fx.checkpoint.fold import TensorFold, arithmetic, one_blas_thread, prepared
from lora_fx.checkpoint.int8 import Int8
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.rectangles import Rectangle, in_dtype
from lora_fx.checkpoint.stored_rows import Space, read_block
from lora_fx.checkpoint.tensor_change import Stage, TensorChange
from lora_fx.checkpoint.tensor_differences import Difference
from lora_fx.dtypes import Array, finfo, numpy_dtype
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import same_bytes
from lora_fx.ir.quantised import Quantised

Weights = Mapping[str, QuantisedWeight]
ROWS = 4
"""Rows of every touched tensor that a merge computes again before it is done."""


def prove(
    plan: MergePlan, out: Checkpoint, *, rows: int | None = ROWS, threads: int = 1
) -> Iterator[Difference]:
    """Find what differs between a merged checkpoint and its plan.

    Args:
        plan: The plan of the merge.
        out: The merged checkpoint, reopened.
        rows: Rows of every touched tensor to compute again; None for all.
        threads: How many work at a time.
    """
    for name in (*plan.base.tensors, *plan.added):
        if name not in out.tensors:
            yield Difference(name, "is missing")
    is_requantised = any(change.requantised for change in plan.changes.values())
    weights = quantised_weights(out.tensors, out.config()) if is_requantised else {}

    def tensor(name: str) -> list[Difference]:
        return list(_tensor(plan, out, weights, name, rows))

    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        for differences in pool.map(tensor, out.tensors):
            yield from differences


def _tensor(
    plan: MergePlan, out: Checkpoint, weights: Weights, name: str, rows: int | None
) -> Iterator[Difference]:
    """Compare one tensor of the output with the plan.

    Args:
        plan: The plan of the merge.
        out: The merged checkpoint.
        weights: Its weights of codes, where the merge has made some anew.
        name: The tensor.
        rows: How many to compute again; None for all.
    """
    info = out.tensors[name]
    change = plan.changes.get(name)
    original = plan.base.tensors.get(name)
    expected = change or original
    if expected is None:
        yield Difference(name, "is not in the base")
    elif (expected.shape, expected.dtype) != (info.shape, info.dtype):
        form = f"{expected.dtype} {list(expected.shape)}"
        yield Difference(name, f"is {info.dtype} {list(info.shape)}; expected {form}")
    elif change is not None:
        yield from _recomputed(change, out, weights, rows)
    elif original is not None and not same_bytes(original, info):
        yield Difference(name, "is not changed by any adapter, but its bytes differ from the base")


def _recomputed(
    change: TensorChange, out: Checkpoint, weights: Weights, rows: int | None
) -> Iterator[Difference]:
    """Compute some rows of a tensor again that the merge changes, and compare them."""
    info = out.tensors[change.name]
    if change.scales_of:
        return  # looked at with the codes
    if change.fold is None:
        value = np.asarray(change.value).astype(numpy_dtype(change.dtype)).reshape(info.shape)
        if not same_bytes(info, value):
            yield Difference(change.name, "is not the adapter's whole tensor")
        return

    stages = _exact(change, change.fold)
    exact, _ = stages[0]
    requantised: QuantisedWeight | None = None
    if change.requantised:
        requantised = weights[exact.name]
    elif change.int8 is not None:
        scales = out.tensors.get(change.int8.name)
        original = change.int8.scales
        if scales is None or (scales.dtype, scales.shape) != (original.dtype, original.shape):
            return  # said of the scales
        requantised = replace(change.int8, scales=scales).weight(info)

    worst = 0.0
    worst_row = 0
    for low, high in _samples(change, rows):
        if requantised is None:
            ratio = _ratio(change.source, stages, info, low, high)
        else:
            ratio = _ratio_codes(change, requantised, exact, low, high)
        if not ratio <= worst:
            worst = ratio
            worst_row = low
    if not worst <= 1.0:
        what = (
            f"differs from W + ΔW by {worst:.3g} times what rounding allows, from row {worst_row} "
            "on"
        )
        yield Difference(change.name, what, worst)


def _samples(change: TensorChange, rows: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of rows to compute again: all, or some single rows, the same in every run."""
    assert change.fold is not None
    matrix = change.fold.matrix
    if rows is None or rows >= matrix.rows:
        yield from change.spans(max(1, matrix.rows_per_block // 4))
        return
    digest = hashlib.sha256(change.name.encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "little"))  # numpy's is slow to import
    for row in sorted(generator.sample(range(matrix.rows), rows)):
        yield row, row + 1


def _exact(change: TensorChange, last: TensorFold) -> list[Stage]:
    """The folds of a change, oldest first, with every factor in fp64."""
    stages: list[Stage] = []
    for fold, dtype in (*change.earlier, (last, change.dtype)):
        stages.append((replace(fold, matrix=in_dtype(fold.matrix, np.float64)), dtype))
    # The later ones need no more than rows: verify allows no other.
    first, first_dtype = stages[0]
    stages[0] = (prepared(first, change.weight), first_dtype)
    return stages


def _ratio(source: TensorInfo, stages: list[Stage], info: TensorInfo, low: int, high: int) -> float:
    """The largest error of rows low ≤ i < high, as a multiple of what is allowed.

    Args:
        source: The base's tensor.
        stages: The merges of it, oldest first.
        info: The output's tensor.
        low: The first row.
        high: The row behind the last.
    """
    first, _ = stages[0]
    columns = first.matrix.columns
    exact = read_block(source, low, high, columns).astype(np.float64)
    stored = read_block(info, low, high, columns).astype(np.float64)
    allowed = np.zeros_like(exact)
    dtype = source.dtype
    for fold, rounded_to in stages:
        exact, size = _stage(fold, exact, low, high)
        for row in fold.rows:
            if low <= row < high:
                allowed[row - low] = 0.0  # what was there before is gone
        u = float(np.finfo(arithmetic(dtype, rounded_to)).eps)
        rounding = half_ulp(np.abs(exact) + allowed, rounded_to)
        allowed = allowed + rounding + u * (np.abs(exact) + size)
        dtype = rounded_to
    return float(_row_ratios(np.abs(stored - exact), allowed).max(initial=0.0))


def _ratio_codes(
    change: TensorChange, requantised: QuantisedWeight, exact: TensorFold, low: int, high: int
) -> float:
    """The largest error of the codes of rows low ≤ i < high, as a multiple of what is allowed.

    1. Codes are the nearest by the scales beside them.
    2. The whole is no worse than by the scales that the format's rule gives.
    3. Scales of int8 are those of the largest exact values, or those that were there, where these
       hold W + Δ as fp32 sees it.

    Args:
        change: What becomes of the tensor.
        requantised: The output's weight.
        exact: The fold, in fp64.
        low: The first row.
        high: The row behind the last.
    """
    assert change.codes is not None and change.codes.weight.anew is not None
    original = change.codes.weight
    rows = _whole_steps(original, low, high)
    before = original.read(rows)
    after = requantised.read(rows)
    weight = before.dequantise().astype(np.float64)
    want, size = _stage(exact, weight, rows.start, rows.stop)
    slack = 2 * float(np.finfo(np.float32).eps) * (np.abs(want) + size)
    stored = after.dequantise()
    if not np.isfinite(stored).all():
        return math.inf

    want32 = want.astype(np.float32)
    nearest = after.nearest(want32, requantised.bits).dequantise()
    error = np.abs(stored - want)
    ratios = _row_ratios(error, np.abs(nearest - want) + slack)
    ratio = float(ratios.max(initial=0.0)) / 1.001

    delta = (want - weight).astype(np.float32)
    best, _ = change.codes.weight.anew.recode(before, rows, want32, delta)
    total = float(np.linalg.norm(error))
    if total:
        allowed = 1.1 * float(np.linalg.norm(best.dequantise() - want))
        ratio = max(ratio, total / (allowed + float(np.linalg.norm(slack))))
    if change.int8 is None or not ratio <= 1.0:
        return ratio
    return max(ratio, _ratio_scales(change.int8, before, after, want, error, slack))


def _whole_steps(weight: QuantisedWeight, low: int, high: int) -> slice:
    """The least rows around low ≤ i < high that can be read alone."""
    first_of_matrix = low - low % weight.shape[-2]
    start = low - (low - first_of_matrix) % weight.step
    first, behind_last = next(weight.spans(high - start + weight.step - 1, start))
    return slice(first, behind_last)


def _ratio_scales(
    int8: Int8, before: Quantised, after: Quantised, want: Array, error: Array, slack: Array
) -> float:
    """The largest error of the scales of int8 rows, as a multiple of what is allowed.

    Args:
        int8: How the weight is stored.
        before: The base's rows.
        after: The output's.
        want: W + Δ, exactly.
        error: What the output's rows differ from it by.
        slack: What fp32 may have changed in it.
    """
    largest = np.abs(want).max(axis=1, keepdims=True, initial=0.0)
    exact = int8.scale(largest)
    allowed = slack.max(axis=1, keepdims=True) / int8.top + half_ulp(exact, int8.scales.dtype)
    ratios = np.abs(after.scale - exact) / allowed
    # a row may keep a scale that holds W + Δ as fp32 sees it
    is_same = (after.scale.view(np.uint8) == before.scale.view(np.uint8)).all(axis=1)
    ratios_of_same = np.where(is_same, _row_ratios(error, slack), np.inf)
    return float(np.minimum(ratios[:, 0], ratios_of_same).max(initial=0.0))


def _stage(fold: TensorFold, weight: Array, low: int, high: int) -> tuple[Array, Array]:
    """W + ΔW of rows low ≤ i < high, and what its rounding errors are proportional to."""
    want, _ = fold.sum(weight, low, Space())
    size = np.abs(weight)
    for i, rectangle in enumerate(fold.matrix.rectangles):
        first = max(low, rectangle.top)
        behind_last = min(high, rectangle.bottom)
        if first >= behind_last:
            continue
        view = (slice(first - low, behind_last - low), slice(rectangle.left, rectangle.right))
        size[view] += _size(rectangle, first, behind_last, weight[view])
        if rectangle.reads_weight:
            sums = weight[view] + rectangle.delta(first, behind_last)
            factor = fold.factor(i, rectangle, sums, first, behind_last)
            size[view] *= np.abs(factor)
            size[view] += np.sqrt(fold.matrix.columns) * np.abs(want[view])
    return want, size


def _row_ratios(error: Array, allowed: Array) -> Array:
    """The largest error of each row as a multiple of what is allowed; infinite for NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error == 0.0, 0.0, error / allowed)
    ratios = np.where(np.isnan(ratios), np.inf, ratios)
    return np.asarray(ratios.max(axis=1, initial=0.0))


def _size(rectangle: Rectangle, low: int, high: int, weight: Array) -> Array:
    """(r + 3)·s·|B||A|: what rounding errors of the product are proportional to."""
    change = rectangle.change
    if isinstance(change, Rotation):
        absolute = replace(change, turn=np.abs(change.turn))
        return np.asarray(absolute.of(np.abs(weight)) * (change.turn.shape[-1] + 3))
    if isinstance(change, LowRank):
        product = replace(change, a=np.abs(change.a), b=np.abs(change.b), alpha=abs(change.alpha))
        return np.asarray(replace(rectangle, change=product).delta(low, high) * (change.rank + 3))
    return np.asarray(np.abs(rectangle.delta(low, high)) * 64.0)


def half_ulp(x: Array, dtype: str) -> Array:
    """Half the spacing of `dtype` at x, a little more for ties; x in fp64."""
    info = finfo(dtype)
    lowest = int(info.minexp)
    _, exponents = np.frexp(np.abs(x))
    exponents = np.maximum(np.where(x == 0, lowest, exponents - 1), lowest)
    return np.asarray(np.ldexp(0.5 * (1 + 2.0**-10), exponents - int(info.nmant)))
