"""An adapter entry with its checkpoint tensor, the region that it changes, and its layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Change, Dense, Entry, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.refusal import SHAPES, TIED, MergeRefusal
from lora_fx.checkpoint.storage_order import is_lookup
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.checkpoint import Checkpoint, says_tied
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.ir.view import Region
from lora_fx.targets.keys import base_name, split_key, split_use


@dataclass(frozen=True)
class Placed:
    """An adapter entry matched to its tensor.

    Attributes:
        key: The adapter's.
        tensor: Name in the checkpoint.
        bounds: The region that changes, half-open, per stored axis.
        entry: The entry with its layout.
    """

    key: str
    tensor: str
    bounds: Region
    entry: Entry

    def at_its_use(self, tie: Tie | None, base: Checkpoint, *, untie: bool) -> Placed:
        """Move an update of one use of a tensor to the tensor that this use will read.

        Args:
            tie: The tie of the base's head and embedding, where it has one.
            base: The checkpoint.
            untie: The merge may make a tensor of its own for a use.

        Raises:
            LoraFxError: The base stores one tensor for this use and others, or nothing says that
                the one of this use is read by no other.
        """
        use = use_of(self.key, self.entry)
        if not use:
            return self
        if use == self.tensor and self._is_tensor_of_one_use(use, tie, base, untie=untie):
            return self
        if tie is not None and self.tensor == tie.table:
            if use == "op:embedding":
                return self
            if use.startswith("op:") and tie.head:
                return replace(self, tensor=tie.head)
        raise MergeRefusal(
            TIED,
            [self.key],
            f"{base.path}: the update of {self.key!r} is for one use of {self.tensor!r} ({use}), "
            "but the base stores one tensor for several uses; a merge would change all of them",
            "train one update for all uses, or fold the model with lora_fx.fold, which keeps "
            "the uses apart",
        )

    def _is_tensor_of_one_use(
        self, use: str, tie: Tie | None, base: Checkpoint, *, untie: bool
    ) -> bool:
        """Whether the tensor with the use's name is, or will be, read by that use alone."""
        if tie is not None and self.tensor in (tie.table, tie.head, *tie.lookups):
            return True  # the merge parts the uses of these by itself
        name = base_name(self.key)
        is_untied = says_tied(base.config()) is False or (untie and name != use)
        return is_untied and name in base.tensors


def use_of(key: str, entry: Entry) -> str:
    """Return the use of a shared tensor that an entry is for; empty for all uses."""
    if isinstance(entry, LowRank) and entry.use:
        return entry.use
    _, use = split_use(key)
    return use


def region_of(key: str, info: TensorInfo) -> Region:
    """Return the region of a tensor that a key names; the whole tensor if it names none.

    Raises:
        MisfitError: The tensor has no such region.
    """
    try:
        _, bounds = split_key(key, info.shape)
    except ValueError:
        bounds = ()
    if not _is_within(bounds, info.shape):
        raise MisfitError(f"{info.file}: {key!r} is not a region of a tensor {list(info.shape)}")
    return bounds


def _is_within(bounds: Region, shape: tuple[int, ...]) -> bool:
    """Whether bounds are inside a shape and contain at least one element of each axis."""
    if len(bounds) != len(shape):
        return False
    return all(0 <= low < high <= size for (low, high), size in zip(bounds, shape, strict=True))


def with_layout(key: str, entry: Entry, info: TensorInfo, bounds: Region, in_out: bool) -> Entry:
    """Return the entry with its layout in the tensor.

    Args:
        key: The adapter's.
        entry: What changes the tensor.
        info: The tensor.
        bounds: The region of it that changes.
        in_out: The tensor is known to be stored [in, out].

    Raises:
        LoraFxError: The entry does not fit the region.
    """
    shape = tuple(high - low for low, high in bounds)
    if isinstance(entry, Full):
        _check_whole(key, entry, info, shape)
        return entry
    if isinstance(entry, ReplacedRows):
        _check_rows(key, entry, info, shape)
        return entry
    if isinstance(entry, Rotation):
        return _laid_rotation(key, entry, info)
    if entry.layout is not None:
        if entry.layout.stored != shape:
            raise _misfit(key, info, f"an update for {list(entry.layout.stored)}")
        return entry

    if isinstance(entry, LowRank):
        entry = variant_of(entry).within(entry, math.prod(shape))
    layout = layout_in(entry, shape, in_out)
    if layout is None:
        sides = " × ".join(str(size) for size in entry.shape)
        raise _misfit(key, info, f"an update of {sides} (out × in)")
    if isinstance(entry, LowRank):
        _check_row_tensors(key, entry, info, layout)
    return replace(entry, layout=layout)


