"""The module that fold returns: the updates are in its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module import CapturedModule, Rewriter
from lora_fx.fx.ones import prove_ones
from lora_fx.fx.tensors import from_numpy, owner


class FoldedModule(CapturedModule):
    """A model with an adapter folded into its weights; eval mode only, no branches."""

    def __init__(
        self, model: Captured | CapturedModule, rewriter: Rewriter, adapter: Adapter
    ) -> None:
        tree = model if isinstance(model, CapturedModule) else None
        captured = model.captured if isinstance(model, CapturedModule) else model
        super().__init__(captured, tree=tree)
        if tree is not None:
            self._programs.not_one = tree._programs.not_one
        else:
            prove_ones(self)
        self._rewriter = rewriter
        self.folded: tuple[Any, ...] = ()
        for name, full in adapter.full.items():
            m, leaf = owner(self, name)
            old = m._parameters[leaf]
            assert old is not None
            new = nn.Parameter(from_numpy(full.value, like=old), requires_grad=False)
            for part in self.modules():
                for k, p in part._parameters.items():
                    if p is old:
                        part._parameters[k] = new
        self._graph(False, captured.named)

    def _rewriters(self, training: bool) -> list[Rewriter]:
        return [self._rewriter]

    def train(self, mode: bool = True) -> FoldedModule:
        """A folded model has no train mode."""
        if mode:
            raise LoraFxError("a folded model is for inference", "insert again to train")
        super().train(False)
        return self
