"""Held-out examples: split off from the training data, or from a separate file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.data import Table
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.text import some


def split(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """(training, validation): `share` of the examples held out, of every label in its share.

    Whole numbers are labels where they repeat: twice on average. Labels with a single example
    stay in training.
    """
    n_examples = len(table)
    count = 0
    if share:
        count = min(n_examples - 1, max(1, round(share * n_examples)))
    order, is_single = _order_by_label(table, seed)

    # At even distances in the order, so that every label gives its share.
    places = (np.arange(count) + 0.5) * n_examples / max(1, count)
    held_out = order[places.astype(int)]
    held_out = np.sort(held_out[~is_single[held_out]])
    training = np.setdiff1d(np.arange(n_examples), held_out)
    return table.rows(training), table.rows(held_out)


def _order_by_label(table: Table, seed: int) -> tuple[Array, Array]:
    """Shuffled numbers of the examples, those of a label together.

    Returns:
        The numbers; and for each example whether it is the only one of its label.
    """
    order = np.random.default_rng(seed).permutation(len(table))
    is_single = np.zeros(len(table), bool)
    labels = table.columns.get(table.label)
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return order, is_single
    _labels, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if 2 * len(counts) > len(labels):
        return order, is_single
    return order[np.argsort(number[order], kind="stable")], counts[number] == 1


def alike(held_out: Table, training: Table, path: str, data: str) -> Table:
    """Held-out examples from a separate file, with the training's numbers for labels.

    Args:
        held_out: The examples.
        training: Those that are trained on.
        path: The file of the held-out examples, for messages.
        data: The file of the others.

    Raises:
        LoraFxError: They have other columns than the training's, or labels that it has not.
    """
    held_out_names = [*sorted(held_out.columns), *held_out.words]
    training_names = [*sorted(training.columns), *training.words]
    has_same_columns = sorted(held_out.columns) == sorted(training.columns)
    new_labels = [repr(word) for word in held_out.words if word not in training.words]
    has_many_names = max(len(held_out_names), len(training_names)) > 8
    if has_same_columns and training.words and new_labels and has_many_names:
        raise LoraFxError(
            f"{path}: column {training.label!r} has {some(new_labels, 4)}; expected only labels "
            f"in {data}",
            "remove held-out examples with new labels",
        )
    has_same_kind = bool(held_out.words) == bool(training.words)
    if not has_same_columns or new_labels or not has_same_kind:
        raise LoraFxError(
            f"{path} has {some(held_out_names, 8)}; expected {some(training_names, 8)}, as in "
            f"{data}",
            "give both files the same columns, and no new labels",
        )
    if not held_out.words:
        return held_out
    numbers = np.array([training.words.index(word) for word in held_out.words])
    labels = numbers[held_out.columns[held_out.label]]
    columns = {**held_out.columns, held_out.label: labels}
    return replace(held_out, columns=columns, words=training.words)


def repeated(held_out: Table, training: Table) -> int:
    """The number of held-out examples whose inputs are in the training data, padding aside."""
    trained_inputs = set(_hashes_of_inputs(training))
    return sum(example in trained_inputs for example in _hashes_of_inputs(held_out))


def _hashes_of_inputs(table: Table) -> list[int]:
    """A hash of each example's inputs, without the zeros at their ends."""
    columns = [values for name, values in sorted(table.columns.items()) if name != table.label]
    hashes: list[int] = []
    for row in range(len(table)):
        inputs = tuple(values[row].tobytes().rstrip(b"\0") for values in columns)
        hashes.append(hash(inputs))
    return hashes