def _check_whole(key: str, entry: Full, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise if a whole tensor's shape differs from the tensor that it replaces."""
    value = entry.value
    if tuple(value.shape) == shape:
        return
    hint = ""
    if value.ndim == 2:
        hint = "if the vocabulary was resized, resize the base's embeddings first, then merge"
    raise _misfit(key, info, f"a whole tensor {list(value.shape)}", hint)


def _check_rows(key: str, entry: ReplacedRows, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise if replaced rows do not fit the whole tensor."""
    is_whole_tensor = bool(shape) and shape == info.shape
    fits = is_whole_tensor and tuple(entry.value.shape[1:]) == shape[1:]
    if fits and all(0 <= row < shape[0] for row in entry.index):
        return
    last = max(entry.index, default=-1)
    raise _misfit(key, info, f"rows {list(entry.value.shape)} with indices up to {last}")


def _check_row_tensors(key: str, entry: LowRank, info: TensorInfo, layout: Layout) -> None:
    """Raise if a variant's per-row tensors (other than A and B) have a wrong number of rows."""
    variant = variant_of(entry)
    if not variant.by_rows:
        return
    for field, value in variant.beside(entry).items():
        if value.shape != (layout.out_size,):
            raise _misfit(key, info, f"a {field} {list(value.shape)}")


def _laid_rotation(key: str, entry: Rotation, info: TensorInfo) -> Rotation:
    """Return a rotation with the layout of its tensor [out, in] or [out, in, 1, 1]."""
    if math.prod(info.shape[2:]) > 1:
        raise LoraFxError(
            f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is OFT of a "
            "convolution kernel, which PEFT merges differently from how it trains it; expected a "
            "kernel of size 1",
            "to get PEFT's result, merge it into its model with PEFT (merge_and_unload)",
        )
    if len(info.shape) < 2 or not entry.fits(math.prod(info.shape[1:])):
        count = "shared" if entry.shared else len(entry.turn)
        raise _misfit(
            key, info, f"OFT of {count} blocks of {entry.turn.shape[-1]} along the in axis"
        )
    return replace(entry, layout=plain_layout(info.shape))


def _misfit(key: str, info: TensorInfo, what: str, hint: str = "") -> LoraFxError:
    """Return the error for an entry whose shape is not its tensor's."""
    return MergeRefusal(
        SHAPES,
        [key],
        f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is {what}",
        hint or "check that the adapter was trained on this model",
    )


def layout_in(change: Change, shape: tuple[int, ...], in_out: bool) -> Layout | None:
    """Return the layout of a change [*batch, out, in] in a tensor of this shape; None if unfit.

    A table that is looked up is [in, out]. Other tensors are [*batch, out, *in], or, where that
    does not fit or `in_out` says so, [*batch, in, out].
    """
    *batch, out, in_ = change.shape
    if isinstance(change, Dense) and len(shape) == 1:
        if (out, in_) != (shape[0], 1):
            return None
        return plain_layout(shape)

    count = len(batch)
    if len(shape) < count + 2 or tuple(batch) != shape[:count]:
        return None
    out_in: Layout | None = None
    swapped: Layout | None = None
    batch_axes = tuple(range(count))
    sides = (shape[count], math.prod(shape[count + 1 :]))
    if sides == (out, in_):
        in_axes = tuple(range(count + 1, len(shape)))
        out_in = Layout(shape, batch_axes, (count,), in_axes, shape)
    if sides == (in_, out) and len(shape) == count + 2:
        swapped = Layout(shape, batch_axes, (count + 1,), (count,), shape)

    if is_lookup(change) or (in_out and swapped is not None):
        return swapped
    return swapped if out_in is None else out_in
