"""Passes of onnxscript as onnx_ir passes: constant folding and ONNX Runtime fusions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.errors import silenced
from lora_fx.onnx.constant_folding import unfolded
from lora_fx.onnx.onnxscript_rules import exact_constants


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's optimizer: constants, common subexpressions, its default rules."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.optimizer import optimize_ir

        before = sum(1 for _ in model.graph.all_nodes())
        weights = [
            name for name, value in model.graph.initializers.items() if len(value.shape or ()) > 1
        ]
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
