"""Ids out of range in mode batch: an error, or NaN in the rows that asked, and never a number.

What an index out of range does differs from one runtime to the next, and the one that is at hand
says nothing of the others. So two things are run. The whole file: it may fail; where it does not,
rows that asked are NaN in every output of floats and the base's in every other, and their
neighbours are what they were. And the nodes alone that make NaN of rows, on whatever numbers,
where no Gather can fail before them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.compare import compare, gates_of
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import MistakeError
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.graph.values import dtype_name, is_tensor
from lora_fx.onnx.row_guards import brings_input, guards_alone, is_guarded, outputs_without_nan
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

EXTREMES = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)
ROWS = 5
"""Of a batch that is made here."""


def prove_ids(
    session: RuntimeSession, model: ir.Model, feeds: Mapping[str, Array], rows: int, count: int
) -> None:
    """Run rows that ask for an adapter that is none.

    Args:
        session: The file that is to be written.
        model: What is in it.
        feeds: Inputs of any size, but for the ids.
        rows: Of the batch that they are.
        count: How many adapters there are, the base among them.

    Raises:
        MistakeError: Such a row has numbers, or another row has not its own.
    """
    outputs = {str(y.name): y for y in model.graph.outputs if not y.is_graph_input()}
    whole = outputs_without_nan(model)
    for name, y in outputs.items():
        if name not in whole and not is_guarded(y):
            raise MistakeError(f"no row of {name!r} becomes NaN where its {IDS} is out of range")
    for ids, outside in _wrong(rows, count):
        try:
            found = session.outputs({**feeds, IDS: ids})
        except Exception:  # the runtime's errors have no common base; any of them is loud
            continue
        expected = session.run({**feeds, IDS: np.where(outside, 0, ids)})
        for name, y in ((n, y) for n, y in outputs.items() if is_tensor(y)):
            # the part of a cache that the caller brings goes out as it came
            brought = np.equal(found[name], expected[name]) if brings_input(y) else False
            _check(name, found[name], expected[name], outside & (name not in whole), brought)
    if len(whole) < len(outputs):
        _prove_guards(guards_alone(model), count)


def _wrong(rows: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Ids of which every second one is out of range, and which ones these are."""
    for wrong in ((-1, count), EXTREMES):
        ids = np.arange(rows, dtype=np.int64) % count
        ids[::2] = np.resize(wrong, ids[::2].shape)
        yield ids, (ids < 0) | (ids >= count)


def _prove_guards(guards: ir.Model, count: int) -> None:
    """Run the nodes that make NaN of rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guards.onnx"
        save(guards, path)
        session = open_session(path, "cpu")
    rng = np.random.default_rng(0)
    values = {}
    for x in guards.graph.inputs:
        sizes = (ROWS, *(n if isinstance(n, int) else 2 for n in tuple(x.shape or (0, 2))[1:]))
        values[str(x.name)] = rng.standard_normal(sizes).astype(numpy_dtype(dtype_name(x)))
    for ids, outside in _wrong(ROWS, count):
        found = session.outputs({**values, IDS: ids})
        for y in guards.graph.outputs:
            guard = y.producer()
            assert guard is not None and guard.inputs[2] is not None
            expected = values[str(guard.inputs[2].name)]
            _check(str(y.name), found[str(y.name)], expected, outside, False)


def _check(name: str, found: Array, expected: Array, outside: Array, brought: Array | bool) -> None:
    """Raise for a row out of range that is not NaN, and for another that changed."""
    nan = np.isnan(found) if outside.any() else np.zeros(found.shape, bool)
    if outside.any() and not ((nan | brought)[outside].all() and nan[outside].any()):
        raise MistakeError(f"rows whose {IDS} are out of range have numbers in {name!r}")
    if not _alike(found[~outside], expected[~outside]):
        raise MistakeError(f"{IDS} out of range change the numbers of other rows in {name!r}")


def _alike(found: Array, expected: Array) -> bool:
    """Equal, or apart by what another run of a GPU may round."""
    if np.array_equal(found, expected, equal_nan=found.dtype.kind == "f"):
        return True
    gates = {name: gate.first for name, gate in gates_of({"": expected}).items()}
    return compare({"": found}, {"": expected}, {}, gates).ok
