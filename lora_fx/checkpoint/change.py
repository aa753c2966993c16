"""What becomes of one tensor of a checkpoint: all updates that mean it, checked against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Rows, name_of
from lora_fx.checkpoint.blocks import Fold, arithmetic
from lora_fx.checkpoint.int8 import Int8
from lora_fx.checkpoint.match import Placed
from lora_fx.checkpoint.quantised import HINT, stored_as
from lora_fx.checkpoint.rectangles import Matrix, in_dtype, joined, region
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import DTYPES, WEIGHTS, TensorInfo

BITS = dict(DTYPES.values())
_APART = "merge one adapter after the other"


@dataclass(frozen=True)
class Stage:
    """What an earlier merge did to a tensor: its fold, and the dtype that it rounded to."""

    fold: Fold
    dtype: str


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the output.

    Attributes:
        name: In the output.
        source: Where the base's tensor lies.
        dtype: Of the output.
        shape: Of both.
        fold: W + Δ; None where the tensor is replaced whole.
        value: The whole new tensor; None where it is folded.
        what: For people: the kinds, ranks and scales of its updates.
        earlier: Merges before this one, oldest first; only where verify looks back.
        int8: How it is stored where it is quantised anew; None for floats.
        scales_of: Where the tensor is the scales of such a weight, and is written with it: its
            name; else empty.
    """

    name: str
    source: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    fold: Fold | None = None
    value: Array | None = None
    what: tuple[str, ...] = ()
    earlier: tuple[Stage, ...] = ()
    int8: Int8 | None = None
    scales_of: str = ""

    @property
    def nbytes(self) -> int:
        """Of the output."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def to_json(self) -> dict[str, Any]:
        """A row of `tensors[]` in docs/json.md; what only a merge knows is null."""
        return {
            "key": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "updates": list(self.what),
            "bytes": self.nbytes,
            "ratio": None,
            "lost": None,
            "gain": None,
            "int8": {"scheme": self.int8.scheme, "scales": self.int8.name, "error": None,
                     "own": None} if self.int8 else None,
        }  # fmt: skip

    @property
    def scales(self) -> Change | None:
        """What becomes of its scales; None for floats."""
        if self.int8 is None:
            return None
        info, what = self.int8.scales, f"new scales of {self.name}"
        name = self.int8.name
        return Change(name, info, info.dtype, info.shape, what=(what,), scales_of=self.name)


def change_of(
    name: str, info: TensorInfo, placed: Sequence[Placed], base: Checkpoint, dtype: str | None
) -> Change:
    """All updates of one tensor.

    Args:
        name: Of the tensor.
        info: Of the base, or of a tensor to add.
        placed: The updates; none for a copy.
        base: The checkpoint.
        dtype: Of the output where it is a float tensor; as stored where None.

    Raises:
        LoraFxError: A tensor that nothing can be folded into, updates that exclude each other,
            values that the output's dtype cannot hold.
    """
    int8 = stored_as(name, info, base, [p.entry for p in placed])
    out = dtype if dtype and info.dtype in WEIGHTS else info.dtype
    whole = next((p.entry for p in placed if isinstance(p.entry, Full)), None)
    if whole is not None:
        if len(placed) > 1:
            key = next(p.key for p in placed if p.entry is whole)
            raise LoraFxError(
                f"{base.path}: {name!r} is replaced whole by {key!r} and changed by another "
                "update too",
                _APART,
            )
        _check_whole(name, info, whole.value, out)
        return Change(name, info, out, info.shape, value=whole.value, what=("replaced whole",))
    _check_apart(name, placed, base)
    matrices: list[Matrix] = []
    for p in placed:
        if not isinstance(p.entry, Rows):
            assert not isinstance(p.entry, Full)
            matrices.append(region(info.shape, p.bounds, p.entry))
    rows = _rows(name, placed, base)
    if rows or not matrices:
        matrices.append(Matrix(info.shape[0], math.prod(info.shape[1:]), ()))
    matrix = in_dtype(joined(name, matrices), arithmetic(info.dtype, out))
    if int8 is not None:
        _check_int8(name, info, matrix)
    what = tuple(map(_said, placed))
    return Change(name, info, out, info.shape, Fold(name, matrix, rows), what=what, int8=int8)


def _check_int8(name: str, info: TensorInfo, matrix: Matrix) -> None:
    """Raise for updates whose rows are not the codes' rows, or that need the float original."""
    for p in matrix.parts:
        why = ""
        if p.transposed or (matrix.rows, matrix.columns) != info.shape:
            why = "the update is for a weight stored [in, out]; int8 codes are stored [out, in]"
        elif isinstance(p.change, LowRank) and p.change.extra.get("mutated"):
            why = f"the update is for a base that {p.change.extra['mutated']} changed before"
        if why:
            raise LoraFxError(f"{info.file}: tensor {name!r} is int8: {why}", HINT)


def _check_whole(name: str, info: TensorInfo, value: Array, dtype: str) -> None:
    """Raise where a whole tensor cannot be stored as `dtype`."""
    floats = value.dtype.name in WEIGHTS
    if dtype not in WEIGHTS or not floats:
        if value.dtype.name != dtype:
            raise LoraFxError(
                f"{info.file}: tensor {name!r} is {dtype}, but the adapter replaces it by "
                f"{value.dtype.name}; expected the same kind",
                "was the adapter trained on another model?",
            )
        return
    if not value.size:
        return
    high, low = float(value.max()), float(value.min())
    if not math.isfinite(high - low):
        raise LoraFxError(
            f"the adapter's whole tensor {name!r} has NaN or infinite values; expected finite ones",
            "training may have diverged; use an earlier checkpoint",
        )
    limit = float(finfo(dtype).max)
    if max(high, -low) > limit:
        worst = high if high > limit else low
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is {dtype}, which cannot hold the adapter's {worst:g}",
            "--dtype bfloat16 or float32 can",
        )


def _check_apart(name: str, placed: Sequence[Placed], base: Checkpoint) -> None:
    """Raise where an update's rescaling and another update meet: their order would matter."""
    for p in placed:
        if not isinstance(p.entry, LowRank):
            continue
        mutated = p.entry.extra.get("mutated")
        if p.entry.magnitude is None and not mutated:
            continue
        for q in placed:
            meet = all(a < d and c < b for (a, b), (c, d) in zip(p.bounds, q.bounds, strict=True))
            if q is not p and meet and not isinstance(q.entry, Rows):
                how = f"is for a base that {mutated} changed" if mutated else "rescales it (DoRA)"
                raise LoraFxError(
                    f"{base.path}: {p.key!r} {how}, and another update changes {name!r} too",
                    _APART,
                )


def _rows(name: str, placed: Sequence[Placed], base: Checkpoint) -> Mapping[int, Array]:
    """Row → its new values, each from one update."""
    rows: dict[int, Array] = {}
    for p in placed:
        if not isinstance(p.entry, Rows):
            continue
        for i, value in zip(p.entry.index, p.entry.value, strict=True):
            if i in rows and not np.array_equal(rows[i], value):
                raise LoraFxError(
                    f"{base.path}: row {i} of {name!r} is replaced twice, by different values",
                    _APART,
                )
            rows[i] = value
    return rows


def _said(p: Placed) -> str:
    entry = p.entry
    if isinstance(entry, Rows):
        return f"{len(entry.index)} rows"
    assert not isinstance(entry, Full)
    rank = f" rank {entry.rank}" if hasattr(entry, "rank") else ""
    part = p.key[p.key.index("[") :] if p.key.endswith("]") else ""
    return f"{name_of(entry)}{part}{rank} scale {entry.scale:.6g}"
