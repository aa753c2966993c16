"""The proof of an aLoRA's mask: which tokens see the adapter, by running.

whole rows     the invocation at the beginning: the outputs of the branches without a mask
no invocation  the outputs of the base, to the bit
in between     outputs of tokens before it are the base's, in a causal model; else it is said
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
from lora_fx.inputs import SIZES
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.gradients import Trained, probe
from lora_fx.passes.proofs.proof_inputs import arrays_of

BESIDE = 3
"""The number of tokens before the invocation in these runs, and behind it."""


def prove_mask(module: AdaptedModule, branches_alone: Callable[[Updates, bool], Rewriter]) -> None:
    """Prove that the branches act from the last invocation on, and nowhere else.

    Args:
        module: Fresh from insert; its tensors keep their values.
        branches_alone: Inserts the branches without the mask.

    Raises:
        NoEffectError: A token sees the adapter that should not, or the other way round.
    """
    execution = execution_of(module)
    invocation = np.array(module.invocation)
    rows, _ = SIZES[0]
    size = (rows, 2 * BESIDE)  # longer by the invocation, as sample makes it
    name = name_of_ids(module.graph(False), execution.captured.named)
    ids = arrays_of(execution.sample(size))[onnx_name(name)]
    if ids.shape[1] < BESIDE + len(invocation):
        insertion_of(module).say(
            f"which tokens see the adapter is not proven: {name} takes {ids.shape[1]} of them, "
            f"and the proof needs {BESIDE} beside the invocation"
        )
        return
    other = next(token for token in range(len(invocation) + 1) if token not in invocation)

    def outputs(start: int | None) -> dict[str, Array]:
        """Run the module with the invocation at one place of every row, or nowhere."""
        tokens = np.where(np.isin(ids, invocation), other, ids)
        if start is not None:
            tokens[:, start : start + len(invocation)] = invocation
        return execution.flat(execution.sample(size, {name: tokens}))

    with probe(Trained.of(module)):
        module.eval()
        everywhere = outputs(0)
        behind = outputs(BESIDE)
        nowhere = outputs(None)
        with insertion_of(module).inserting(branches_alone)():
            unmasked = outputs(0)
        with insertion_of(module).inserting(no_branches)():
            base = outputs(None)
            base_around = outputs(BESIDE)

    for output, expected in unmasked.items():
        if rel(everywhere[output], expected) > FOLD_TOL:
            raise _wrong(output, "tokens behind the invocation do not see all of the adapter")
        if not np.array_equal(nowhere[output], base[output], equal_nan=True):
            raise _wrong(output, "a row without the invocation is not the base's")
        before = (slice(None), slice(BESIDE))
        is_by_token = expected.shape[:2] == ids.shape
        if is_by_token and rel(behind[output][before], base_around[output][before]) > FOLD_TOL:
            insertion_of(module).say(
                f"output {output!r} of tokens before the invocation differs from the base's: the "
                "model is not causal, so no cache of the base's can be used for the adapter"
            )


def no_branches(updates: Updates, training: bool) -> Rewriter:
    """Return the pass that inserts nothing."""
    return Insert({}, missing="skip")


def _wrong(output: str, what: str) -> NoEffectError:
    return NoEffectError(
        f"output {output!r}: {what}",
        "pass --dead allow to insert without the proof, and report this model",
    )
