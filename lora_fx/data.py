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
from lora_fx.text import counted

Tokenizer = Callable[[list[str]], Mapping[str, Array]]
LABELS = ("labels", "label", "y", "target")
"""The usual names of the column that holds the labels."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `label` names the one to predict, or is empty.

    `words` are the labels' names by number, where the data had words. `place_of_nan` says where
    the data have NaN, of which the error of a loss that is NaN tells; empty where they have none.
    """

    columns: Mapping[str, Array]
    label: str = ""
    words: tuple[str, ...] = ()
    place_of_nan: str = ""

    def __len__(self) -> int:
        """Number of examples."""
        if not self.columns:
            return 0
        return len(next(iter(self.columns.values())))

    def rows(self, index: npt.ArrayLike) -> Table:
        """Return the examples of an index, in its order."""
        columns = {name: array[np.asarray(index)] for name, array in self.columns.items()}
        return replace(self, columns=columns)

    def _mask(self) -> Array | None:
        """Return the mask [rows, tokens] that says which tokens are no padding."""
        mask = self.columns.get("attention_mask")
        if mask is None or mask.ndim != 2 or mask.dtype.kind not in "iub":
            return None
        return mask

    def by_length(self) -> Table:
        """Return the examples in the order of their lengths, so that batches have less padding."""
        mask = self._mask()
        if mask is None:
            return self
        return self.rows(np.argsort((mask != 0).sum(1), kind="stable"))

    def trimmed(self) -> Table:
        """Return the examples without padding columns that none needs (right padding only)."""
        mask = self._mask()
        if mask is None:
            return self
        width = int(np.flatnonzero(mask.any(0)).max(initial=0)) + 1
        columns = dict(self.columns)
        for name, array in self.columns.items():
            if array.shape == mask.shape and array.dtype.kind in "iub":
                columns[name] = array[:, :width]
        return replace(self, columns=columns)

    def count(self, size: int) -> int:
        """Return the number of batches in a pass over the examples."""
        return -(-len(self) // size)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """Yield trimmed batches in order, or shuffled by a seed; the last one may be smaller."""
        order = _order(len(self), seed)
        for start in range(0, len(order), size):
            yield self.rows(order[start : start + size]).trimmed()


@dataclass(frozen=True)
class Buckets:
    """Given batches, such as texts of similar length together; only their order is shuffled."""

    tables: Sequence[Table]

    @property
    def columns(self) -> Mapping[str, Array]:
        """The columns of the first batch."""
        return self.tables[0].columns

    @property
    def label(self) -> str:
        """The column to predict."""
        return self.tables[0].label

    @property
    def place_of_nan(self) -> str:
        """Where the data have NaN; see Table."""
        return self.tables[0].place_of_nan

    def __len__(self) -> int:
        """Number of examples."""
        return sum(len(table) for table in self.tables)

    def count(self, size: int) -> int:
        """Return the number of batches in a pass over the examples, for any `size`."""
        return len(self.tables)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Table]:
        """Yield the batches as they were made, for any `size`."""
        for number in _order(len(self.tables), seed):
            yield self.tables[int(number)]


def _order(count: int, seed: int | None) -> Array:
    """Return the numbers below `count` in order, or shuffled by a seed."""
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
    """Return the table of a file or a loader function, for a model with these inputs.

    Columns of numbers become the one input of a model that names none of them.

    Args:
        path: As in read_table, or `module:FUNCTION`.
        inputs: Names of the model's inputs.
        call: Calls the function that such a text names.
        label: The column to predict, as in read_table.
        tokenizer: Texts → columns, as in read_table.
    """
    if path.startswith("hf:"):
        hint = (
            "run hf download ORG/NAME --repo-type dataset --local-dir DIR, then pass a file in DIR"
        )
        raise LoraFxError(f"{path}: lora-fx does not read data from the Hub", hint)
    if ":" in path and not Path(path).exists():
        table = table_of(call(path), path, label=label, tokenizer=tokenizer)
    else:
        table = read_table(path, label=label, tokenizer=tokenizer)
    names = [name for name in table.columns if name != table.label]
    if not names:
        raise LoraFxError(
            f"{path}: there is no column besides {table.label!r}",
            f"add columns for the inputs of the model: {', '.join(inputs)}",
        )
    is_tabular = len(inputs) == 1 and not set(names) & set(inputs)
    if is_tabular and all(table.columns[name].ndim == 1 for name in names):
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
            f"{path}: unknown data format {suffix!r}",
            near_path(path, "use .npz, .jsonl, .csv or module:loader"),
        )
    expect_file(path, "pass a path to the data")
    return table_of(READERS[suffix](path), path, label=label, tokenizer=tokenizer)


