"""FLOPs of a model's own code, by torch's counter, against those that find names."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_fx.targets.found import Found

from .oracles import Subject

TOL = 1e-3
"""Gate on found / counted - 1."""
MEANT = ("depthwise", "quantised")
"""Refusals that may carry FLOPs."""
DROPS = {"hf_zero_shot_detection": "the model projects the image and drops the result"}
"""Models that compute what is in no output: torch counts it, and a graph does not hold it."""
DIFFER = {**DROPS, "hf_deberta": "find takes a size that depends on a tensor's values as 2"}
"""Where the two counts differ, and why."""


def counted(subject: Subject) -> int:
    """What torch's counter says of the original module on the example's inputs.

    The counter knows no fused recurrent op, so these run as their products; it gives 0 for a
    trilinear product (2 · rows · weight) and for the grouped product of experts. It does not count
    mv, by which spectral_norm measures its weight.
    """
    model = subject.model
    if hasattr(model, "set_experts_implementation"):
        model = copy.deepcopy(model)
        model.set_experts_implementation("eager")
    trilinear = [0]

    def bilinear(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        trilinear[0] += 2 * math.prod(out.shape[:-1]) * module.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Bilinear)]
    hooks = [m.register_forward_hook(bilinear) for m in layers]
    was = torch.backends.mkldnn.set_flags(False)[0]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv})
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*subject.args, **subject.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.mkldnn.set_flags(was)
        torch._dynamo.reset()  # a torch.cond that the counter has seen could not be compiled later
    return counter.get_total_flops() + trilinear[0]


def _mv(matrix: Sequence[int], _: Sequence[int], out_shape: object = None) -> int:
    return 2 * math.prod(matrix)


def difference(subject: Subject, found: Found) -> float:
    """Reached + refused + between activations, over torch's count, minus 1."""
    ours, theirs = sum(found.flops.values()), counted(subject)
    return ours / theirs - 1 if theirs else float(ours)


def refused(found: Found) -> list[str]:
    """Keys whose FLOPs are refused for no reason that is meant."""
    return [r.key for r in found.refusals if r.flops and not r.reason.startswith(MEANT)]
