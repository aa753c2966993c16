"""effect: the proof that insert ends with, so that no adapter trains nothing or merges wrongly.

gradient   ‖∂⟨c, y⟩/∂b‖ at random a, b and cotangent c, in eval and in train mode, per target
form       y(branches) = y(W + s·b·a) at the same a and b: every site's output form against
its weight form, in one eval forward
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import FOLD_TOL
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.effect import probe, prove_gradients, runs_at
from lora_fx.fx.module.adapted import AdaptedModule, Effect
from lora_fx.fx.module.module import Rewriter
from lora_fx.fx.tensors import to_numpy
from lora_fx.passes.insert import Insert
from lora_fx.passes.prove import prove, torch_run


def prove_effect(module: AdaptedModule, *, drop: bool = False) -> Sequence[str]:
    """Prove every target; the module's tensors are as before afterwards.

    Args:
        module: Fresh from insert; `module.effect` gets the finding.
        drop: Return the dead keys instead of raising.

    Raises:
        NoEffectError: A dead target, or branches that are not W + s·b·a.
    """
    if any(p.device.type == "meta" for p in module.parameters()):
        module.effect = Effect({}, (), ("not proven: the model has no weights",))
        return ()
    named = runs_at(module)
    found = prove_gradients(module, named)
    module.effect = found
    if found.dead and drop:
        return tuple(found.dead)
    if found.dead:
        some = ", ".join(f"{k} ({'/'.join(modes)})" for k, modes in list(found.dead.items())[:5])
        more = f" and {len(found.dead) - 5} more" if len(found.dead) > 5 else ""
        raise NoEffectError(
            f"no gradient reaches {some}{more}: an adapter there would train nothing",
            "leave it out with exclude=…, or all such with dead='drop'; dead='allow' keeps it",
        )
    try:
        module.captured.allows(False, module.norm_stats)
    except LoraFxError:
        return ()  # a file with a train program only; the note on eval mode says so
    _same_as_weight_form(module, named)
    return ()


def _same_as_weight_form(module: AdaptedModule, named: Mapping[str, Any]) -> None:
    leaves = zip(leaf_names(named), pytree.tree_leaves(dict(named)), strict=True)
    arrays = {n: to_numpy(x) for n, x in leaves if isinstance(x, torch.Tensor)}

    def weight_form(now: Mapping[str, LowRank], training: bool) -> Rewriter:
        return Insert(now, missing="skip", weight_form=True)

    plain = torch_run(module)

    def run(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        with module.inserting(weight_form):
            return plain(feeds)

    with probe(module):
        module.eval()
        parity = prove(run, module, arrays=arrays, tol=FOLD_TOL, of="weight form")
    for p in parity:
        if not p.ok and p.max_abs > 0:  # two outputs of zeros are equal
            raise NoEffectError(
                f"the branches differ from W + s·b·a: output {p.output!r}: rel {p.rel:.2e}, "
                f"the gate is {p.tol:.1e}",
                "dead='allow' inserts without the proof; please report this model",
            )
