"""The proof of an aLoRA's mask at insert: which tokens see the branches, by running.

whole rows     the invocation at the beginning: the outputs of the branches without a mask
no invocation  the outputs of the base, to the bit
spread         the invocation at another place in every row, and one row without: this row and all
               tokens before an invocation are the base's, to the bit; see invocation_spread.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.lowrank import Updates
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.dtypes import Array
from lora_fx.errors import NoEffectError
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import Rewriter
from lora_fx.fx.token_mask import name_of_ids
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.gradients import Trained, probe
from lora_fx.passes.proofs.invocation_spread import (
    BESIDE,
    NO_INVOCATION,
    ROWS,
    Spread,
    changes,
    first_wrong,
    misplaced,
    module_of,
    without,
)
from lora_fx.passes.proofs.proof_inputs import arrays_of


def prove_mask(module: AdaptedModule, branches_alone: Callable[[Updates, bool], Rewriter]) -> None:
    """Prove that the branches act from the last invocation on, and nowhere else.

    Args:
        module: Fresh from insert; its tensors keep their values.
        branches_alone: Inserts the branches without the mask.

    Raises:
        LoraFxError: The rows of a result are not the tokens in their order.
        NoEffectError: A token sees the adapter that should not, or the other way round.
    """
    execution = execution_of(module)
    invocation = np.array(module.invocation)
    size = (ROWS, 2 * BESIDE)  # longer by the invocation, as sample makes it
    name = name_of_ids(module.graph(False), execution.captured.named)
    ids = arrays_of(execution.sample(size))[onnx_name(name)]
    if ids.shape[1] < BESIDE + len(invocation):
        insertion_of(module).say(
            f"which tokens see the adapter is not proven: {name} takes {ids.shape[1]} of them, "
            f"and the proof needs {BESIDE} beside the invocation"
        )
        return
    spread = Spread.of(ids, invocation)

    def outputs(tokens: Array) -> dict[str, Array]:
        """Run the module on ids."""
        return execution.flat(execution.sample(size, {name: tokens}))

    nowhere = without(ids, invocation)
    first = nowhere.copy()
    first[:, : len(invocation)] = invocation
    with probe(Trained.of(module)) as factors:
        module.eval()
        everywhere = outputs(first)
        of_nowhere = outputs(nowhere)
        of_spread = outputs(spread.ids)
        with insertion_of(module).inserting(branches_alone)():
            unmasked = outputs(first)
        with insertion_of(module).inserting(no_branches)():
            base = outputs(nowhere)
            base_of_spread = outputs(spread.ids)
            base_of_others = outputs(spread.others)

        found = [*changes(spread, of_spread, base_of_spread, base_of_others)]
        for change in found:
            if not change.is_wrong:
                continue
            for key in factors:
                with _alone(factors, key):
                    of_key = outputs(spread.ids)
                if first_wrong(changes(spread, of_key, base_of_spread, base_of_others)):
                    raise misplaced(change, key, f"pass --exclude {module_of(key)}")
            raise misplaced(change, "the adapter", "insert a plain LoRA, without --invocation")

    for output, expected in unmasked.items():
        if rel(everywhere[output], expected) > FOLD_TOL:
            raise _wrong(output, "tokens behind the invocation do not see all of the adapter")
        if not np.array_equal(of_nowhere[output], base[output], equal_nan=True):
            raise _wrong(output, "a row without the invocation is not the base's")
    for change in found:
        why = "the model is not causal, so no cache of the base's can be used for the adapter"
        if change.where == NO_INVOCATION:
            why = "the model's rows are not independent"
        insertion_of(module).say(
            f"output {change.output!r} of {change.where} differs from the base's: {why}"
        )


@contextlib.contextmanager
def _alone(factors: Mapping[str, nn.Parameter], key: str) -> Iterator[None]:
    """Fill all factors but one with zeros while the block runs."""
    values = {name: factor.detach().clone() for name, factor in factors.items()}
    with torch.no_grad():
        for name, factor in factors.items():
            if name != key:
                factor.zero_()
        try:
            yield
        finally:
            for name, factor in factors.items():
                factor.copy_(values[name])


def no_branches(updates: Updates, training: bool) -> Rewriter:
    """Return the pass that inserts nothing."""
    return Insert({}, missing="skip")


def _wrong(output: str, what: str) -> NoEffectError:
    return NoEffectError(
        f"output {output!r}: {what}",
        "pass --dead allow to insert without the proof, and report this model",
    )