def table_of(raw: Any, where: str, *, label: str = "", tokenizer: Tokenizer | None = None) -> Table:
    """Return columns as arrays: texts tokenised, word labels numbered in sorted order.

    Args:
        raw: Columns by name, or batches of them.
        where: The name of the data in errors.
        label: The column to predict, as in read_table.
        tokenizer: Texts → columns, as in read_table.

    Raises:
        LoraFxError: Names the column, and the row where there is one.
    """
    if not isinstance(raw, Mapping):
        raw = _joined(raw, where)
    for name, values in raw.items():
        if not hasattr(values, "__len__") or getattr(values, "shape", None) == ():
            raise LoraFxError(
                f"{where}: column {name!r} has no rows", "pass one row for each example"
            )
    if not raw or not len(next(iter(raw.values()))):
        raise LoraFxError(f"{where}: the data has no rows", "pass at least one row")
    if label:
        expect_name(label, raw, f"{where}: there is no column", f"the columns are {', '.join(raw)}")
    else:
        label = next((name for name in LABELS if name in raw), "")
    lengths = {name: len(values) for name, values in raw.items()}
    if len(set(lengths.values())) > 1:
        raise LoraFxError(
            f"{where}: the columns have different lengths: {lengths}",
            "pass one row for each example",
        )

    columns: dict[str, Array] = {}
    names_of_texts: list[str] = []
    words: tuple[str, ...] = ()
    for name, values in raw.items():
        if not _are_texts(values, where, name):
            columns[name] = _array(values, where, name)
        elif name == label:
            unique_words, columns[name] = np.unique(np.asarray(values, str), return_inverse=True)
            words = tuple(str(word) for word in unique_words)
        else:
            names_of_texts.append(name)
    if names_of_texts:
        texts = {name: raw[name] for name in names_of_texts}
        columns.update(_tokenised(texts, where, tokenizer))
    return Table(columns, label, words, _place_of_nan(columns, where))


def _place_of_nan(columns: Mapping[str, Array], where: str) -> str:
    """Return the first column with NaN, and its first row that has one; empty without NaN."""
    for name, array in columns.items():
        if array.dtype.kind != "f":
            continue
        rows = np.flatnonzero(np.isnan(array).reshape(len(array), -1).any(axis=1))
        if rows.size:
            count = counted(rows.size, "row")
            return f"{where}: column {name!r} has NaN in {count}, first in row {rows[0] + 1}"
    return ""


def _joined(raw: Any, where: str) -> dict[str, list[object]]:
    """Join batches (dictionaries with the same keys) into one dictionary of columns."""
    try:
        batches = list(raw)
    except TypeError:
        batches = [raw]
    for number, batch in enumerate(batches, 1):
        if not isinstance(batch, Mapping) or set(batch) != set(batches[0]):
            raise LoraFxError(
                f"{where}: item {number} is not a dictionary with the keys of the first item",
                "return a dictionary of columns from the loader, or batches of such dictionaries",
            )
    columns: dict[str, list[object]] = {}
    for batch in batches:
        for name in batches[0]:
            columns.setdefault(name, []).extend(batch[name])
    return columns


def _are_texts(values: Any, where: str, name: str) -> bool:
    """Whether a column holds texts.

    Raises:
        LoraFxError: It has texts and something else.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind != "U":
        return False
    is_text = [isinstance(value, str) for value in values]
    if any(is_text) and not all(is_text):
        row = is_text.index(not is_text[0])
        raise LoraFxError(
            f"{where}: column {name!r} is {_kind(values[0])} in row 1 "
            f"and {_kind(values[row])} in row {row + 1}",
            "make the column all text or all numbers",
        )
    return all(is_text)


def _kind(value: object) -> str:
    """Return the kind of a value, for people."""
    if isinstance(value, str):
        return "text"
    if value is None:
        return "empty"
    return "a number"


def _tokenised(
    texts: Mapping[str, Sequence[str]], where: str, tokenizer: Tokenizer | None
) -> Mapping[str, Array]:
    """Tokenise columns of texts; the texts of a row are joined by spaces."""
    first_name, first_texts = next(iter(texts.items()))
    if tokenizer is None:
        row = _first_row_of_text(first_texts)
        if not str(first_texts[row]).strip():
            raise LoraFxError(
                f"{where}: column {first_name!r} is empty in row {row + 1}",
                "fill it, or remove the row",
            )
        raise LoraFxError(
            f"{where}: column {first_name!r} is text (row {row + 1}: "
            f"{one_line(repr(str(first_texts[row])), 40)}) and the model has no tokenizer",
            "use a Hugging Face folder with a tokenizer, or numeric columns",
        )
    rows = range(len(first_texts))
    return tokenizer([" ".join(column[row] for column in texts.values()) for row in rows])


def _first_row_of_text(texts: Sequence[str]) -> int:
    """Return the first row whose text is not a number."""
    for row, text in enumerate(texts):
        if isinstance(numbers_of([text])[0], str):
            return row
    return 0


def _array(values: npt.ArrayLike, where: str, name: str) -> Array:
    """Return a column of numbers as an array; 64-bit floats become 32-bit floats."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise LoraFxError(
            f"{where}: column {name!r} has rows of different lengths", "pad them to one length"
        ) from error
    if array.dtype.kind not in "iufb":
        raise LoraFxError(f"{where}: column {name!r} is neither numbers nor text", "remove it")
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def features(columns: Mapping[str, Array], label: str, argument: str) -> dict[str, Array]:
    """Stack numeric columns into one float argument [rows, columns], for tabular models."""
    inputs = [np.asarray(array, np.float32) for name, array in columns.items() if name != label]
    stacked = {argument: np.stack(inputs, 1)}
    if label:
        stacked[label] = columns[label]
    return stacked
