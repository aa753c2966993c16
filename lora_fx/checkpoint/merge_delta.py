"""The ΔW that a merge of an adapter adds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.as_lora import Approximated, as_lora
from lora_fx.checkpoint.fold import prepared
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge_plan import WeightedAdapter
from lora_fx.checkpoint.merge_settings import LENIENT
from lora_fx.checkpoint.stored_rows import Space, read_block
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint


def plain_in(base: str | None, adapter: Adapter, **goal: Any) -> tuple[Adapter, list[Approximated]]:
    """Make plain LoRA of an adapter (adapter/truncate.py); `base` is read where a ΔW needs W."""
    delta_of = partial(delta_in, open_checkpoint(base)) if base else None
    return as_lora(adapter, **goal, delta_of=delta_of)


def delta_in(base: Checkpoint, adapter: Adapter) -> Array:
    """The ΔW [out, in] that a merge of an adapter of one update adds, whatever that reads of W.

    Raises:
        LoraFxError: The base lacks its tensor, or the update does not fit.
    """
    options = replace(LENIENT, allow_missing=True)
    plan = make_plan(base, [WeightedAdapter(adapter, 1.0, "the adapter", "")], options)
    change = next(iter(plan.changes.values()))
    if change.fold is None or len(change.fold.matrix.rectangles) != 1:
        raise LoraFxError(
            f"{change.name!r} is a stack of matrices or a grouped convolution, which has no "
            "single ΔW",
            "--exclude it, and merge that update into its base",
        )
    fold = prepared(change.fold, change.weight)
    weight = read_block(change.weight, 0, fold.matrix.rows, fold.matrix.columns)
    _, delta = fold.sum(weight.astype(np.float32), 0, Space())
    rectangle = fold.matrix.rectangles[0]
    delta = delta[rectangle.top : rectangle.bottom, rectangle.left : rectangle.right]
    return np.ascontiguousarray(delta.T if rectangle.transposed else delta)
