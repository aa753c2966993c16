"""Rewrites as transactions: apply to a clone, run it, keep it only where it is the same model.

The rewrites are passes that onnx_ir's own pass manager runs too.

Every stage is compared with the graph that came in, in ONNX Runtime, at all the sizes given; one
that raises, does not load, changes the inputs or outputs, or differs is rolled back by itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_fx.compare import ORT_TOL, Parity, compare, sizes_text
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError, one_line, silenced
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.bench import time_sessions
from lora_fx.onnx.graph.flow import constant, dtype_name, made_by, numbers, operand
from lora_fx.onnx.graph.graph import add_initialiser
from lora_fx.onnx.names import unfolded
from lora_fx.onnx.rewriter import exact_constants
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


# Gemm(Reshape(x, [-1, k]), W, b) → MatMul(x, W) + b, with x as it was before it was flattened.
#
# The exporter writes GPT-2's Conv1D as Reshape, Gemm, Reshape; fusions look for MatMul and Add on
# [batch, length, k]. Dimensions may be symbols. Gemms of flat matrices are left alone: the runtime
# has a kernel for them. Rows keep their order, so what reshapes the product may go on doing so; a
# reshape to the shape that the product has now goes away.


@dataclass(frozen=True)
class GemmToMatMul(ir.passes.InPlacePass):
    """Gemms with alpha = beta = 1 of flattened activations."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        gemms = [n for n in model.graph if n.op_type == "Gemm" and not n.domain]
        return ir.passes.PassResult(model, any([_rewrite(model, n) for n in gemms]))


def _rewrite(model: ir.Model, gemm: ir.Node) -> bool:
    x, w = gemm.inputs[0], gemm.inputs[1]
    flat = made_by(x, "Reshape")
    attributes = gemm.attributes
    scales = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    plain = scales == (1.0, 1.0) and not attributes.get_int("transA", 0)
    if x is None or flat is None or not plain:
        return False
    source, sizes = flat.inputs[0], numbers(flat, "shape", 1)
    if source is None or source.shape is None or sizes is None or w is None:
        return False
    shape = list(source.shape)
    if len(sizes) != 2 or sizes[0] != -1 or len(shape) < 3 or sizes[1] < 1:
        return False
    out, bias = gemm.outputs[0], operand(gemm, 2)
    if out.shape is None or not isinstance(out.shape[-1], int):
        return False
    uses = [u.node for u in out.uses()]
    if not uses or out.is_graph_output() or not all(_keeps_order(n, out) for n in uses):
        return False
    if bias is not None and (bias.shape is None or len(bias.shape) > 1):
        return False  # a bias by rows has no place in 3-d
    lead, width = shape[:-1], sizes[1]
    joined = shape[-1] != width  # heads and their width in one: [b, s, heads, width] → [b, s, k]
    if joined:
        lead, heads = shape[:2], [n for n in shape[2:] if isinstance(n, int)]
        if len(shape) != 4 or len(heads) != 2 or math.prod(heads) != width:
            return False
    new: list[ir.Node] = []

    def made(op: str, *inputs: ir.Value, sizes: ir.Shape | None, **given: list[int]) -> ir.Value:
        new.append(ir.node(op, inputs, given, name=f"{out.name}_{op}"))
        value = new[-1].outputs[0]  # NAME_1 would be torch's name of the next product
        value.name, value.type, value.shape = new[-1].name, out.type, sizes
        return value

    if joined:
        to = add_initialiser(model.graph, f"{out.name}_rows", np.array([0, 0, width], np.int64))
        source = made("Reshape", source, to, sizes=ir.Shape([*lead, width]))
    if attributes.get_int("transB", 0):
        w = made("Transpose", w, sizes=None, perm=[1, 0])
    full = ir.Shape([*lead, out.shape[-1]])
    y = made("MatMul", source, w, sizes=full)
    if bias is not None:
        y = made("Add", y, bias, sizes=full)
    gemm.prepend(new)
    for after in uses:
        kept = after.outputs[0]
        if kept.shape is not None and kept.shape == full and not kept.is_graph_output():
            kept.replace_all_uses_with(y)
            model.graph.remove(after, safe=True)
        else:
            after.replace_input_with(0, y)
    model.graph.remove(gemm, safe=True)
    return True


