"""Rewrites as transactions: apply to a clone, run it, keep it only where it is the same model.

The rewrites are passes that onnx_ir's own pass manager runs too.

Every stage is compared with the graph that came in, in ONNX Runtime, at all the sizes given; one
that raises, does not load, changes the inputs or outputs, or differs is rolled back by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_fx.compare import Parity, sizes_text
from lora_fx.dtypes import Array
from lora_fx.errors import one_line
from lora_fx.onnx.bench import time_sessions
from lora_fx.onnx.candidate_error import Feeds, WorstError, _open
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.onnxscript_passes import FoldConstants, FuseForRuntime
from lora_fx.onnx.rewrites.split_skip_norm import SplitSkipNorm
from lora_fx.onnx.save import weight_bytes
from lora_fx.onnx.session import RuntimeSession
from lora_fx.text import Json

Rewrite = Callable[[ir.Model], ir.passes.PassResult]
STAGES: Mapping[str, Rewrite] = {
    "dead nodes": RemoveUnusedNodesPass(),  # the runtime would run them
    "gemm to matmul": GemmToMatMul(),
    "delta before bias": DeltaBeforeBias(),
    "onnxscript optimizer": FoldConstants(),
    "runtime fusions": FuseForRuntime(),
}
CPU_STAGES: Mapping[str, Rewrite] = {"sums and norms apart": SplitSkipNorm()}
"""After the others, where the graph runs on the CPU."""
ROUNDS = 5


@dataclass(frozen=True)
class RewriteStage:
    """What became of one rewrite.

    Attributes:
        name: Its name.
        kept: The graph has it.
        why: Why not, or empty.
        nodes: How many nodes the graph after it has, or what was rolled back.
        bytes: How many bytes its weights have.
        seconds: Median CPU of one run at the first size, one thread; None where it was not run.
        ratio: That over the time of the graph that came in, in the same rounds.
        error: Largest max|a − b| / max|b| to the graph that came in; None where it was not run.
    """

    name: str
    kept: bool
    why: str
    nodes: int
    bytes: int
    seconds: float | None = None
    ratio: float | None = None
    error: float | None = None

    def to_json(self) -> Json:
        """One row of `stages[]`."""
        return dict(vars(self))

    def __str__(self) -> str:
        """One line."""
        text = f"{self.name}: {self.nodes} nodes, {self.bytes} bytes"
        if self.error is not None:
            text += f", rel {self.error:.2e}"
        if self.seconds is not None and self.ratio is not None:
            text += f", {self.seconds * 1e3:.2f} ms ({self.ratio:.2f} of before)"
        return text if self.kept else f"{text}; rolled back: {self.why}"


def apply_stages(
    model: ir.Model,
    feeds: Feeds,
    stages: Mapping[str, Rewrite] | None = None,
    provider: str = "cpu",
) -> tuple[ir.Model, list[RewriteStage]]:
    """The model after the stages that held, and a row for every stage that changed something.

    Args:
        model: Not changed.
        feeds: Inputs by name, one mapping a size; two sizes or more unless the model has one.
        stages: Name → rewrite, in order; None means STAGES, and CPU_STAGES on the CPU.
        provider: auto, cpu or cuda.
    """
    error = WorstError(model, feeds, provider)
    rows: list[RewriteStage] = []
    if stages is None:
        stages = {**STAGES, **(CPU_STAGES if error.base.provider == "cpu" else {})}
    for name, rewrite in stages.items():
        candidate, session = model.clone(), error.base
        worst: float | None = None
        try:
            if not rewrite(candidate).modified:
                continue
            why = _renamed(model, candidate)
            if not why:
                session = _open(candidate, provider)
                found = error.compared(session)
                why = next(map(_over, (p for p in found if not p.ok)), "")
                worst = max(p.rel for p in found)
        except Exception as e:  # a library's rewrite may raise anything; so may the runtime
            why = one_line(e, 160) or type(e).__name__
        nodes = sum(1 for _ in candidate.graph.all_nodes())
        finite = worst if worst is not None and math.isfinite(worst) else None
        row = RewriteStage(name, not why, why, nodes, weight_bytes(candidate), error=finite)
        rows.append(row if why else _timed(row, error.base, session, feeds[0]))
        model = model if why else candidate
    return model, rows


def _renamed(before: ir.Model, after: ir.Model) -> str:
    """Which inputs or outputs a rewrite changed; empty where it changed none."""
    for what in ("inputs", "outputs"):
        a, b = ([v.name for v in getattr(m.graph, what)] for m in (before, after))
        if a != b:
            lost = ", ".join(str(n) for n in a if n not in b) or "their order"
            return f"it changes the {what}: {lost}"
    return ""


def _over(p: Parity) -> str:
    """Where an output differs by more than the gate."""
    return f"output {p.output!r} at {sizes_text(p.sizes)}: rel {p.rel:.2e}, the gate is {p.tol:.1e}"


def _timed(
    row: RewriteStage, base: RuntimeSession, session: RuntimeSession, feed: Mapping[str, Array]
) -> RewriteStage:
    found = time_sessions({"base": base, "new": session}, {"base": feed, "new": feed}, ROUNDS, 1)
    cpu = found.rows()[1]["cpu"]
    return replace(row, seconds=cpu["median"], ratio=cpu["ratio"])
