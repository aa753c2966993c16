"""The runs of a probe in ONNX Runtime: the file itself, with its base and each of its adapters.

Nothing is needed but the file, and in modes switch and load the adapters' files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import onnx

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.batch_inputs import SCALES
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.train_session import TrainSession
from lora_fx.probe.probe import AGAIN, BASE, PROPERTY, Probe, probe_in
from lora_fx.probe.verdict import RIGHT, UNCHECKED_IDS

QUANTISES = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"}
"""Operators of activations in codes."""
LOSS = "loss"
"""The output of a training step that its probe has."""
RATE = 1e-3
"""The learning rate of the step of a probe, which its loss does not depend on."""


@dataclass(frozen=True)
class ProbeRuns:
    """What a file gave for its probe.

    Attributes:
        answers: The outputs at the points by the adapter's name; those of the base by BASE.
        absent: Why an adapter was not run, by its name: its file is not there.
        refused: Why the file of an adapter was refused, by its name.
        ids: The verdict on ids out of range; empty but in mode batch.
        provider: Where it ran.
        note: A line of the session for the user, or empty.
    """

    answers: Mapping[str, Array]
    absent: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    ids: str = ""
    provider: str = "cpu"
    note: str = ""


def add_probe(path: Path, probe: Probe) -> None:
    """Add a probe to the metadata of an .onnx file, whose other bytes stay.

    A message of protobuf is continued by what is appended to it.
    """
    entry = onnx.StringStringEntryProto(key=PROPERTY, value=probe.to_text())
    with path.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def size_and_precision(path: Path) -> tuple[int, str]:
    """Return the bytes of an .onnx file and its data files, and what it computes in."""
    model = onnx.load(path, load_external_data=False)
    return _bytes_of(path, model), _precision_of(model)


def _precision_of(model: onnx.ModelProto) -> str:
    """Return what a graph computes in: int8, bfloat16 or float16 where it has any, or float32."""
    if any(node.op_type in QUANTISES for node in model.graph.node):
        return "int8"
    dtypes = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    if onnx.TensorProto.BFLOAT16 in dtypes:
        return "bfloat16"
    return "float16" if onnx.TensorProto.FLOAT16 in dtypes else "float32"


def _bytes_of(path: Path, model: onnx.ModelProto) -> int:
    """Return the size of an .onnx file and of its data files."""
    places = {path.name}
    for tensor in model.graph.initializer:
        places |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    files = [path.with_name(place) for place in places]
    return sum(file.stat().st_size for file in files if file.exists())


def probe_of(path: str | PathLike[str]) -> Probe:
    """Return the probe of an .onnx file, read without its data file.

    Raises:
        LoraFxError: The file cannot be read, has no probe, or a damaged one.
    """
    where = fspath(path)
    try:
        model = onnx.load(where, load_external_data=False)
    except Exception as e:  # protobuf's and the system's errors have no common base
        raise LoraFxError(
            f"{where}: cannot be read as an ONNX file", "pass a file that lora-fx export wrote"
        ) from e
    return probe_in({entry.key: entry.value for entry in model.metadata_props}, where)


def run_probe(
    path: str | PathLike[str],
    probe: Probe,
    provider: str = "auto",
    threads: int = 0,
    *,
    beside: Path | None = None,
) -> ProbeRuns:
    """Run a file on its probe: for the base, and for each adapter.

    Args:
        path: The .onnx file.
        probe: Its probe.
        provider: auto, cpu, cuda or webgpu.
        threads: The number of threads; 0 leaves it to the runtime.
        beside: The file beside which the adapters' files lie, if it is another one.

    Raises:
        LoraFxError: The file does not load, or does not take the probe.
    """
    if probe.mode in ("switch", "load"):
        return _switchable(Path(path), probe, beside or Path(path), provider, threads)
    if probe.mode == "train":
        return _step(path, probe, provider, threads)
    session = open_session(path, provider, threads)
    if probe.mode == "batch":
        return _batch(path, probe, session)
    outputs = session.run(probe.feeds())
    name = next(iter(probe.adapters), BASE)
    answers = {name: probe.at_points(outputs, fspath(path))}
    return ProbeRuns(answers, provider=session.provider, note=session.note)


def _switchable(path: Path, probe: Probe, beside: Path, provider: str, threads: int) -> ProbeRuns:
    """Run a file of mode switch or load with each adapter whose file lies beside it."""
    feeds = probe.feeds()
    session = Session(path, provider, threads)
    outputs = session.run(feeds)
    answers = {BASE: probe.at_points(outputs, str(path))}
    absent: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, adapter in probe.adapters.items():
        if adapter.file is None:
            absent[name] = "the probe names no file of it"
            continue
        file = beside.with_name(adapter.file)
        if not file.exists():
            absent[name] = f"{file} does not exist"
            continue
        try:
            if probe.mode == "load":
                run = Session(path, provider, threads, adapter=file).run
            else:
                session.load(name, file)
                run = partial(session.run, adapter=name)
        except LoraFxError as e:
            refused[name] = e.message
            continue
        with_adapter = run(feeds)
        answers[name] = probe.at_points(with_adapter, str(path))
    return ProbeRuns(answers, absent, refused, provider=session.provider, note=session.note)


def _batch(path: str | PathLike[str], probe: Probe, session: RuntimeSession) -> ProbeRuns:
    """Run a file of mode batch with each id in all rows, and with an id that is none."""
    feeds = probe.feeds()
    ids_of = session.row_choice
    rows = _row_count(path, feeds, session)
    if any(node.name == SCALES for node in session.inputs):
        feeds[SCALES] = np.ones(rows, np.float32)
    numbers = {BASE: 0}
    for name, adapter in probe.adapters.items():
        if adapter.number is None or ids_of is None or adapter.number > len(ids_of.adapters):
            raise LoraFxError(
                f"{fspath(path)}: its probe has adapter {name!r} with the id {adapter.number}, "
                "which the file has not",
                AGAIN,
            )
        numbers[name] = adapter.number

    answers = {}
    for name, number in numbers.items():
        outputs = session.run({**feeds, IDS: np.full(rows, number, np.int64)})
        answers[name] = probe.at_points(outputs, fspath(path))
    ids = RIGHT
    no_adapter = np.full(rows, max(numbers.values()) + 1, np.int64)
    try:
        # without our own check of ids, which would refuse them
        of_no_adapter: Named | None = session.outputs({**feeds, IDS: no_adapter})
    except MemoryError:
        raise
    except Exception:  # the runtime's errors have no common base: the id is refused, as it should
        of_no_adapter = None
    if of_no_adapter is not None:
        wrong = probe.at_points(of_no_adapter, fspath(path))
        ids = RIGHT if np.isnan(wrong).all() else UNCHECKED_IDS
    return ProbeRuns(answers, ids=ids, provider=session.provider, note=session.note)


def _row_count(path: str | PathLike[str], feeds: Named, session: RuntimeSession) -> int:
    """Return the number of rows of a batch."""
    choice = session.row_choice
    names = [] if choice is None else [name for name in choice.rowed if name in feeds]
    for name in names:
        if feeds[name].ndim:
            return int(feeds[name].shape[0])
    raise LoraFxError(f"{fspath(path)}: its probe has no input with rows", AGAIN)


def _step(path: str | PathLike[str], probe: Probe, provider: str, threads: int) -> ProbeRuns:
    """Take one training step; its loss is the answer."""
    session = TrainSession(path, RATE, provider, threads)
    loss = session.step(probe.feeds())
    answers = {BASE: probe.at_points({LOSS: np.array(loss)}, fspath(path))}
    return ProbeRuns(answers, provider=session.provider, note=session.note)
