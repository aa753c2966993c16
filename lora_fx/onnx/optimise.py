"""Rewrites as transactions: applied to a clone, run, and kept only if the outputs agree.

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
from lora_fx.onnx.candidate_error import Feeds, WorstError, open_model
from lora_fx.onnx.made_for import CPU, DEVICE_FORMS, PORTABLE_FORMS, is_device
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.onnxscript_passes import FoldConstants, FuseForRuntime
from lora_fx.onnx.rewrites.split_skip_norm import SplitSkipNorm
from lora_fx.onnx.save import weight_bytes
from lora_fx.onnx.session import RuntimeSession
from lora_fx.progress import stage
from lora_fx.text import Json

Rewrite = Callable[[ir.Model], ir.passes.PassResult]
STAGES: Mapping[str, Rewrite] = {
    "dead nodes": RemoveUnusedNodesPass(),  # the runtime would run them
    "gemm to matmul": GemmToMatMul(),
    "delta before bias": DeltaBeforeBias(),
    "onnxscript optimizer": FoldConstants(),
    "runtime fusions": FuseForRuntime(),
}
"""The stages of a file for any target."""
CPU_STAGES: Mapping[str, Rewrite] = {**STAGES, "sums and norms apart": SplitSkipNorm()}
"""The stages of a file for the CPU, each measured there."""
DEVICE_STAGES: Mapping[str, Rewrite] = {**STAGES, **DEVICE_FORMS}
"""The stages of a file for a device. None of them was timed on one; what each is for there:

- dead nodes: as on the CPU, the runtime would run them;
- gemm to matmul: attention_fusion.cc, bias_gelu_fusion.cc and skip_layer_norm_fusion.cc of
  onnxruntime/core/optimizer match MatMul and Add on [batch, length, width], and
  graph_transformer_utils.cc registers them for CUDA as for the CPU;
- delta before bias: the same files look for the bias last;
- onnxscript optimizer: constants that are folded are no nodes between host and device;
- runtime fusions: they write operators of com.microsoft that CUDA has kernels for
  (onnxruntime/contrib_ops/cuda/cuda_contrib_kernels.cc), among them
  SkipSimplifiedLayerNormalization, which the runtime itself makes of no Add and RMS norm;
- the forms of made_for.py: nodes that the device has no kernel for.

Sums and norms stay together: SkipLayerNormalization is one kernel on CUDA
(contrib_ops/cuda/bert/skip_layer_norm.cc) that reads and writes each number once.
tests/cuda counts the fused operators that are left.
"""
PORTABLE_STAGES: Mapping[str, Rewrite] = {
    **{name: rewrite for name, rewrite in STAGES.items() if name != "runtime fusions"},
    **PORTABLE_FORMS,
}
"""The stages of a portable file; fused operators are ONNX Runtime's own."""
ROUNDS = 5


def stages_for(target: str) -> Mapping[str, Rewrite]:
    """Return the stages of a file for one of made_for.MADE_FOR."""
    if target == CPU:
        return CPU_STAGES
    return DEVICE_STAGES if is_device(target) else PORTABLE_STAGES


@dataclass(frozen=True)
class RewriteStage:
    """The result of one rewrite.

    Attributes:
        name: The name of the stage.
        kept: Whether the graph keeps what the rewrite changed.
        why: Why it was rolled back; empty where it was kept.
        nodes: The number of nodes after the rewrite, even where it was rolled back.
        bytes: The number of bytes of the weights then.
        seconds: Median CPU of one run at the first size, one thread; None where it was not run.
        ratio: Those seconds over the time of the graph that came in, in the same rounds.
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
        if not self.kept:
            text += f"; rolled back: {self.why}"
        return text


def apply_stages(
    model: ir.Model,
    feeds: Feeds,
    stages: Mapping[str, Rewrite] | None = None,
    provider: str = "cpu",
    target: str = CPU,
) -> tuple[ir.Model, list[RewriteStage]]:
    """Return the model after all kept stages, and a row for every stage that changed something.

    Args:
        model: Not changed.
        feeds: Inputs by name, one mapping a size; two sizes or more unless the model has one.
        stages: Name → rewrite, in order; None means those of the target.
        provider: auto, cpu, cuda or webgpu: where the stages are proven.
        target: One of made_for.MADE_FOR.
    """
    error = WorstError(model, feeds, provider)
    if stages is None:
        stages = stages_for(target)

    rows: list[RewriteStage] = []
    for name, rewrite in stages.items():
        candidate = model.clone()
        with stage(f"optimising: {name}"):
            trial = _try(rewrite, model, candidate, error, provider)
        if trial is None:
            continue
        row = RewriteStage(
            name,
            kept=not trial.failure,
            why=trial.failure,
            nodes=sum(1 for _ in candidate.graph.all_nodes()),
            bytes=weight_bytes(candidate),
            error=trial.error,
        )
        if trial.session is not None:
            row = _timed(row, error.base, trial.session, feeds[0])
            model = candidate
        rows.append(row)
    return model, rows


@dataclass(frozen=True)
class _Trial:
    """The result of a rewrite that changed something.

    Attributes:
        failure: Why the candidate is rolled back; empty where it is kept.
        error: Its largest difference; None where it was not compared, or is not finite.
        session: Its session; None where it is rolled back.
    """

    failure: str = ""
    error: float | None = None
    session: RuntimeSession | None = None


def _try(
    rewrite: Rewrite, model: ir.Model, candidate: ir.Model, error: WorstError, provider: str
) -> _Trial | None:
    """Rewrite a clone of a model and compare it; return None if the rewrite changes nothing.

    Args:
        rewrite: What edits the candidate.
        model: The model as it was before this stage.
        candidate: Its clone.
        error: The comparison with the model that came in, before all stages.
        provider: Where the candidate runs.
    """
    try:
        if not rewrite(candidate).modified:
            return None
        changed_names = _changed_names(model, candidate)
        if changed_names:
            return _Trial(changed_names)
        session = open_model(candidate, provider)
        parities = error.compared(session)
        worst = max(parity.rel for parity in parities)
    except Exception as e:  # a library's rewrite may raise anything; so may the runtime
        return _Trial(one_line(e, 160) or type(e).__name__)

    finite = worst if math.isfinite(worst) else None
    for parity in parities:
        if not parity.ok:
            return _Trial(_over_the_gate(parity), finite)
    return _Trial(error=finite, session=session)


def _changed_names(before: ir.Model, after: ir.Model) -> str:
    """Return the inputs or outputs that a rewrite changed; empty if it changed none."""
    for what in ("inputs", "outputs"):
        names_before = [value.name for value in getattr(before.graph, what)]
        names_after = [value.name for value in getattr(after.graph, what)]
        if names_before != names_after:
            missing = [str(name) for name in names_before if name not in names_after]
            return f"it changes the {what}: {', '.join(missing) or 'their order'}"
    return ""


def _over_the_gate(parity: Parity) -> str:
    """Describe the output whose difference exceeds the gate."""
    return (
        f"output {parity.output!r} at {sizes_text(parity.sizes)}: rel {parity.rel:.2e}, "
        f"the gate is {parity.tol:.1e}"
    )


def _timed(
    row: RewriteStage, base: RuntimeSession, session: RuntimeSession, feed: Mapping[str, Array]
) -> RewriteStage:
    """Return a stage's row with the measured times of its candidate and of the base."""
    sessions = {"base": base, "new": session}
    timings = time_sessions(sessions, dict.fromkeys(sessions, feed), ROUNDS, 1)
    cpu = timings.rows()[1]["cpu"]
    return replace(row, seconds=cpu["median"], ratio=cpu["ratio"])
