"""Decide by a run the questions about sizes that kernels asked while a model was captured."""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import copied, without_cache
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.patching import patched


def decide_doubts(module: CapturedModule) -> None:
    """Find out which doubtful conditions of a capture matter, once.

    The capture drops what torch's kernels asked for strides and for size 1. Here the user's module
    and the graph run where one does not hold; where they differ, it is a condition from then on.
    """
    execution = execution_of(module)
    captured = execution.captured
    traced = captured.traced(False, captured.named)
    if captured.idle is not None or captured.live:  # a live model has no sizes to refuse
        return
    inputs = captured.bounded_inputs()
    idle = []
    agrees_at: dict[tuple[tuple[str, tuple[int, ...]], ...], bool] = {}
    for condition in traced.doubtful:
        outside = inputs.outside(condition)
        if outside is None:
            continue  # the others imply it here; in the graph of another path they need not
        sizes = tuple(inputs.sizes(outside).items())
        if sizes not in agrees_at:
            agrees_at[sizes] = _agrees(module, execution.sample(outside))
        if agrees_at[sizes]:
            idle.append(condition)
    captured.settle(idle)


def _agrees(module: CapturedModule, named: Named) -> bool:
    """Whether the user's module and the graph give the same at these arguments."""
    execution = execution_of(module)
    captured = execution.captured
    interpreted = replace(module._programs, codes={}, compiled={}, blocks=False, few=True)
    with quiet(), torch.no_grad(), patched(module, _adapted=False, _programs=interpreted):
        try:
            with alike(captured.model, training=False):
                theirs = captured.signature.call(captured.model, copied(named))
        except Exception:  # of the user's code, which may raise anything at a size of ours
            return False
        theirs = tree_leaves(without_cache(theirs))
        try:
            with alike(module, training=False):
                ours = tree_leaves(execution.run(copied(named)))
        except (LoraFxError, RuntimeError, ValueError, IndexError):
            return False  # the graph holds for the other sizes only
    for our_leaf, their_leaf in zip(ours, theirs, strict=True):
        if isinstance(their_leaf, torch.Tensor) and not _is_near(our_leaf, their_leaf):
            return False
    return True


def _is_near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return rel(to_numpy(ours), to_numpy(theirs)) < 1e-4 or torch.equal(ours, theirs)


def plain(captured: Captured) -> CapturedModule:
    """The captured model as a module, with no adapter."""
    module = CapturedModule(captured)
    decide_doubts(module)
    return module
