"""Our passes in onnx_ir's own pass manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from lora_fx.onnx.graph import OnnxGraph


class Managed(ir.passes.InPlacePass):
    """A pass of ours on an onnx_ir model.

    Args:
        rewrite: Insert, Fold or any other pass of lora_fx.passes.
    """

    def __init__(self, rewrite: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rewrite = rewrite

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        done = self.rewrite(OnnxGraph(model))
        return ir.passes.PassResult(model, done.modified)
