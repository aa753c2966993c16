"""Held-out examples: split off, or of a file of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.text import some


def split(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """(training, validation): `share` of the examples held out, of every label in its share.

    Whole numbers are labels where they repeat: twice on average. Labels with a single example
    stay in training.
    """
    order = np.random.default_rng(seed).permutation(len(table))
    count = min(len(table) - 1, max(1, round(share * len(table)))) if share else 0
    labels = table.columns.get(table.label)
    single = np.zeros(len(table), bool)
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu":
        _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if 2 * len(counts) <= len(labels):
            order = order[np.argsort(number[order], kind="stable")]
            single = counts[number] == 1
    held = order[((np.arange(count) + 0.5) * len(table) / max(1, count)).astype(int)]
    held = np.sort(held[~single[held]])
    return table.rows(np.setdiff1d(np.arange(len(table)), held)), table.rows(held)


def alike(held_out: Table, training: Table, path: str, data: str) -> Table:
    """Held-out examples of a file of their own.

    Raises:
        LoraFxError: They have other columns than the training's, or labels that it has not.
    """
    there, here = ([*sorted(t.columns), *t.words] for t in (held_out, training))
    same = sorted(held_out.columns) == sorted(training.columns)
    strangers = [repr(word) for word in held_out.words if word not in training.words]
    if same and training.words and strangers and max(len(there), len(here)) > 8:
        raise LoraFxError(
            f"{path}: column {training.label!r} has {some(strangers, 4)}; expected labels that "
            f"{data} has",
            "no label may be new in held-out examples",
        )
    if not same or strangers or bool(held_out.words) != bool(training.words):
        raise LoraFxError(
            f"{path} has {some(there, 8)}; expected {some(here, 8)}, as {data} has",
            "both need the same columns, and no label may be new",
        )
    places = [training.words.index(word) for word in held_out.words]
    if not places:
        return held_out
    labels = np.array(places)[held_out.columns[held_out.label]]
    made = {**held_out.columns, held_out.label: labels}
    return replace(held_out, columns=made, words=training.words)


def repeated(held_out: Table, training: Table) -> int:
    """How many held-out examples are trained on too: their inputs, whatever is padded with 0."""
    known = set(_inputs(training))
    return sum(key in known for key in _inputs(held_out))


def _inputs(table: Table) -> list[int]:
    """A hash of each example's inputs."""
    columns = [v for k, v in sorted(table.columns.items()) if k != table.label]
    rows = range(len(table))
    return [hash(tuple(v[i].tobytes().rstrip(b"\0") for v in columns)) for i in rows]
