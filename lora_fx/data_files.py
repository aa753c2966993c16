"""Readers of data files: each returns columns by name, of arrays or lists, one row an example."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import open_input, read_text
from lora_fx.files.strict_json import json_object
from lora_fx.text import Json, StrPath

Reader = Callable[[str], Mapping[str, object]]


MAX_GROWTH = 100
"""Times its size, or a MiB's, that an .npz may unpack to."""
MIB = 1 << 20


def check_unpacked(path: StrPath, hint: str) -> None:
    """Raise for an archive that unpacks to far more than its size, before anything is unpacked.

    Raises:
        LoraFxError: More than MAX_GROWTH times its size, or a MiB's.
        zipfile.BadZipFile: It is no archive.
    """
    with open_input(path) as file, zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        size = os.fstat(file.fileno()).st_size
    if unpacked > MAX_GROWTH * max(MIB, size):
        raise LoraFxError(
            f"{os.fspath(path)}: {unpacked} bytes when unpacked, over {MAX_GROWTH} times its size",
            hint,
        )


def read_npz(path: str) -> dict[str, Array]:
    """Arrays of an .npz by name; never unpickles."""
    try:
        check_unpacked(path, "write it without compression, with numpy.savez")
        with open_input(path) as file, np.load(file, allow_pickle=False) as data:
            arrays = dict(data)
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"its member {name} is not an array")
        return arrays
    except LoraFxError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever their parts do
        raise LoraFxError(
            f"{path}: not a readable .npz: {one_line(error)}", "write it with numpy.savez"
        ) from error


def json_rows(path: str) -> Iterator[tuple[str, Json]]:
    """("FILE: line N", object) of every line of a .jsonl file that is not blank.

    Raises:
        LoraFxError: A line that is not UTF-8, no JSON or no object.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield (
                where,
                json_object(line, where, constants=True, hint="write one JSON object on each line"),
            )


def _jsonl(path: str) -> dict[str, list[object]]:
    """Columns of a .jsonl file, whose rows have the same keys."""
    columns: dict[str, list[object]] = {}
    for where, row in json_rows(path):
        if columns and set(row) != set(columns):
            raise LoraFxError(
                f"{where} has the keys {sorted(row)}; the first has {sorted(columns)}",
                "give every row the same keys",
            )
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return columns


def _csv(path: str) -> dict[str, list[object]]:
    """Columns of a .csv file, whose first line names them."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        names = next(reader, [])
        rows = list(reader)
    except csv.Error as error:
        raise LoraFxError(f"{path}: line {reader.line_num}: {error}", "is it a .csv?") from error
    for name, count in Counter(names).items():
        if count > 1:
            raise LoraFxError(f"{path}: two columns are named {name!r}", "rename one")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise LoraFxError(
                f"{path}: line {number} has {len(row)} fields, the header has {len(names)}",
                "quote fields that hold commas",
            )
    return {name: numbers_of([row[place] for row in rows]) for place, name in enumerate(names)}


def numbers_of(values: Sequence[str]) -> list[object]:
    """A column as ints, else floats, else the texts."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return [kind(value) for value in values]
    return list(values)


READERS: dict[str, Reader] = {".npz": read_npz, ".jsonl": _jsonl, ".csv": _csv}
