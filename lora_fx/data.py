"""Data for `lora-fx train`: npz, JSONL, CSV or a loader function, as named columns.

A column is an array with one row an example, or a list of texts that the model's tokenizer turns
into input_ids and attention_mask. Keys are the names of the model's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.data_files import READERS, numbers_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect_file, expect_name, near_path, one_line

Tokenizer = Callable[[list[str]], Mapping[str, Array]]


LABELS = ("labels", "label", "y", "target")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `label` names the one to predict, or is empty.

    `words` are the labels' names by number, where the data had words.
    """

    columns: Mapping[str, Array]
    label: str = ""
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def rows(self, index: npt.ArrayLike) -> Table:
        """The examples of an index, in its order."""
        return replace(self, columns={k: v[np.asarray(index)] for k, v in self.columns.items()})

    def trimmed(self) -> Table:
        """Without the columns of padding that no example needs (right padding only)."""
        mask = self.columns.get("attention_mask")
        if mask is None or mask.ndim != 2 or mask.dtype.kind not in "iub":
            return self
        width = int(np.flatnonzero(mask.any(0)).max(initial=0)) + 1
        alike = ((k, v) for k, v in self.columns.items() if v.shape == mask.shape)
        cut = {k: v[:, :width] for k, v in alike if v.dtype.kind in "iub"}
        return replace(self, columns={**self.columns, **cut})

    def count(self, size: int) -> int:
        """Batches in a pass over the examples."""
        return -(-len(self) // size)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """Trimmed batches in order, or shuffled by a seed; the last one may be smaller."""
        order = _order(len(self), seed)
        for start in range(0, len(order), size):
            yield self.rows(order[start : start + size]).trimmed()


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

    def count(self, size: int) -> int:
        """Batches in a pass over the examples, whatever `size` says."""
        return len(self.tables)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """The batches as they were made, whatever `size` says."""
        for i in _order(len(self.tables), seed):
            yield self.tables[int(i)]


def _order(count: int, seed: int | None) -> Array:
    order = np.arange(count)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    return order


def training_table(
    path: str,
    inputs: Sequence[str],
    call: Callable[[str], object],
    *,
    label: str = "",
    tokenizer: Tokenizer | None = None,
) -> Table:
    """The table of a file or of a loader function, for a model with these inputs.

    Columns of numbers become the one input of a model that names none of them.

    Args:
        path: As in read_table, or `module:FUNCTION`.
        inputs: Names of the model's inputs.
        call: What calls the function that such a text names.
        label: As in read_table, like tokenizer.
        tokenizer: Texts → columns.
    """
    if path.startswith("hf:"):
        hint = "hf download ORG/NAME --repo-type dataset --local-dir DIR, then give a file in DIR"
        raise LoraFxError(f"{path}: models come from the Hub, data does not", hint)
    if ":" in path and not Path(path).exists():
        table = table_of(call(path), path, label=label, tokenizer=tokenizer)
    else:
        table = read_table(path, label=label, tokenizer=tokenizer)
    names = [n for n in table.columns if n != table.label]
    if not names:
        raise LoraFxError(
            f"{path}: no column but {table.label!r}", f"the model takes {', '.join(inputs)}"
        )
    tabular = len(inputs) == 1 and not set(names) & set(inputs)
    if tabular and all(table.columns[n].ndim == 1 for n in names):
        return replace(table, columns=features(table.columns, table.label, inputs[0]))
    return table


def read_table(path: str, *, label: str = "", tokenizer: Tokenizer | None = None) -> Table:
    """Read a data file.

    Args:
        path: `.npz`, `.jsonl`, `.csv`.
        label: The column to predict; found by the usual names where it is empty.
        tokenizer: For columns of texts.

    Raises:
        LoraFxError: Names the file, and the row and column where there is one.
    """
    suffix = Path(path).suffix
    if suffix not in READERS:
        raise LoraFxError(
            f"{path}: data of an unknown kind {suffix!r}",
            near_path(path, ".npz, .jsonl, .csv or module:loader"),
        )
    expect_file(path, "give a path to the data")
    return table_of(READERS[suffix](path), path, label=label, tokenizer=tokenizer)


def table_of(raw: Any, where: str, *, label: str = "", tokenizer: Tokenizer | None = None) -> Table:
    """Columns as arrays: texts tokenised, labels of words numbered in sorted order.

    Args:
        raw: Columns by name, or batches of them.
        where: What to call it in an error.
        label: As in read_table.
        tokenizer: As in read_table.
    """
    raw = raw if isinstance(raw, Mapping) else _joined(raw, where)
    for name, values in raw.items():
        if not hasattr(values, "__len__") or getattr(values, "shape", None) == ():
            raise LoraFxError(f"{where}: column {name!r} has no rows", "one row an example")
    if not raw or not len(next(iter(raw.values()))):
        raise LoraFxError(f"{where}: no rows", "there is nothing to train on")
    if label:
        expect_name(label, raw, f"{where}: no column", f"the columns are {', '.join(raw)}")
    label = label or next((n for n in LABELS if n in raw), "")
    lengths = {k: len(v) for k, v in raw.items()}
    if len(set(lengths.values())) > 1:
        raise LoraFxError(f"{where}: columns of different lengths: {lengths}", "one row an example")
    columns: dict[str, Array] = {}
    texts: list[str] = []
    words: tuple[str, ...] = ()
    for name, values in raw.items():
        numeric = isinstance(values, np.ndarray) and values.dtype.kind != "U"
        is_text = [False] if numeric else [isinstance(v, str) for v in values]
        if any(is_text) and not all(is_text):
            row = is_text.index(not is_text[0])
            raise LoraFxError(
                f"{where}: column {name!r} is {_kind(values[0])} in row 1 "
                f"and {_kind(values[row])} in row {row + 1}",
                "a column is all text or all numbers",
            )
        if name == label and all(is_text):
            found, columns[name] = np.unique(np.asarray(values, str), return_inverse=True)
            words = tuple(str(w) for w in found)
        elif all(is_text):
            texts.append(name)
        else:
            columns[name] = _array(values, where, name)
    if texts:
        if tokenizer is None:
            values = raw[texts[0]]
            row = next((i for i, v in enumerate(values) if isinstance(numbers_of([v])[0], str)), 0)
            raise LoraFxError(
                f"{where}: column {texts[0]!r} is text (row {row + 1}: "
                f"{one_line(repr(str(values[row])), 40)}) and the model has no tokenizer",
                "use a Hugging Face folder with a tokenizer, or numeric columns",
            )
        joined = [" ".join(raw[n][i] for n in texts) for i in range(lengths[texts[0]])]
        columns.update(tokenizer(joined))
    return Table(columns, label, words)


def _joined(batches: Any, where: str) -> dict[str, object]:
    """Batches (dictionaries with the same keys) as one dictionary of columns."""
    try:
        parts = list(batches)
    except TypeError:
        parts = [batches]
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or set(part) != set(parts[0]):
            raise LoraFxError(
                f"{where}: item {i + 1} is no dictionary with the keys of the first",
                "a loader returns columns by name, or batches of them",
            )
    return {k: [row for part in parts for row in part[k]] for k in (parts[0] if parts else ())}


def _kind(value: object) -> str:
    return "text" if isinstance(value, str) else "empty" if value is None else "a number"


def _array(values: npt.ArrayLike, where: str, name: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as e:
        raise LoraFxError(
            f"{where}: column {name!r} has rows of different lengths", "pad them to one length"
        ) from e
    if array.dtype.kind not in "iufb":
        raise LoraFxError(f"{where}: column {name!r} is neither numbers nor text", "drop it")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def features(columns: Mapping[str, Array], label: str, argument: str) -> dict[str, Array]:
    """Numeric columns stacked into one float argument [rows, columns], for tabular models."""
    rest = [v for k, v in columns.items() if k != label]
    stacked = np.stack([np.asarray(v, np.float32) for v in rest], 1)
    return {argument: stacked, **({label: columns[label]} if label else {})}
