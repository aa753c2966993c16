"""The error of candidates for a model's graph, measured against the model in ONNX Runtime."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.compare import ORT_TOL, Parity, compare, sizes_text
from lora_fx.dtypes import Array, widened
from lora_fx.errors import LoraFxError, MistakeError, one_line
from lora_fx.files.isolated import PYTHON, environment
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.text import counted

Feeds = Sequence[Mapping[str, Array]]
"""The input arrays by name, for every size that is compared."""


class WorstError:
    """A function of a candidate that returns its largest output difference; infinite on failure.

    Attributes:
        base: The model's session.
        failure: Why the last candidate did not load or run; empty where it did.
    """

    def __init__(self, model: ir.Model, feeds: Feeds, provider: str) -> None:
        self.failure = ""
        self.base = open_model(model, provider)
        self._provider = provider
        self._feeds = feeds
        self._expected = [self.base.run(feed) for feed in feeds]

    def __call__(self, candidate: ir.Model) -> float:
        """Return the largest max|a − b| / max|b|."""
        self.failure = ""
        try:
            session = open_model(candidate, self._provider)
            return max(parity.rel for parity in self.compared(session))
        except Exception as e:  # the runtime's exceptions have no common base
            self.failure = f" ({one_line(e, 160)})"
            return math.inf

    def place(self, candidate: ir.Model, gate: float, drawn: int) -> str:
        """Return where a candidate differs most, and how much of that output is over a gate.

        Args:
            candidate: One whose difference is finite and over the gate.
            gate: The largest allowed max|a - b| / max|b|.
            drawn: How many of the inputs, the first ones, are random.
        """
        session = open_model(candidate, self._provider)
        parities = self.compared(session)
        number = max(range(len(parities)), key=lambda i: parities[i].rel)
        worst = parities[number]
        ours = session.run(self._feeds[number])[worst.output]
        gaps = np.abs(widened(ours) - widened(self._expected[number][worst.output]))
        over = int(np.count_nonzero(gaps > gate * worst.max_abs / worst.rel))
        inputs = "random inputs (floats are N(0, 1))" if number < drawn else "your inputs"
        return (
            f"on {inputs} at {sizes_text(worst.sizes)}, where {over} of "
            f"{counted(gaps.size, 'number')} of {worst.output} are over the gate"
        )

    def compared(self, session: RuntimeSession) -> list[Parity]:
        """Compare a session's outputs with the model's at every size."""
        parities: list[Parity] = []
        for feed, expected in zip(self._feeds, self._expected, strict=True):
            sizes = {name: array.shape for name, array in feed.items()}
            parities.append(compare(session.run(feed), expected, sizes, ORT_TOL))
        return parities


def peaks(model: ir.Model, feeds: Feeds, provider: str) -> dict[str, float]:
    """Return value name → its largest magnitude in the graph, before any rewrite."""
    observed = model.clone()
    for node in observed.graph:
        for value in node.outputs:
            if value.name and not value.is_graph_output() and dtype_name(value) == "float32":
                observed.graph.outputs.append(value)

    magnitudes: dict[str, float] = {}
    session = open_model(observed, provider)
    for feed in feeds:
        for name, array in {**feed, **session.run(feed)}.items():
            if array.dtype == np.float32 and array.size:
                magnitude = float(np.abs(array).max())
                magnitudes[name] = max(magnitudes.get(name, 0.0), magnitude)
    return magnitudes


LOAD = (
    "import sys, onnxruntime; "
    "onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
)


def ends_the_process(model: ir.Model) -> bool:
    """Whether ONNX Runtime ends the process that loads a model, tried in another one.

    So it does with some products of float16 constants, which it folds at load (1.31.1 and 1.32.0).
    """
    with scratch_folder() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        done = subprocess.run(
            [*PYTHON, "-c", LOAD, str(path)], env=environment(), capture_output=True, check=False
        )
    return done.returncode < 0


def open_model(model: ir.Model, provider: str) -> RuntimeSession:
    """Load a model from a temporary folder.

    Raises:
        MistakeError: The runtime cannot load it.
    """
    with scratch_folder() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        try:
            return open_session(path, provider, threads=1)
        except LoraFxError as e:
            message = e.message.partition("cannot load it: ")[2] or e.message
            raise MistakeError(f"ONNX Runtime cannot load it: {message}") from e
