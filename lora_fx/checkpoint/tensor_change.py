"""The change of one tensor of a checkpoint: all updates of the tensor, checked against its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, ReplacedRows, Rotation, name_of
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
from lora_fx.targets.regions import overlap
from lora_fx.text import Json

_ONE_BY_ONE = "merge one adapter after the other"


Stage = tuple[TensorFold, str]
"""One merge's change of a tensor: its fold, and the dtype of the result."""


@dataclass(frozen=True)
class TensorChange:
    """The change of one tensor of the output.

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
        """The tensor, or the codes, from which W is read."""
        return self.codes or self.source

    def spans(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of about `most` folded rows that can be computed independently."""
        assert self.fold is not None
        if self.codes is not None:
            yield from self.codes.weight.spans(most)
            return
        rows = self.fold.matrix.rows
        for low in range(0, rows, most):
            yield low, min(rows, low + most)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base's tensor, which is also the output's shape."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """The number of bytes in the output's tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def requantised(self) -> bool:
        """Whether the tensor's codes are written again because of `requantise`."""
        return self.codes is not None and self.int8 is None

    def to_json(self, stats: Stats | None = None) -> Json:
        """Return a row of `tensors[]` in docs/json.md; null for fields that lack their `stats`."""
        row: Json = {
            "key": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "updates": list(self.what),
            "bytes": self.nbytes,
            "ratio": None,
            "lost": None,
            "gain": None,
            "measured": None,
            "int8": None,
            "requantised": None,
        }
        missed = None
        coarse = None
        if stats is not None:
            missed = stats.missed
            coarse = stats.coarse
            row["lost"] = stats.lost
            row["gain"] = stats.gain
            row["measured"] = stats.share_measured
            if math.isfinite(stats.ratio):  # not of a tensor of zeros
                row["ratio"] = stats.ratio

        if self.int8 is not None:
            row["int8"] = {
                "scheme": self.int8.scheme,
                "scales": self.int8.name,
                "error": missed,
                "own": coarse,
            }
        elif self.codes is not None and self.codes.weight.anew is not None:
            row["requantised"] = {
                "format": self.codes.weight.format,
                "scales": self.codes.weight.anew.scales,
                "kept": row["gain"],
                "noise": missed,
            }
        return row


