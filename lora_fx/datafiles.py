"""Readers of data files: each returns columns by name, of arrays or lists, one row an example."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.errors import LoraFxError, one_line


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
    for i, line in enumerate((x for x in _text(path).split("\n") if x.strip()), 1):
        try:
            row = json.loads(line)
        except ValueError as e:
            raise LoraFxError(f"{path}: row {i} is no JSON: {e}", "one object a line") from e
        if not isinstance(row, dict):
            raise LoraFxError(f"{path}: row {i} is no object", 'such as {"text": "…", "labels": 1}')
        if columns and set(row) != set(columns):
            raise LoraFxError(
                f"{path}: row {i} has the keys {sorted(row)}; the first has {sorted(columns)}",
                "every row needs the same keys",
            )
        for k, v in row.items():
            columns.setdefault(k, []).append(v)
    return columns


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LoraFxError(f"{path}: not UTF-8: {e}", "iconv -t UTF-8 converts it") from e


def _csv(path: str) -> dict[str, list[Any]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        names = next(reader, [])
        rows = list(reader)
    except csv.Error as e:
        raise LoraFxError(f"{path}: line {reader.line_num}: {e}", "is it a .csv?") from e
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise LoraFxError(f"{path}: two columns are named {twice[0]!r}", "rename one")
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


READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    ".npz": read_npz,
    ".jsonl": _jsonl,
    ".csv": _csv,
}