def _keeps_order(node: ir.Node, value: ir.Value) -> bool:
    """A Reshape of the value that copies no dimension from it (no 0 in its target)."""
    if node.op_type != "Reshape" or node.domain or node.inputs[0] is not value:
        return False
    if node.attributes.get_int("allowzero", 0):
        return True
    target = constant(node.inputs[1])
    return target is not None and bool((target != 0).all())


# (x·W + bias) + delta → (x·W + delta) + bias, where delta is a chain of products of the same x.
#
# Fusions of a bias (BiasGelu, the bias of attention) look for it last, and one of them takes any
# last operand for a bias. A residual is no such chain and stays where it is.


DEPTH = 8
"""Nodes from delta back to x: two products, scales, casts."""


@dataclass(frozen=True)
class DeltaBeforeBias(ir.passes.InPlacePass):
    """Low-rank branches that were added after the bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.rewriter import RewriteRule, RewriteRuleSet

        # the matcher itself refuses an inner sum that something else reads, or that is an output
        rules = RewriteRuleSet([RewriteRule(_bias_first, _delta_first, _swaps)], commute=True)
        return ir.passes.PassResult(model, bool(rules.apply_to_model(model)))


def _bias_first(op: Any, product: ir.Value, bias: ir.Value, delta: ir.Value) -> object:
    return op.Add(op.Add(product, bias), delta)


def _delta_first(op: Any, product: ir.Value, bias: ir.Value, delta: ir.Value) -> object:
    total = op.Add(product, delta)
    total.name, total.type, total.shape = f"{product.name}_delta", product.type, product.shape
    return op.Add(total, bias)


def _swaps(context: object, product: ir.Value, bias: ir.Value, delta: ir.Value) -> bool:
    made = made_by(product, "MatMul")
    x = None if made is None else made.inputs[0]
    return bias.const_value is not None and x is not None and _reaches(delta, x, 0, DEPTH)


def _reaches(value: ir.Value, x: ir.Value, products: int, left: int) -> bool:
    """Value is x times two matrices or more, by products, scales and casts only."""
    if value is x:
        return products >= 2
    node = value.producer()
    if node is None or not left or node.op_type not in ("MatMul", "Mul", "Cast"):
        return False
    more = products + (node.op_type == "MatMul")
    return any(v is not None and _reaches(v, x, more, left - 1) for v in node.inputs)


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
    y, added = fused.outputs[0], total.outputs[0]
    added.name, added.type, added.shape = f"{y.name}_sum", y.type, y.shape
    _replace(fused, [total, norm], [norm.outputs[0], added])
    return True


def _hold(norm: ir.Node) -> bool:
    """Sum for an Add of two activations of one shape: a bias is a constant, or smaller."""
    add = made_by(norm.inputs[0], "Add")
    if add is None:
        return False
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape:
        return False
    if a.const_value is not None or b.const_value is not None:
        return False
    total = ir.node("Sum", [a, b])
    _replace(add, [total], total.outputs)
    return True


def _replace(old: ir.Node, new: Sequence[ir.Node], values: Sequence[ir.Value]) -> None:
    """Put nodes in the place of one, whose first result, and fourth if it has one, are values."""
    assert old.graph is not None
    was = [old.outputs[0], *old.outputs[3:]]
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, was, values[: len(was)])


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


def _open(model: ir.Model, provider: str) -> RuntimeSession:
    with scratch_folder() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        try:
            return open_session(path, provider, threads=1)
        except LoraFxError as e:
            message = e.message.partition("cannot load it: ")[2] or e.message
            raise MistakeError(f"ONNX Runtime cannot load it: {message}") from e
