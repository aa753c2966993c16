"""What becomes of one tensor of a checkpoint: all updates that mean it, checked against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import ReplacedRows, Rotation, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.fold import TensorFold, arithmetic
from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.checkpoint.int8 import Int8, int8_of
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.rectangles import Matrix, in_dtype, joined, region
from lora_fx.checkpoint.stored_codes import stored_as
from lora_fx.dtypes import DTYPES, FLOATING, Array, finfo
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.target import overlap
from lora_fx.text import Json

_APART = "merge one adapter after the other"


Stage = tuple[TensorFold, str]
"""What a merge does to a tensor: its fold, and the dtype that it rounds to."""


@dataclass(frozen=True)
class TensorChange:
    """What becomes of one tensor of the output.

    Attributes:
        name: In the output.
        source: Where the base's tensor lies.
        dtype: The dtype of the output.
        fold: W + Δ; None where the tensor is replaced whole.
        value: The whole new tensor; None where it is folded.
        what: The kinds, ranks and scales of its updates, for people.
        earlier: Merges before this one, oldest first; only where verify looks back.
        int8: How it is stored where that is int8, which is quantised anew without being asked.
        scales_of: Where the tensor is the scales of such a weight, and is written with it: its
            name; else empty.
        codes: The weight that it holds the codes of, where these are made anew; `name` and
            `source` are those of the codes. None for others.
    """

    name: str
    source: TensorInfo
    dtype: str
    fold: TensorFold | None = None
    value: Array | None = None
    what: tuple[str, ...] = ()
    earlier: tuple[Stage, ...] = ()
    int8: Int8 | None = None
    scales_of: str = ""
    codes: CodesInfo | None = None

    @property
    def weight(self) -> TensorInfo:
        """Where W is read."""
        return self.codes or self.source

    def spans(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of about `most` of the rows that are folded, each of which can be done alone."""
        assert self.fold is not None
        if self.codes is not None:
            yield from self.codes.weight.spans(most)
            return
        for low in range(0, self.fold.matrix.rows, most):
            yield low, min(self.fold.matrix.rows, low + most)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base's tensor, which is that of the output's."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """How many bytes the output's tensor has."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    def to_json(self, s: Stats | None = None) -> Json:
        """A row of `tensors[]` in docs/json.md; what only a merge knows, `s`, is null before."""
        missed, gain = (s.missed, s.gain) if s else (None, None)
        return {
            "key": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "updates": list(self.what),
            "bytes": self.nbytes,
            "ratio": s.ratio if s and math.isfinite(s.ratio) else None,  # of a tensor of zeros
            "lost": s.lost if s else None,
            "gain": gain,
            "int8": {"scheme": self.int8.scheme, "scales": self.int8.name, "error": missed,
                     "own": s.coarse if s else None} if self.int8 else None,
            "requantised": {"format": self.codes.weight.format,
                            "scales": self.codes.weight.anew.scales, "kept": gain, "noise": missed}
            if self.codes and self.codes.weight.anew and self.requantised else None,
        }  # fmt: skip

    @property
    def requantised(self) -> bool:
        """True where its codes are made anew because that was asked for."""
        return self.codes is not None and self.int8 is None


def change_of(
    name: str, info: TensorInfo, placed: Sequence[Placed], base: Checkpoint, dtype: str | None
) -> TensorChange:
    """All updates of one tensor.

    Args:
        name: The tensor's name.
        info: Where it lies in the base, or what is known of a tensor to add.
        placed: The updates; none for a copy.
        base: The checkpoint.
        dtype: The output's dtype where it is a float tensor; as stored where None.

    Raises:
        LoraFxError: A tensor that nothing can be folded into, updates that exclude each other,
            values that the output's dtype cannot hold.
    """
    int8 = stored_as(name, info, base, [p.entry for p in placed])
    out = dtype if dtype and info.dtype in FLOATING else info.dtype
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
        return TensorChange(name, info, out, value=whole.value, what=("replaced whole",))
    _check_apart(name, placed, base)
    matrices: list[Matrix] = []
    for p in placed:
        if not isinstance(p.entry, ReplacedRows):
            assert not isinstance(p.entry, Full)
            matrices.append(region(info.shape, p.bounds, p.entry))
    rows = _rows(name, placed, base)
    if rows or not matrices:
        split = -1 if isinstance(info, CodesInfo) else 1
        sizes = math.prod(info.shape[:split]), math.prod(info.shape[split:])
        matrices.append(Matrix(*sizes, ()))
    matrix = in_dtype(joined(name, matrices), arithmetic(info.dtype, out))
    codes = None
    if int8 is not None:
        int8.check(name, info, matrix)
        weight = int8.weight(info)
        codes = CodesInfo("float32", info.shape, info.file, info.start, info.stop, weight)
    what = tuple(map(_said, placed)) or (("dequantised",) if isinstance(info, CodesInfo) else ())
    fold = TensorFold(name, matrix, rows)
    return TensorChange(name, info, out, fold, what=what, int8=int8, codes=codes)