def change_of(
    name: str, info: TensorInfo, placed: Sequence[Placed], base: Checkpoint, dtype: str | None
) -> TensorChange:
    """Combine all updates of one tensor into its change.

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
    int8 = stored_as(name, info, base, [update.entry for update in placed])
    out = dtype if dtype and info.dtype in FLOATING else info.dtype
    replacement = _whole_of(name, placed, base)
    if replacement is not None:
        _check_whole(name, info, replacement.value, out)
        return TensorChange(name, info, out, value=replacement.value, what=("replaced whole",))

    _check_order(name, placed, base)
    matrices: list[Matrix] = []
    for update in placed:
        if not isinstance(update.entry, ReplacedRows):
            assert not isinstance(update.entry, Full)
            matrices.append(region(info.shape, update.bounds, update.entry))
    rows = _replaced_rows(name, placed, base)
    if rows or not matrices:
        matrices.append(_as_rows(info))
    matrix = in_dtype(joined(name, matrices), arithmetic(info.dtype, out))

    codes = None
    if int8 is not None:
        int8.check(name, info, matrix)
        weight = int8.weight(info)
        codes = CodesInfo("float32", info.shape, info.file, info.start, info.stop, weight)
    what = tuple(_described(update) for update in placed)
    if not what and isinstance(info, CodesInfo):
        what = ("dequantised",)
    fold = TensorFold(name, matrix, rows)
    return TensorChange(name, info, out, fold, what=what, int8=int8, codes=codes)


def _whole_of(name: str, placed: Sequence[Placed], base: Checkpoint) -> Full | None:
    """Return the entry that replaces a whole tensor; None if there is none.

    Raises:
        LoraFxError: Another update changes the tensor too.
    """
    for update in placed:
        if not isinstance(update.entry, Full):
            continue
        if len(placed) > 1:
            raise LoraFxError(
                f"{base.path}: {update.key!r} replaces the whole tensor {name!r}, and another "
                "update changes that tensor too",
                _ONE_BY_ONE,
            )
        return update.entry
    return None


def _as_rows(info: TensorInfo) -> Matrix:
    """Return an unchanged tensor as rows: along its first axis; codes along all but the last."""
    split = -1 if isinstance(info, CodesInfo) else 1
    rows = math.prod(info.shape[:split])
    columns = math.prod(info.shape[split:])
    return Matrix(rows, columns, ())


def requantised(
    name: str, info: CodesInfo, placed: Sequence[Placed], base: Checkpoint
) -> dict[str, TensorChange]:
    """Combine all updates of a weight that is requantised; return the change of each stored tensor.

    Raises:
        LoraFxError: A format that lora-fx cannot write, or a whole tensor that replaces codes.
    """
    int8 = int8_of(name, base)
    if int8 is not None:
        change = change_of(name, base.tensors[name], placed, base, None)
        return {name: change, int8.name: scales_change(int8.name, int8.scales, name)}

    anew = info.weight.anew
    why = f"lora-fx reads {info.weight.format}, but does not write it"
    if any(isinstance(update.entry, Full) for update in placed):
        anew = None
        why = "the adapter replaces the whole tensor by floats"
    if anew is None:
        raise LoraFxError(
            f"{base.path}: {name!r} cannot be quantised again: {why}",
            "pass --dequantise to write floats",
        )

    codes, *scales = anew.recoded
    change = change_of(name, info, placed, base, "float32")
    change = replace(
        change,
        name=codes,
        source=base.tensors[codes],
        dtype=base.tensors[codes].dtype,
        what=(*change.what, f"requantised, {anew.scales} scales"),
        codes=info,
    )
    changes = {codes: change}
    for scale in scales:
        changes[scale] = scales_change(scale, base.tensors[scale], name)
    return changes


def scales_change(name: str, info: TensorInfo, weight: str) -> TensorChange:
    """Return the change of the scales of a weight that is requantised."""
    what = (f"new scales of {weight}",)
    return TensorChange(name, info, info.dtype, what=what, scales_of=weight)


def _check_whole(name: str, info: TensorInfo, value: Array, dtype: str) -> None:
    """Raise if a whole tensor cannot be stored as `dtype`."""
    value_dtype = value.dtype.name
    are_floats = dtype in FLOATING and value_dtype in FLOATING
    if not are_floats and value_dtype != dtype:
        raise MisfitError(
            f"{info.file}: tensor {name!r} is {dtype}, but the adapter replaces it by "
            f"{value_dtype}; expected the same kind of dtype"
        )
    if not are_floats or not value.size:
        return

    highest = float(value.max())
    lowest = float(value.min())
    if not math.isfinite(highest - lowest):
        raise LoraFxError(
            f"the adapter's whole tensor {name!r} has NaN or infinite values; expected finite ones",
            "training may have diverged; use an earlier checkpoint",
        )
    limit = float(finfo(dtype).max)
    if max(highest, -lowest) > limit:
        worst = highest if highest > limit else lowest
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is {dtype}, which cannot hold the adapter's {worst:g}",
            "pass --dtype bfloat16 or float32, which can hold it",
        )


def _check_order(name: str, placed: Sequence[Placed], base: Checkpoint) -> None:
    """Raise if the result of updates of the same elements depends on their order."""
    for update in placed:
        why = _needs_base_alone(update.entry)
        if not why:
            continue
        for other in placed:
            if other is update or isinstance(other.entry, ReplacedRows):
                continue
            if overlap(update.bounds, other.bounds):
                raise LoraFxError(
                    f"{base.path}: {update.key!r} {why}, and another update changes {name!r} too",
                    _ONE_BY_ONE,
                )


def _needs_base_alone(entry: Entry) -> str:
    """Return why an update needs the unchanged base weight; empty if it is only added."""
    if isinstance(entry, Rotation):
        return "rotates it (OFT)"
    if not isinstance(entry, LowRank):
        return ""
    if entry.mutated:
        return f"is for a base that {entry.mutated} changed"
    if variant_of(entry).reads_weight:
        return f"rescales it ({name_of(entry)})"
    return ""


def _replaced_rows(name: str, placed: Sequence[Placed], base: Checkpoint) -> Mapping[int, Array]:
    """Return row → its new values; each row has one update."""
    rows: dict[int, Array] = {}
    for update in placed:
        if not isinstance(update.entry, ReplacedRows):
            continue
        for row, value in zip(update.entry.index, update.entry.value, strict=True):
            if row in rows and not np.array_equal(rows[row], value):
                raise LoraFxError(
                    f"{base.path}: row {row} of {name!r} is replaced twice, by different values",
                    _ONE_BY_ONE,
                )
            rows[row] = value
    return rows


def _described(update: Placed) -> str:
    """Describe the kind, region, rank and scale of an update, for people."""
    entry = update.entry
    if isinstance(entry, ReplacedRows):
        return f"{len(entry.index)} rows"
    assert not isinstance(entry, Full)
    kind = name_of(entry)
    if update.key.endswith("]"):
        kind += update.key[update.key.index("[") :]
    if hasattr(entry, "rank"):
        kind += f" rank {entry.rank}"
    return f"{kind} scale {entry.scale:.6g}"
