"""Data for `lora-fx train`: npz, JSONL, CSV or a loader function, as named columns.

A column is an array with one row an example, or a list of texts that the model's tokenizer turns
into input_ids and attention_mask. Keys are the names of the model's arguments.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.errors import LoraFxError, one_line

Array = npt.NDArray[Any]
Tokenizer = Callable[[list[str]], Mapping[str, Array]]
LABELS = ("labels", "label", "y", "target")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `label` names the one to predict, or is empty."""

    columns: Mapping[str, Array]
    label: str = ""

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def rows(self, index: npt.ArrayLike) -> Table:
        """The examples of an index, in its order."""
        return Table({k: v[np.asarray(index)] for k, v in self.columns.items()}, self.label)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """Batches in order, or shuffled by a seed; the last one may be smaller."""
        order = np.arange(len(self))
        if seed is not None:
            np.random.default_rng(seed).shuffle(order)
        for start in range(0, len(order), size):
            yield self.rows(order[start : start + size])


@dataclass(frozen=True)
class Buckets:
    """Ready-made batches, such as texts of like length together; their order is shuffled."""

    tables: Sequence[Table]

    @property
    def columns(self) -> Mapping[str, Array]:
        """Those of the first batch."""
        return self.tables[0].columns

    @property
    def label(self) -> str:
        """The column to predict."""
        return self.tables[0].label

    def __len__(self) -> int:
        """Number of examples."""
        return sum(len(t) for t in self.tables)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """The batches as they were made, whatever `size` says."""
        order = np.arange(len(self.tables))
        if seed is not None:
            np.random.default_rng(seed).shuffle(order)
        for i in order:
            yield self.tables[int(i)]


def split(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """(training, validation): `share` of the examples held out, of every label where it is whole.

    Labels with a single example stay in training.
    """
    rng = np.random.default_rng(seed)
    labels = table.columns.get(table.label)
    groups: list[Array] = [np.arange(len(table))]
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu":
        groups = [np.flatnonzero(labels == v) for v in np.unique(labels)]
    held: list[int] = []
    for group in groups:
        n = min(len(group) - 1, max(1, round(share * len(group)))) if share else 0
        held += list(rng.permutation(group)[: max(0, n)])
    keep = np.setdiff1d(np.arange(len(table)), held)
    return table.rows(keep), table.rows(np.sort(np.asarray(held, int)))


def read_table(path: str, *, label: str = "", tokenizer: Tokenizer | None = None) -> Table:
    """Read a data file.

    Args:
        path: `.npz`, `.jsonl`, `.csv`.
        label: The column to predict; found by the usual names where it is empty.
        tokenizer: For columns of texts.

    Raises:
        LoraFxError: Names the file, and the row and column where there is one.
    """
    readers = {".npz": read_npz, ".jsonl": _jsonl, ".csv": _csv}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise LoraFxError(
            f"{path}: data of an unknown kind {suffix!r}", ".npz, .jsonl, .csv or module:loader"
        )
    if not Path(path).is_file():
        raise LoraFxError(f"{path}: no such file", "give a path to the data")
    return table_of(readers[suffix](path), path, label=label, tokenizer=tokenizer)


def table_of(
    raw: Mapping[str, Any], where: str, *, label: str = "", tokenizer: Tokenizer | None = None
) -> Table:
    """Columns as arrays: texts tokenised, labels of words numbered in sorted order."""
    if not raw or not len(next(iter(raw.values()))):
        raise LoraFxError(f"{where}: no rows", "there is nothing to train on")
    if label and label not in raw:
        raise LoraFxError(f"{where}: no column {label!r}", f"the columns are {', '.join(raw)}")
    label = label or next((n for n in LABELS if n in raw), "")
    lengths = {k: len(v) for k, v in raw.items()}
    if len(set(lengths.values())) > 1:
        raise LoraFxError(f"{where}: columns of different lengths: {lengths}", "one row an example")
    columns: dict[str, Array] = {}
    texts: list[str] = []
    for name, values in raw.items():
        is_text = isinstance(values[0], str)
        if name == label and is_text:
            words = sorted(set(values))
            columns[name] = np.array([words.index(v) for v in values])
        elif is_text:
            texts.append(name)
        else:
            columns[name] = _array(values, where, name)
    if texts:
        if tokenizer is None:
            raise LoraFxError(
                f"{where}: column {texts[0]!r} is text and the model has no tokenizer",
                "use a Hugging Face folder with a tokenizer, or numeric columns",
            )
        joined = [" ".join(raw[n][i] for n in texts) for i in range(lengths[texts[0]])]
        columns.update(tokenizer(joined))
    return Table(columns, label)


def _array(values: Any, where: str, name: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as e:
        raise LoraFxError(
            f"{where}: column {name!r} has rows of different lengths", "pad them to one length"
        ) from e
    if array.dtype.kind not in "iufb":
        raise LoraFxError(f"{where}: column {name!r} is neither numbers nor text", "drop it")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def read_npz(path: str) -> dict[str, Any]:
    """Arrays of an .npz by name; never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError) as e:
        raise LoraFxError(
            f"{path}: not a readable .npz: {one_line(e)}", "numpy.savez makes one"
        ) from e


def _jsonl(path: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    with open(path, encoding="utf-8") as f:
        for i, line in enumerate((x for x in f if x.strip()), 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise LoraFxError(f"{path}: row {i} is no JSON: {e}", "one object a line") from e
            if not isinstance(row, dict) or (i > 1 and set(row) != set(columns)):
                raise LoraFxError(
                    f"{path}: row {i} has the keys {sorted(row)}; the first has {sorted(columns)}",
                    "every row needs the same keys",
                )
            for k, v in row.items():
                columns.setdefault(k, []).append(v)
    return columns


def _csv(path: str) -> dict[str, list[Any]]:
    with open(path, encoding="utf-8", newline="") as f:
        reader = csv.reader(f)
        names = next(reader, [])
        rows = list(reader)
    for i, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise LoraFxError(
                f"{path}: line {i} has {len(row)} fields, the header has {len(names)}",
                "quote fields that hold commas",
            )
    return {n: _numbers([r[j] for r in rows]) for j, n in enumerate(names)}


def _numbers(values: Sequence[str]) -> list[Any]:
    """A column as ints, else floats, else the texts."""
    for kind in (int, float):
        try:
            return [kind(v) for v in values]
        except ValueError:
            continue
    return list(values)


def features(columns: Mapping[str, Array], label: str, argument: str) -> dict[str, Array]:
    """Numeric columns stacked into one float argument [rows, columns], for tabular models."""
    rest = [v for k, v in columns.items() if k != label]
    stacked = np.stack([np.asarray(v, np.float32) for v in rest], 1)
    return {argument: stacked, **({label: columns[label]} if label else {})}
