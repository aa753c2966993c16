"""The last proof of insert: every adapter trains, and merges to the numbers of its branches.

gradient   ‖∂⟨c, y⟩/∂b‖ at random a, b and cotangent c, in eval and in train mode, per target
form       y(branches) = y(W + s·b·a) at the same a and b: every site's output form against
           its weight form, in one eval forward
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
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.adapted_report import Effect
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import Rewriter
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.gradients import Trained, probe, prove_gradients, without_gradient
from lora_fx.passes.proofs.mask import prove_mask
from lora_fx.passes.proofs.parity import prove, torch_rerun, torch_run
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.progress import stage
from lora_fx.targets.keys import base_name
from lora_fx.text import some


@stage("proving that every target takes effect")
def prove_effect(module: AdaptedModule, dead: str = "error") -> Sequence[str]:
    """Prove that every target takes effect; the module's tensors keep their values.

    Args:
        module: Fresh from insert; the finding becomes the effect of its insertion.
        dead: drop: return the dead keys instead of raising, unless all are; keep: neither.

    Raises:
        NoEffectError: A dead target, or branches that are not W + s·b·a.
    """
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        insertion_of(module).effect = Effect({}, (), ("not proven: the model has no weights",))
        return ()
    if module.invocation:
        with insertion_of(module).inserting(branches_alone)():
            idle = _prove_branches(module, dead)
        if not idle:
            prove_mask(module, branches_alone)
        return idle
    return _prove_branches(module, dead)


def branches_alone(updates: Updates, training: bool) -> Rewriter:
    """Return the pass that inserts branches without a mask of tokens."""
    return Insert(updates, training=training, missing="skip")


def _prove_branches(module: AdaptedModule, dead: str) -> Sequence[str]:
    """Prove that the branches train, and that they are W + s·b·a; see prove_effect."""
    trained = Trained.of(module)
    named = trained.runs_at()
    effect = prove_gradients(trained, named)
    insertion_of(module).effect = effect
    idle = without_gradient(effect, len(module.updates), dead)
    if idle:
        return idle
    try:
        execution = execution_of(module)
        execution.captured.allows(False, execution.norm_stats)
    except LoraFxError:
        return ()  # a file with a train program only; the note on eval mode says so
    _same_as_weight_form(module, named)
    _same_gradients(module, named)
    return ()


def weight_form(updates: Updates, training: bool) -> Rewriter:
    """Return the pass that puts W + s·b·a at every site, the reference for output forms."""
    return Insert(updates, missing="skip", weight_form=True)


def _same_as_weight_form(module: AdaptedModule, named: Named) -> None:
    """Raise if the branches give other numbers than W + s·b·a at every site."""
    run_branches = torch_run(module)
    in_weight_form = insertion_of(module).inserting(weight_form)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with in_weight_form():
            return run_branches(feeds)

    with probe(Trained.of(module)):
        module.eval()
        rerun = replace(torch_rerun(module), block=in_weight_form)
        arrays = arrays_of(named)
        results = prove(run, module, arrays=arrays, tol=FOLD_TOL, of="weight form", rerun=rerun)
    for parity in results:
        if not parity.ok:
            raise NoEffectError(
                f"the branches differ from W + s·b·a: output {parity.output!r}: "
                f"rel {parity.rel:.2e}, the gate is {parity.tol:.1e}",
                "pass --dead allow to insert without the proof, and report this model",
            )


def _same_gradients(module: AdaptedModule, named: Named) -> None:
    """Compare the weight gradients of graph and model if a forward has hooks or custom functions.

    A capture drops them: a memory saver's gradient is the same, a reversal's is not.
    """
    captured = execution_of(module).captured
    functions = captured.traced(
        False, captured.named, execution_of(module).base_dtype
    ).own_gradients
    if not functions or captured.live:
        return
    names = list(dict.fromkeys(base_name(key) for key in module.updates))[:8]
    of_graph = _gradients_of(captured, plain(captured), names, named)
    of_model = _gradients_of(captured, captured.model, names, named)
    if not _are_close(of_graph, of_model):
        raise LoraFxError(
            f"{some(functions)} defines a custom gradient, which a graph drops: training would "
            "differ",
            "use lora_fx.attach, which trains the live model; or pass --dead allow, which "
            "inserts anyway",
        )


def _are_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether gradients are equal within a thousandth of the reference's largest element."""
    if len(ours) != len(theirs):
        return False
    return all(
        torch.allclose(gradient, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
        for gradient, reference in zip(ours, theirs, strict=True)
    )


def _gradients_of(
    captured: Captured, model: nn.Module, names: Sequence[str], named: Named
) -> list[torch.Tensor]:
    """Return ∂(a sum of the outputs)/∂W in eval mode, from a call of the model; zeros if unused."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {
        name: parameters[name].detach().clone().requires_grad_()
        for name in names
        if name in parameters
    }

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, weights, args, kwargs)

    with as_it_was(model), torch.enable_grad():
        sums: list[torch.Tensor] = []
        for leaf in tree_leaves(captured.signature.call(call, copied(named))):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                slopes = torch.linspace(-1, 2, leaf.numel()).view(leaf.shape).to(leaf)
                sums.append((leaf * slopes).sum())
        if not sums:
            return []
        gradients = torch.autograd.grad(sums, list(weights.values()), allow_unused=True)
    pairs = zip(gradients, weights.values(), strict=True)
    return [
        torch.zeros_like(weight) if gradient is None else gradient for gradient, weight in pairs
    ]
