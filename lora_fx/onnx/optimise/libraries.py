"""What onnx_ir and onnxscript bring: dead nodes out, constant folding, fusions for ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class DropDead(ir.passes.InPlacePass):
    """Nodes that no output needs: the runtime would run them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        return RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's optimizer: constants, common subexpressions, its default rules."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.optimizer import optimize_ir

        before = sum(1 for _ in model.graph.all_nodes())
        with _quiet():
            optimize_ir(model)
        after = sum(1 for _ in model.graph.all_nodes())
        return ir.passes.PassResult(model, after != before)


@dataclass(frozen=True)
class FuseForRuntime(ir.passes.InPlacePass):
    """onnxscript's fusions: attention, rotary, SkipLayerNormalization, GELU."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        with _quiet():
            _, counts = optimize_for_ort(model)
        return ir.passes.PassResult(model, any(counts.values()))
