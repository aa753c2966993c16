"""Candidates for a model's graph, run in ONNX Runtime and compared with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.compare import ORT_TOL, Parity, compare
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError, one_line
from lora_fx.files.read import scratch_folder
from lora_fx.onnx.graph.flow import dtype_name
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session

Feeds = Sequence[Mapping[str, Array]]
"""{input: array}, of every size that is compared."""


class WorstError:
    """Candidate → the largest difference of its outputs to a model's; infinite if it fails.

    Attributes:
        base: The model's session.
        failure: Why the last candidate did not load or run; empty where it did.
    """

    def __init__(self, model: ir.Model, feeds: Feeds, provider: str) -> None:
        self._feeds, self._provider, self.failure = feeds, provider, ""
        self.base = _open(model, provider)
        self._wanted = [self.base.run(f) for f in feeds]

    def __call__(self, candidate: ir.Model) -> float:
        """The largest max|a − b| / max|b|."""
        self.failure = ""
        try:
            return max(p.rel for p in self.compared(_open(candidate, self._provider)))
        except Exception as e:  # the runtime's exceptions have no common base
            self.failure = f" ({one_line(e, 160)})"
            return math.inf

    def compared(self, session: RuntimeSession) -> list[Parity]:
        """A session's outputs beside the model's, at every size."""
        both = zip(self._feeds, self._wanted, strict=True)
        return [
            compare(session.run(f), want, {k: v.shape for k, v in f.items()}, ORT_TOL)
            for f, want in both
        ]


def peaks(model: ir.Model, feeds: Feeds, provider: str) -> dict[str, float]:
    """Value of the graph → the largest magnitude that it takes, before any rewrite."""
    copy = model.clone()
    shown = [v for n in copy.graph for v in n.outputs if v.name and not v.is_graph_output()]
    copy.graph.outputs.extend(v for v in shown if dtype_name(v) == "float32")
    found: dict[str, float] = {}
    session = _open(copy, provider)
    for feed in feeds:
        for name, value in {**feed, **session.run(feed)}.items():
            if value.dtype == np.float32 and value.size:
                found[name] = max(found.get(name, 0.0), float(np.abs(value).max()))
    return found


def _open(model: ir.Model, provider: str) -> RuntimeSession:
    with scratch_folder() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        try:
            return open_session(path, provider, threads=1)
        except LoraFxError as e:
            message = e.message.partition("cannot load it: ")[2] or e.message
            raise MistakeError(f"ONNX Runtime cannot load it: {message}") from e
