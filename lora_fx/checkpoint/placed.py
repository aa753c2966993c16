"""An entry of an adapter at its tensor: the region that it changes, and how it lies there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Change, Dense, Entry, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.refusal import SHAPES, TIED, MergeRefusal
from lora_fx.checkpoint.storage_order import lookup
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.checkpoint import Checkpoint, says_tied
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.ir.view import Region
from lora_fx.targets.target import base_name, split_key, split_use


@dataclass(frozen=True)
class Placed:
    """An entry of an adapter at its tensor.

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
        """An update of one use of a tensor, at the tensor that this use will read.

        Raises:
            LoraFxError: The base stores one tensor for this use and others, or nothing says that
                the one of this use is read by no other.
        """
        use, name = use_of(self.key, self.entry), base_name(self.key)
        if not use:
            return self
        known = tie is not None and self.tensor in (tie.table, tie.head, *tie.lookups)
        said = says_tied(base.config()) is False or (untie and name != use)
        if use == self.tensor and (known or (said and name in base.tensors)):
            return self
        if tie is not None and self.tensor == tie.table:
            if use == "op:embedding":
                return self
            if use.startswith("op:") and tie.head:
                return replace(self, tensor=tie.head)
        raise MergeRefusal(
            TIED,
            [self.key],
            f"{base.path}: the update of {self.key!r} means one use of {self.tensor!r} ({use}), "
            "which the base stores once for several; merged, it would change all of them",
            "train one update for all uses, or export the model itself: fold keeps uses apart",
        )


def use_of(key: str, entry: Entry) -> str:
    """The uses of a shared tensor that an entry means; empty for all of them."""
    return (entry.use if isinstance(entry, LowRank) else "") or split_use(key)[1]


def region_of(key: str, info: TensorInfo) -> Region:
    """The region of a tensor that a key names; raises where it is none."""
    try:
        bounds = split_key(key, info.shape)[1]
    except ValueError:
        bounds = ()
    inside = (0 <= lo < hi <= n for (lo, hi), n in zip(bounds, info.shape, strict=False))
    if len(bounds) != len(info.shape) or not all(inside):
        raise MisfitError(f"{info.file}: {key!r} is no region of a tensor {list(info.shape)}")
    return bounds


def with_layout(key: str, entry: Entry, info: TensorInfo, bounds: Region, turned: bool) -> Entry:
    """The entry with the layout that it has in the tensor."""
    shape = tuple(hi - lo for lo, hi in bounds)
    if isinstance(entry, Full):
        if tuple(entry.value.shape) != shape:
            grown = "was the vocabulary resized? resize the base's embeddings first, then merge"
            hint = grown if entry.value.ndim == 2 else ""
            raise _misfit(key, info, f"a whole tensor {list(entry.value.shape)}", hint)
        return entry
    if isinstance(entry, ReplacedRows):
        fits = shape and shape == info.shape and tuple(entry.value.shape[1:]) == shape[1:]
        if not fits or not all(0 <= i < shape[0] for i in entry.index):
            last = max(entry.index, default=-1)
            raise _misfit(key, info, f"rows {list(entry.value.shape)} up to {last}", "")
        return entry
    if isinstance(entry, Rotation):
        return _rotation(key, entry, info)
    if entry.layout is not None:
        if entry.layout.stored != shape:
            raise _misfit(key, info, f"an update for {list(entry.layout.stored)}", "")
        return entry
    layout = _layout(entry, shape, turned)
    if layout is None:
        sides = " × ".join(str(n) for n in entry.shape)
        raise _misfit(key, info, f"an update of {sides} (out × in)", "")
    if isinstance(entry, LowRank) and (variant := variant_of(entry)).by_rows:
        for field, value in variant.beside(entry).items():
            if value.shape != (layout.out_size,):
                raise _misfit(key, info, f"a {field} {list(value.shape)}", "")
    return replace(entry, layout=layout)


def _rotation(key: str, entry: Rotation, info: TensorInfo) -> Rotation:
    if math.prod(info.shape[2:]) > 1:
        raise LoraFxError(
            f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is OFT of a "
            "kernel, which PEFT merges otherwise than it trains it; expected a kernel of 1",
            "merge it into its model with PEFT (merge_and_unload), if that is what you want",
        )
    if len(info.shape) < 2 or not entry.fits(math.prod(info.shape[1:])):
        blocks = f"{'shared' if entry.shared else len(entry.turn)} blocks of {entry.turn.shape[-1]}"
        raise _misfit(key, info, f"OFT of {blocks} along in", "")
    return replace(entry, layout=plain_layout(info.shape))


def _misfit(key: str, info: TensorInfo, what: str, hint: str) -> LoraFxError:
    return MergeRefusal(
        SHAPES,
        [key],
        f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is {what}",
        hint or "was the adapter trained on another model?",
    )


def _layout(change: Change, shape: tuple[int, ...], turned: bool) -> Layout | None:
    """How a change of [*batch, out, in] lies in a tensor of this shape; None where it cannot."""
    *batch, out, in_ = change.shape
    n = len(batch)
    if isinstance(change, Dense) and len(shape) == 1:
        return plain_layout(shape) if (out, in_) == (shape[0], 1) else None
    if len(shape) < n + 2 or tuple(batch) != shape[:n]:
        return None
    rows, rest = shape[n], math.prod(shape[n + 1 :])
    lead, tail = tuple(range(n)), tuple(range(n + 1, len(shape)))
    straight = Layout(shape, lead, (n,), tail, shape) if (rows, rest) == (out, in_) else None
    fits = len(shape) == n + 2 and (rows, rest) == (in_, out)
    swapped = Layout(shape, lead, (n + 1,), (n,), shape) if fits else None
    if lookup(change) or (turned and swapped):
        return swapped
    return straight or swapped
