"""Runs of a .pt2 file of mode switch in torch: one program, whose A and B are given to each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.module.module import by_output
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.onnx.manifest import Manifest
from lora_fx.passes.proofs.proof_inputs import named_of
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.proofs.switchable import NO_UPDATE


@dataclass(frozen=True)
class SwitchableProgram:
    """A program as torch runs it with different adapters.

    Attributes:
        manifest: Its inputs for A and B.
        example: A call of the model by argument, with the constants of every call.
        program: Takes the tensors of a call in order, and A and B by name.
        rank: The largest rank that an adapter may have; 0 where any fits.
        evaluate: Makes what the program takes of an adapter that reads its base.
    """

    manifest: Manifest
    example: Named
    program: nn.Module
    rank: int = 0
    evaluate: Callable[[Adapter], Adapter] = lambda adapter: adapter
    runtime: str = "the program"

    def run_with(self, adapter: Adapter | None) -> Run:
        """Return a run of the program with an adapter, or with zeros."""
        return self.run_of(self.manifest.all_tensors(self.evaluate(adapter or NO_UPDATE)))

    def run_of(self, tensors: Mapping[str, Array]) -> Run:
        """Return a run of the program with A and B of every target, by name."""
        factors = {name: from_numpy(array) for name, array in tensors.items()}

        def run(feeds: Named) -> dict[str, Array]:
            named = named_of(self.example, feeds)
            # copies, since a forward may write into its arguments, as the module's own call allows
            leaves = tree_leaves(named)
            arguments = [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
            with torch.no_grad(), alike(self.program):
                return by_output(self.program(*arguments, **factors))

        return run

    def rerun_with(self, adapter: Adapter | None) -> None:
        """Return None: torch runs the program in one way."""
