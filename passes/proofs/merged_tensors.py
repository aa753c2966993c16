"""A merged .onnx file, tensor by tensor: nothing is run.

What no update touches has the base's bytes, and rows of everything else are computed again in
fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_fx.compare import (
    EPSILON,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.files.read import check_unchanged
from lora_fx.files.safetensors import same_bytes
from lora_fx.inputs import Named
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.match import Matched
from lora_fx.passes.fold import Fold, fold_rows
from lora_fx.targets.target import Found

PROOF_ROWS = 4
"""Rows of every touched tensor that are computed again."""


def prove_merge(
    temporary: Path,
    target: Path,
    before: Named,
    changed: set[str],
    found: Found,
    matched: Matched,
    fold: Fold,
) -> OnnxGraph:
    """Open what was written, and compare it with what it has to be."""
    written = OnnxGraph(load(temporary))
    for name in before:
        if name not in changed and not same_bytes(written.reader(name)(), before[name]()):
            check_unchanged()  # a base that is another one now has other numbers
            raise LoraFxError(f"{target}: not written: {name!r} is not the base's", "a full disk?")
    for name, wrong in _wrong_rows(written, before, found, fold):
        check_unchanged()
        raise LoraFxError(
            f"{target}: not written: {name!r} is off by {wrong:.2e}",
            "this is a mistake of lora-fx: please report it",
        )
    for name, value in matched.whole.items():
        if not same_bytes(written.reader(name)(), value.astype(before[name]().dtype)):
            raise MistakeError(f"{target}: not written: {name!r} is not the adapter's")
    return written


def _wrong_rows(
    written: OnnxGraph, before: Named, found: Found, fold: Fold
) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng()
    idents = {f"{f.parameter}|{'|'.join(f.keys)}": f for f in fold.report}
    for name in dict.fromkeys(fold.applied.values()):  # parts of one tensor lie in one constant
        parts = [idents[i] for i, stored in fold.applied.items() if stored == name]
        if (moved := fold.moved.get(parts[0].keys[0])) is not None:
            yield from _wrong_zeros(written, name, *moved)
            continue
        pairs = [(found[k], fold.updates[k]) for f in parts for k in f.keys]
        base, got = before[parts[0].parameter](), written.reader(name)()
        if base.ndim != 2:
            rows = slice(None)
        else:
            first = int(rng.integers(0, max(1, base.shape[0] - PROOF_ROWS + 1)))
            rows = slice(first, min(base.shape[0], first + PROOF_ROWS))
        exact = fold_rows(base, pairs, rows)
        eps = EPSILON.get(base.dtype.name, 8 * 2.0**-23 if base.dtype == np.float32 else 2.0**-40)
        size = np.abs(exact).max(initial=0.0) + np.abs(base[rows].astype(np.float64)).max(initial=0)
        gap = float(np.abs(got[rows].astype(np.float64) - exact).max(initial=0.0))
        if not gap <= eps * size:
            yield name, gap


def _wrong_zeros(
    written: OnnxGraph, name: str, old: ZeroPoints, delta: Array
) -> Iterator[tuple[str, float]]:
    """Zero points of codes that are not the old ones less Δ/scale."""
    zero = written.reader(name)().astype(np.float64) if delta.any() else old.zero
    size = (np.abs(zero) + np.abs(old.zero.astype(np.float64))) * np.abs(old.scale)
    gap = np.abs(old.change(zero) - delta)
    if not (gap <= EPSILON.get(old.scale.dtype.name, 2.0**-23) * size).all():
        yield name, float(gap.max())
