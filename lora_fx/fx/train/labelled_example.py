"""Labels in the example of a capture, so that it has the same arguments as every batch.

A program is of one set of arguments. An example without the labels that every batch brings costs
two captures more: one of each mode, which nothing runs afterwards.
"""

from __future__ import annotations

import numpy as np

from lora_fx.data import Buckets, Table
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.train.loss import Loss, loss_function


def label_example(cap: Captured, table: Table | Buckets, loss: str | Loss) -> None:
    """Add labels like those of the batches to the example, before anything is traced.

    They are zeros in the example's sizes, one a row, or one a token of an input of whole numbers:
    0 is a class of every model. Fractions, and labels of other shapes, are left to the first
    batch: not every model takes fractions, and nothing says how large the others are.
    """
    arguments = cap.signature.keywords
    _, argument = loss_function(loss, table.label, lambda name: name in arguments)
    if not argument or argument in cap.named or table.label not in table.columns:
        return
    labels = np.asarray(table.columns[table.label])
    like = _input_of_labels(cap, table, labels)
    if like is None or labels.dtype.kind not in "iu":
        return
    shape = tuple(cap.named[like].shape)[: labels.ndim]
    dims = cap.requested.get(like, {})
    free = {dim: symbol for dim, symbol in dims.items() if dim < labels.ndim}
    cap.extend_example(argument, from_numpy(np.zeros(shape, labels.dtype)), free)


def _input_of_labels(cap: Captured, table: Table | Buckets, labels: Array) -> str | None:
    """Return the example's input that has a label for each row, or for each row and token."""
    for spec in cap.inputs.specs:
        column = table.columns.get(spec.name)
        if column is None or spec.name not in cap.named or not spec.shape:
            continue
        if labels.ndim == 1:
            return spec.name
        is_tokens = spec.is_integer and len(spec.shape) == 2
        if labels.ndim == 2 and is_tokens and np.shape(column) == labels.shape:
            return spec.name
    return None
