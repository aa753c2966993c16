"""Rewrites as transactions: apply to a clone, run it, keep it only where it is the same model.

Every stage is compared with the graph that came in, in ONNX Runtime, at all the sizes given; one
that raises, does not load, changes the inputs or outputs, or differs is rolled back by itself.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_fx.compare import ORT_TOL, compare, sizes_text
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line, silenced
from lora_fx.onnx.bench import time_sessions
from lora_fx.onnx.graph.flow import made_by
from lora_fx.onnx.names import exact_constants, unfolded
from lora_fx.onnx.optimise.gemm import DeltaBeforeBias, GemmToMatMul
from lora_fx.onnx.save import save, weight_bytes
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.text import Json

Feeds = Sequence[Mapping[str, Array]]
"""{input: array}, of every size that is compared."""

# What onnx_ir and onnxscript bring: dead nodes out, constant folding, fusions for ONNX Runtime.


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's optimizer: constants, common subexpressions, its default rules."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.optimizer import optimize_ir

        before = sum(1 for _ in model.graph.all_nodes())
        weights = [n for n, v in model.graph.initializers.items() if len(v.shape or ()) > 1]
        with silenced(contextlib.redirect_stdout), exact_constants():
            optimize_ir(model, should_fold=unfolded(weights))
        after = sum(1 for _ in model.graph.all_nodes())
        return ir.passes.PassResult(model, after != before)


@dataclass(frozen=True)
class FuseForRuntime(ir.passes.InPlacePass):
    """onnxscript's fusions: attention, rotary, SkipLayerNormalization, GELU."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        with silenced(contextlib.redirect_stdout):
            _, counts = optimize_for_ort(model)
        return ir.passes.PassResult(model, any(counts.values()))


# SkipLayerNormalization(x, skip, …) → LayerNormalization(Sum(x, skip)), for the CPU.
#
# ONNX Runtime's fused kernel for the CPU goes element by element and takes some six times as long
# as its vectorised sum and norm one after the other. Where only the norm reads the sum, the runtime
# itself would fuse an Add with it; it knows no such rule for Sum, so sums before norms become that.


NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
DEFAULT_EPSILON = 1e-12
"""The epsilon of the fused operators, where the attribute is left out."""


