"""The module that fold returns: the updates are in its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx import dotted_names, tensors
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.doubts import decide_doubts
from lora_fx.fx.module.module import CapturedModule, Rewriter


class FoldedModule(CapturedModule):
    """A model with an adapter folded into its weights; eval mode only, no branches."""

    def __init__(
        self, captured: Captured, tree: nn.Module, rewriter: Rewriter, adapter: Adapter
    ) -> None:
        super().__init__(captured, tree=tree)
        decide_doubts(self)
        self._rewriter = rewriter
        self.folded: tuple[Any, ...] = ()
        self.unrounded: dict[str, Callable[[], Array]] = {}
        """Name of a tensor → its value before it was rounded to the model's dtype."""
        for name, full in adapter.full.items():
            parameter = dotted_names.parameter_of(self, name)
            value = tensors.from_numpy(full.value, like=parameter)
            replacement = nn.Parameter(value, requires_grad=False)
            dotted_names.replace_parameter(self, parameter, replacement)
        self._graph(False, captured.named)

    def _rewrite(self, graph: FxGraph, training: bool) -> None:
        self._rewriter(graph)

    def train(self, mode: bool = True) -> FoldedModule:
        """A folded model has no train mode."""
        if mode:
            raise LoraFxError("a folded model is for inference only", "insert again to train")
        super().train(False)
        return self
