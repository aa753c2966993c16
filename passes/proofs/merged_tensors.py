"""A merged .onnx file, tensor by tensor: nothing is run.

What no update touches has the base's bytes, and rows of everything else are computed again in
fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.compare import (
    EPSILON,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.files.run_files import check_unchanged
from lora_fx.files.stored_tensors import same_bytes
from lora_fx.inputs import Named
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.match import Matched
from lora_fx.passes.fold import Fold, fold_rows
from lora_fx.passes.insert import Pair
from lora_fx.targets.found import Found

PROOF_ROWS = 4
"""Rows of every touched tensor that are computed again."""


def prove_merge(
    temporary: Path,
    target: Path,
    base: Named,
    changed: set[str],
    found: Found,
    matched: Matched,
    fold: Fold,
) -> OnnxGraph:
    """Open the written file, and compare its tensors with the expected ones.

    Args:
        temporary: The file that was written.
        target: The name that it gets.
        base: Name of a tensor of the base → what reads it.
        changed: The tensors that are not the base's.
        found: The targets of the base.
        matched: The adapter's tensors, in the base's names.
        fold: The pass that made the file.

    Raises:
        LoraFxError: A tensor differs from what it has to be.
    """
    written = OnnxGraph(load(temporary))
    for name, read in base.items():
        if name not in changed and not same_bytes(written.reader(name)(), read()):
            check_unchanged()  # a base that is another one now has other numbers
            raise LoraFxError(
                f"{target}: not written: tensor {name!r} differs from the base's, and no update "
                "is for it",
                "is the disk full?",
            )
    for name, gap in _wrong_rows(written, base, found, fold):
        check_unchanged()
        raise LoraFxError(
            f"{target}: not written: tensor {name!r} is wrong by {gap:.2e}",
            "this is a mistake of lora-fx: please report it",
        )
    for name, value in matched.whole.items():
        if not same_bytes(written.reader(name)(), value.astype(base[name]().dtype)):
            raise MistakeError(f"{target}: not written: tensor {name!r} differs from the adapter's")
    return written


def _wrong_rows(
    written: OnnxGraph, base: Named, found: Found, fold: Fold
) -> Iterator[tuple[str, float]]:
    """Tensors of which some rows are not W + s·b·a, and how far they are off."""
    rng = np.random.default_rng()
    changes = {f"{folded.parameter}|{'|'.join(folded.keys)}": folded for folded in fold.report}
    for name in dict.fromkeys(fold.applied.values()):  # parts of one tensor lie in one constant
        changes_of_tensor = [
            changes[ident] for ident, stored_as in fold.applied.items() if stored_as == name
        ]
        first_change = changes_of_tensor[0]
        moved = fold.moved.get(first_change.keys[0])
        if moved is not None:
            yield from _wrong_zeros(written, name, *moved)
            continue

        pairs: list[Pair] = []
        for folded in changes_of_tensor:
            pairs += [(found[key], fold.updates[key]) for key in folded.keys]
        weight = base[first_change.parameter]()
        rows = _some_rows(weight, rng)
        exact = fold_rows(weight, pairs, rows)
        size = _largest(exact) + _largest(weight[rows].astype(np.float64))
        gap = _largest(written.reader(name)()[rows].astype(np.float64) - exact)
        if not gap <= _rounding_of(weight.dtype) * size:
            yield name, gap


def _some_rows(weight: Array, rng: np.random.Generator) -> slice:
    """Some random rows of a matrix; all of a tensor of another shape."""
    if weight.ndim != 2:
        return slice(None)
    n_rows = weight.shape[0]
    first = int(rng.integers(0, max(1, n_rows - PROOF_ROWS + 1)))
    return slice(first, min(n_rows, first + PROOF_ROWS))


def _rounding_of(dtype: np.dtype[Any]) -> float:
    """The largest rounding error of a sum in a dtype, relative to the sum."""
    if dtype.name in EPSILON:
        return EPSILON[dtype.name]
    if dtype == np.float32:
        return 8 * 2.0**-23
    return 2.0**-40


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0.0))


def _wrong_zeros(
    written: OnnxGraph, name: str, base: ZeroPoints, delta: Array
) -> Iterator[tuple[str, float]]:
    """Zero points of codes that are not the base's less Δ/scale, and how far they are off."""
    if delta.any():
        zero = written.reader(name)().astype(np.float64)
    else:
        zero = base.zero
    size = (np.abs(zero) + np.abs(base.zero.astype(np.float64))) * np.abs(base.scale)
    gap = np.abs(base.change(zero) - delta)
    eps = EPSILON.get(base.scale.dtype.name, 2.0**-23)
    if not (gap <= eps * size).all():
        yield name, float(gap.max())
