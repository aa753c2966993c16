"""Check ids out of range in mode batch: an error, or NaN in these rows, never a number.

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
"""Rows of the batch that the guards alone run on."""


def prove_ids(
    session: RuntimeSession, model: ir.Model, feeds: Mapping[str, Array], rows: int, count: int
) -> None:
    """Run rows with ids that name no adapter.

    Args:
        session: The file that is to be written.
        model: What is in it.
        feeds: Inputs of any size, but for the ids.
        rows: Of the batch that they are.
        count: How many adapters there are, the base among them.

    Raises:
        MistakeError: Such a row has numbers, or another row has not its own.
    """
    outputs = {
        str(output.name): output for output in model.graph.outputs if not output.is_graph_input()
    }
    without_nan = outputs_without_nan(model)
    for name, output in outputs.items():
        if name not in without_nan and not is_guarded(output):
            raise MistakeError(f"no row of {name!r} becomes NaN where its {IDS} is out of range")

    tensors = {name: output for name, output in outputs.items() if is_tensor(output)}
    for ids, outside in _wrong_ids(rows, count):
        try:
            ours = session.outputs({**feeds, IDS: ids})
        except Exception:  # the runtime's errors have no common base; any of them is loud
            continue
        expected = session.run({**feeds, IDS: np.where(outside, 0, ids)})
        for name, output in tensors.items():
            brought: Array | bool = False
            if brings_input(output):
                # the part of a cache that the caller brings goes out as it came
                brought = np.equal(ours[name], expected[name])
            nan_rows = np.zeros_like(outside) if name in without_nan else outside
            _check(name, ours[name], expected[name], nan_rows, brought)
    if len(without_nan) < len(outputs):
        _prove_guards(guards_alone(model), count)


def _wrong_ids(rows: int, count: int) -> Iterator[tuple[Array, Array]]:
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
    values: dict[str, Array] = {}
    for value in guards.graph.inputs:
        shape = tuple(value.shape or (0, 2))
        sizes = [n if isinstance(n, int) else 2 for n in shape[1:]]
        drawn = rng.standard_normal((ROWS, *sizes))
        values[str(value.name)] = drawn.astype(numpy_dtype(dtype_name(value)))

    for ids, outside in _wrong_ids(ROWS, count):
        ours = session.outputs({**values, IDS: ids})
        for output in guards.graph.outputs:
            guard = output.producer()
            assert guard is not None and guard.inputs[2] is not None
            expected = values[str(guard.inputs[2].name)]
            _check(str(output.name), ours[str(output.name)], expected, outside, False)


def _check(name: str, ours: Array, expected: Array, outside: Array, brought: Array | bool) -> None:
    """Raise for a row out of range that is not NaN, and for another that changed.

    Args:
        name: The name of the output.
        ours: Its numbers.
        expected: Those of a run whose ids are all in range.
        outside: The rows that have to be NaN.
        brought: Numbers that may be as they are: the caller brought them.
    """
    if outside.any():
        nan = np.isnan(ours)
        all_nan_or_brought = (nan | brought)[outside].all()
        if not (all_nan_or_brought and nan[outside].any()):
            raise MistakeError(f"rows whose {IDS} are out of range have numbers in {name!r}")
    if not _are_alike(ours[~outside], expected[~outside]):
        raise MistakeError(f"{IDS} out of range change the numbers of other rows in {name!r}")


def _are_alike(ours: Array, expected: Array) -> bool:
    """Whether two arrays are equal, up to the rounding of another run on a GPU."""
    if np.array_equal(ours, expected, equal_nan=ours.dtype.kind == "f"):
        return True
    gates = {name: gate.first for name, gate in gates_of({"": expected}).items()}
    return compare({"": ours}, {"": expected}, {}, gates).ok
