"""Our passes in torch.fx's own pass manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from lora_fx.fx.graph.graph import FxGraph


class ManagedFxPass(PassBase):
    """A pass of lora-fx on graph modules, as `torch.export.export(…).module()` returns them.

    Args:
        rewrite: Insert, Fold or any other pass of lora_fx.passes.
    """

    def __init__(self, rewrite: Callable[[Any], Any]) -> None:
        self.rewrite = rewrite

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Edit the module and its tensors in place."""
        done = self.rewrite(FxGraph(graph_module.graph, graph_module))
        graph_module.recompile()
        return PassResult(graph_module, done.modified)