def requantised(
    name: str, info: CodesInfo, placed: Sequence[Placed], base: Checkpoint
) -> dict[str, TensorChange]:
    """All updates of a weight whose codes are made anew: what becomes of the tensors of it.

    Raises:
        LoraFxError: A format that is read and not written, a whole tensor in the place of codes.
    """
    if (int8 := int8_of(name, base)) is not None:
        change = change_of(name, base.tensors[name], placed, base, None)
        return {name: change, int8.name: scales_change(int8.name, int8.scales, name)}
    weight = info.weight
    anew, why = weight.anew, f"{weight.format} is read, and not written"
    if any(isinstance(p.entry, Full) for p in placed):
        anew, why = None, "the adapter replaces it whole, by floats"
    if anew is None:
        raise LoraFxError(f"{base.path}: {name!r} cannot be quantised anew: {why}", "--dequantise")
    change = change_of(name, info, placed, base, "float32")
    codes, *scales = anew.recoded
    source, what = base.tensors[codes], (*change.what, f"requantised, {anew.scales} scales")
    change = replace(change, name=codes, source=source, dtype=source.dtype, what=what, codes=info)
    return {codes: change, **{n: scales_change(n, base.tensors[n], name) for n in scales}}


def scales_change(name: str, info: TensorInfo, weight: str) -> TensorChange:
    """What becomes of the scales of a weight that is quantised anew."""
    what = (f"new scales of {weight}",)
    return TensorChange(name, info, info.dtype, what=what, scales_of=weight)


def _check_whole(name: str, info: TensorInfo, value: Array, dtype: str) -> None:
    """Raise where a whole tensor cannot be stored as `dtype`."""
    kind = value.dtype.name
    floats = dtype in FLOATING and kind in FLOATING
    if not floats and kind != dtype:
        raise MisfitError(
            f"{info.file}: tensor {name!r} is {dtype}, but the adapter replaces it by {kind}; "
            "expected the same kind"
        )
    if not floats or not value.size:
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
        how = "rotates it (OFT)" if isinstance(p.entry, Rotation) else ""
        if isinstance(p.entry, LowRank) and variant_of(p.entry).reads_weight:
            how = f"rescales it ({name_of(p.entry)})"
        if isinstance(p.entry, LowRank) and p.entry.mutated:
            how = f"is for a base that {p.entry.mutated} changed"
        others = (q for q in placed if q is not p and not isinstance(q.entry, ReplacedRows))
        if how and any(overlap(p.bounds, q.bounds) for q in others):
            raise LoraFxError(
                f"{base.path}: {p.key!r} {how}, and another update changes {name!r} too", _APART
            )


def _rows(name: str, placed: Sequence[Placed], base: Checkpoint) -> Mapping[int, Array]:
    """Row → its new values, each from one update."""
    rows: dict[int, Array] = {}
    for p in placed:
        if not isinstance(p.entry, ReplacedRows):
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
    if isinstance(entry, ReplacedRows):
        return f"{len(entry.index)} rows"
    assert not isinstance(entry, Full)
    rank = f" rank {entry.rank}" if hasattr(entry, "rank") else ""
    part = p.key[p.key.index("[") :] if p.key.endswith("]") else ""
    return f"{name_of(entry)}{part}{rank} scale {entry.scale:.6g}"
