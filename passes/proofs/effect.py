"""Proof that an adapter takes effect: gradients reach every target, and branches equal W + s·b·a.

At random a and b, one backward per mode with a fixed random cotangent on every output gives the
gradient of each b, or of what another variant says its ΔW is in proportion to. The cotangent is
random because a plain sum is constant after a LayerNorm: its gradient there is rounding. A target
is dead when the root mean square of its gradient is below 1e-6 of the median target's. One eval
forward is compared with the weight form of every site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fx.adapter.lowrank import Updates
from lora_fx.compare import (
    FOLD_TOL,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.capture.capture import Captured, as_it_was, copied
from lora_fx.fx.module.adapted import AdaptedModule, Effect
from lora_fx.fx.module.module import Rewriter, plain
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.gradients import Trained, probe, prove_gradients, without_gradient
from lora_fx.passes.proofs.parity import prove, torch_rerun, torch_run
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.progress import stage
from lora_fx.targets.target import base_name
from lora_fx.text import some


@stage("proving that every target takes effect")
def prove_effect(module: AdaptedModule, dead: str = "error") -> Sequence[str]:
    """Prove every target; the module's tensors are as before afterwards.

    Args:
        module: Fresh from insert; `module.effect` gets the finding.
        dead: drop: return the dead keys instead of raising, unless all are; keep: neither.

    Raises:
        NoEffectError: A dead target, or branches that are not W + s·b·a.
    """
    if any(p.device.type == "meta" for p in module.parameters()):
        module.effect = Effect({}, (), ("not proven: the model has no weights",))
        return ()
    trained = Trained.of(module)
    named = trained.runs_at()
    module.effect = prove_gradients(trained, named)
    if idle := without_gradient(module.effect, len(module.updates), dead):
        return idle
    try:
        module.captured.allows(False, module.norm_stats)
    except LoraFxError:
        return ()  # a file with a train program only; the note on eval mode says so
    _same_as_weight_form(module, named)
    _same_gradients(module, named)
    return ()


def _same_gradients(module: AdaptedModule, named: Named) -> None:
    """Where a forward has autograd functions or hooks, its weights' gradients are the graph's.

    A capture drops them: a memory saver's gradient is the same, a reversal's is not.
    """
    captured = module.captured
    own = captured.traced(False, captured.named, module.base_dtype).own_gradients
    if not own or captured.live:
        return
    names = list(dict.fromkeys(base_name(k) for k in module.updates))[:8]
    both = (plain(captured), captured.model)
    ours, theirs = (_gradients_of(captured, m, names, named) for m in both)
    near = [
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        for a, b in zip(ours, theirs, strict=False)
    ]
    if len(ours) != len(theirs) or not all(near):
        raise LoraFxError(
            f"{some(own)} has a gradient of its own, which a graph drops: training would differ",
            "lora_fx.attach trains the live model; --dead allow inserts all the same",
        )


def _gradients_of(
    captured: Captured, model: nn.Module, names: Sequence[str], named: Named
) -> list[torch.Tensor]:
    """∂(a sum of the outputs)/∂W in eval mode, by a model's own call; zeros where there is none."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    given = {n: weights[n].detach().clone().requires_grad_() for n in names if n in weights}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, given, args, kwargs)

    with as_it_was(model), torch.enable_grad():
        out = tree_leaves(captured.signature.call(call, copied(named)))
        outputs = [y for y in out if isinstance(y, torch.Tensor) and y.requires_grad]
        parts = [(y * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)).sum() for y in outputs]
        if not parts:
            return []
        grads = torch.autograd.grad(parts, list(given.values()), allow_unused=True)
    pairs = zip(grads, given.values(), strict=True)
    return [torch.zeros_like(w) if g is None else g for g, w in pairs]


def weight_form(now: Updates, training: bool) -> Rewriter:
    """The pass that puts W + s·b·a at every site: the reference of output forms."""
    return Insert(now, missing="skip", weight_form=True)


def _same_as_weight_form(module: AdaptedModule, named: Named) -> None:
    plain = torch_run(module)
    in_weight_form = module.inserting(weight_form)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with in_weight_form():
            return plain(feeds)

    with probe(Trained.of(module)):
        module.eval()
        rerun = replace(torch_rerun(module), block=in_weight_form)
        arrays = arrays_of(named)
        parity = prove(run, module, arrays=arrays, tol=FOLD_TOL, of="weight form", rerun=rerun)
    for p in parity:
        if not p.ok:
            raise NoEffectError(
                f"the branches differ from W + s·b·a: output {p.output!r}: rel {p.rel:.2e}, "
                f"the gate is {p.tol:.1e}",
                "--dead allow inserts without the proof; please report this model",
            )