@dataclass(frozen=True)
class SplitSkipNorm(ir.passes.InPlacePass):
    """Fused sums and norms, and Adds that the runtime would fuse with the norm after them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            if node.domain == "com.microsoft" and node.op_type in NORMS:
                changed |= _split(node)
            elif not node.domain and node.op_type in NORMS.values():
                changed |= _hold(node)
        return ir.passes.PassResult(model, changed)


def _split(fused: ir.Node) -> bool:
    x, skip, gamma, *rest = fused.inputs
    simplified = "Simplified" in fused.op_type
    beta = rest.pop(0) if rest and not simplified else None
    bias = rest[0] if rest else None
    if any(v.uses() or v.is_graph_output() for v in fused.outputs[1:3]):  # mean and deviation
        return False
    total = ir.node("Sum", [v for v in (x, skip, bias) if v is not None])
    epsilon = fused.attributes.get_float("epsilon", DEFAULT_EPSILON)
    operands = [total.outputs[0], gamma, *([] if beta is None else [beta])]
    norm = ir.node(NORMS[fused.op_type], operands, {"axis": -1, "epsilon": epsilon})
    assert fused.graph is not None
    fused.graph.insert_before(fused, [total, norm])
    total.outputs[0].name = f"{fused.outputs[0].name}_sum"
    total.outputs[0].type, total.outputs[0].shape = fused.outputs[0].type, fused.outputs[0].shape
    _take_over(fused.outputs[0], norm.outputs[0])
    if len(fused.outputs) > 3:
        _take_over(fused.outputs[3], total.outputs[0])
    fused.graph.remove(fused, safe=True)
    return True


def _hold(norm: ir.Node) -> bool:
    """Sum for an Add of two activations of one shape: a bias is a constant, or smaller."""
    add = made_by(norm.inputs[0], "Add")
    if add is None or add.graph is None:
        return False
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape:
        return False
    if a.const_value is not None or b.const_value is not None:
        return False
    total = ir.node("Sum", [a, b])
    add.graph.insert_before(add, [total])
    _take_over(add.outputs[0], total.outputs[0])
    add.graph.remove(add, safe=True)
    return True


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Readers of `old` and its place among the outputs; the name too, which an output keeps."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, f"{old.name}_fused"


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
    with tempfile.TemporaryDirectory() as folder:
        base = _open(model, Path(folder) / "base.onnx", provider)
        wanted = [base.run(f) for f in feeds]
        rows: list[RewriteStage] = []
        if stages is None:
            stages = {**STAGES, **(CPU_STAGES if base.provider == "cpu" else {})}
        for i, (name, rewrite) in enumerate(stages.items()):
            candidate, session = model.clone(), base
            error: float | None = None
            try:
                if not rewrite(candidate).modified:
                    continue
                why = _renamed(model, candidate)
                if not why:
                    session = _open(candidate, Path(folder) / f"{i}.onnx", provider)
                    why, error = _difference(session, feeds, wanted)
            except Exception as e:  # a library's rewrite may raise anything; so may the runtime
                why = one_line(e, 160) or type(e).__name__
            nodes = sum(1 for _ in candidate.graph.all_nodes())
            size = weight_bytes(candidate)
            row = RewriteStage(name, not why, why, nodes, size, error=error)
            rows.append(row if why else _timed(row, base, session, feeds[0]))
            model = model if why else candidate
        return model, rows


class WorstError:
    """Candidate → the largest difference of its outputs to a model's; infinite if it fails.

    Attributes:
        failure: Why the last candidate did not load or run; empty where it did.
    """

    def __init__(self, model: ir.Model, feeds: Feeds, provider: str) -> None:
        self._feeds, self._provider, self.failure = feeds, provider, ""
        with tempfile.TemporaryDirectory() as folder:
            base = _open(model, Path(folder) / "base.onnx", provider)
            self._wanted = [base.run(f) for f in feeds]

    def __call__(self, candidate: ir.Model) -> float:
        """The largest max|a − b| / max|b|."""
        self.failure = ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = _open(candidate, Path(folder) / "candidate.onnx", self._provider).run
                both = zip(self._feeds, self._wanted, strict=True)
                found = [compare(run(f), w, {}, ORT_TOL).rel for f, w in both]
            except Exception as e:  # the runtime's exceptions have no common base
                self.failure = f" ({one_line(e, 160)})"
                return math.inf
            return max(found)


def peaks(model: ir.Model, feeds: Feeds, provider: str) -> dict[str, float]:
    """Value of the graph → the largest magnitude that it takes, before any rewrite."""
    copy = model.clone()
    shown = [v for n in copy.graph for v in n.outputs if v.name and not v.is_graph_output()]
    copy.graph.outputs.extend(v for v in shown if v.dtype == ir.DataType.FLOAT)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        session = _open(copy, Path(folder) / "shown.onnx", provider)
        for feed in feeds:
            for name, value in {**feed, **session.run(feed)}.items():
                if value.dtype == np.float32 and value.size:
                    found[name] = max(found.get(name, 0.0), float(np.abs(value).max()))
    return found


def _renamed(before: ir.Model, after: ir.Model) -> str:
    """Which inputs or outputs a rewrite changed; empty where it changed none."""
    for what in ("inputs", "outputs"):
        a, b = ([v.name for v in getattr(m.graph, what)] for m in (before, after))
        if a != b:
            lost = ", ".join(str(n) for n in a if n not in b) or "their order"
            return f"it changes the {what}: {lost}"
    return ""


def _difference(session: RuntimeSession, feeds: Feeds, wanted: Feeds) -> tuple[str, float | None]:
    """Where outputs differ by more than the gate, or nothing; and the largest rel, if finite."""
    worst = 0.0
    for feed, want in zip(feeds, wanted, strict=True):
        shapes = {k: v.shape for k, v in feed.items()}
        got = compare(session.run(feed), want, shapes, ORT_TOL)
        worst = max(worst, got.rel)
        if not got.ok:
            where = sizes_text(shapes)
            why = f"output {got.output!r} at {where}: rel {got.rel:.2e}, the gate is {ORT_TOL:.1e}"
            return why, worst if math.isfinite(worst) else None
    return "", worst


def _timed(
    row: RewriteStage, base: RuntimeSession, session: RuntimeSession, feed: Mapping[str, Array]
) -> RewriteStage:
    found = time_sessions({"base": base, "new": session}, {"base": feed, "new": feed}, ROUNDS, 1)
    cpu = found.rows()[1]["cpu"]
    return replace(row, seconds=cpu["median"], ratio=cpu["ratio"])


def _open(model: ir.Model, path: Path, provider: str) -> RuntimeSession:
    save(model, path)
    try:
        return open_session(path, provider, threads=1)
    except LoraFxError as e:
        message = e.message.partition("cannot load it: ")[2] or e.message
        raise LoraFxError(
            f"ONNX Runtime cannot load it: {message}", "report this: it is a mistake of lora-fx"
        ) from e
