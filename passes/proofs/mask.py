"""The proof of an aLoRA's mask: which tokens see the adapter, by running.

whole rows     the invocation at the beginning: the outputs of the branches without a mask
no invocation  the outputs of the base, to the bit
spread         the invocation at another place in every row, and one row without: this row and all
               tokens before an invocation are the base's, to the bit

A mask lies wrong where the rows of a result are the tokens in another order, [tokens · batch] or
reversed; then rows or tokens see the adapter that should not. In some models they see the others
without any adapter, too: tokens that look ahead, rows that share a range. So the base runs twice,
the second time with other ids behind each start: what stays the same there has to stay the same
with the adapter, and what does not is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import NEVER
from lora_fx.adapter.lowrank import LowRank, Updates, draw
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import Rewriter
from lora_fx.fx.token_mask import name_of_ids
from lora_fx.inputs import Named
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.gradients import Trained, probe
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.passes.proofs.reference import Reference

BESIDE = 3
"""The number of tokens before the invocation in these runs, and behind it."""
ROWS = 3
"""The number of rows of the spread, where a model takes it: one has no invocation."""
NO_INVOCATION = "a row without the invocation"


@dataclass(frozen=True)
class Spread:
    """Ids of rows that are invoked at different places; the first of several rows is not.

    Attributes:
        ids: The ids [batch, tokens].
        others: The same up to the starts, and other ids behind; no row is invoked.
        starts: Where each row is invoked, or NEVER.
    """

    ids: Array
    others: Array
    starts: Array

    @classmethod
    def of(cls, ids: Array, invocation: Array) -> Spread:
        """Spread an invocation over rows; they have to be as long as it is."""
        plain = without(ids, invocation)
        spread = plain.copy()
        others = plain.copy()
        rows, length = ids.shape
        room = length - len(invocation)
        starts = np.full(rows, NEVER, np.int64)
        for row in range(rows):
            if row or rows == 1:
                start = 1 + (room // 2 + 2 * row) % room if room else 0
                starts[row] = start
                spread[row, start : start + len(invocation)] = invocation
                others[row, start:] = np.roll(plain[row], 1)[start:]
        return cls(spread, others, starts)


@dataclass(frozen=True)
class Change:
    """An output of rows or tokens that no adapter acts on, and that is not the base's.

    Attributes:
        where: What the message calls these.
        is_wrong: The base has it the same whatever stands behind the starts.
    """

    output: str
    where: str
    is_wrong: bool


def changes(spread: Spread, adapted: Named, base: Named, base_of_others: Named) -> Iterator[Change]:
    """Yield what the adapter changes before the starts of a spread.

    Args:
        spread: The ids.
        adapted: The outputs on them with the adapter.
        base: Those of the base.
        base_of_others: Those of the base on the other ids.
    """
    for output, array in base.items():
        if array.shape[:1] != spread.starts.shape:
            continue
        for row, start in enumerate(spread.starts):
            part: tuple[slice, ...] = (slice(row, row + 1),)
            where = NO_INVOCATION
            if start != NEVER:
                part = (*part, slice(start))
                where = "tokens before the invocation"
                if array.shape[:2] != spread.ids.shape:
                    continue
            ours, theirs, changed = adapted[output][part], array[part], base_of_others[output][part]
            if np.array_equal(ours, theirs, equal_nan=True):
                continue
            is_same = np.array_equal(theirs, changed, equal_nan=True)
            is_far = rel(ours, theirs) > FOLD_TOL
            if is_same or is_far:
                is_near = rel(changed, theirs) <= FOLD_TOL
                yield Change(output, where, is_wrong=is_same or is_near)


def first_wrong(found: Iterable[Change]) -> Change | None:
    """Return the first change that is wrong, if there is one."""
    return next((change for change in found if change.is_wrong), None)


def without(ids: Array, invocation: Array) -> Array:
    """Return ids with another token instead of those of the invocation."""
    other = next(token for token in range(len(invocation) + 1) if token not in invocation)
    return np.where(np.isin(ids, invocation), other, ids)


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
            raise misplaced(change, "the adapter", "insert a plain LoRA, without invocation")

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


def prove_tokens(reference: Reference, name: str, adapter: Adapter) -> None:
    """Prove that an aLoRA's mask lies right in a model, whatever the adapter's numbers are.

    Args:
        reference: The model, which masks by its token ids.
        name: The adapter's.
        adapter: Bound to the reference.

    Raises:
        LoraFxError: A row or token sees the adapter that should not.
    """
    invocation = np.array(adapter.invocation)
    feeds = reference.feeds((ROWS, 2 * BESIDE + len(invocation)))
    if feeds[reference.ids].shape[1] < len(invocation):
        return  # no row of the model can be invoked
    spread = Spread.of(feeds[reference.ids], invocation)
    run = reference.run(None)
    base = run({**feeds, reference.ids: spread.ids})
    base_of_others = run({**feeds, reference.ids: spread.others})

    def wrong(keys: Mapping[str, LowRank]) -> Change | None:
        """Return what random updates of these keys change, and should not."""
        entries = {}
        for key, low in keys.items():
            assert low.layout is not None
            a, b = draw(key, low.layout, low.rank, 0, "probe")
            entries[key] = replace(low, a=a, b=b, alpha=DRAWN * low.rank)
        adapted = reference.run(replace(adapter, entries=entries))
        outputs = adapted({**feeds, reference.ids: spread.ids})
        return first_wrong(changes(spread, outputs, base, base_of_others))

    change = wrong(adapter.lowrank)
    if change is None:
        return
    for key, low in adapter.lowrank.items():
        if wrong({key: low}):
            raise misplaced(
                change,
                key,
                f"leave the target out: lora-fx convert {name} -o OUT --exclude {module_of(key)}",
                f"{name}: ",
            )
    raise misplaced(change, name, "leave the adapter out")


DRAWN = 0.5
"""The scale of random updates, large enough to see."""


def misplaced(change: Change, target: str, hint: str, prefix: str = "") -> LoraFxError:
    """Return the refusal of a target whose rows are not the tokens in their order."""
    return LoraFxError(
        f"{prefix}{target!r} cannot be masked by token: output {change.output!r} of "
        f"{change.where} is not the base's with it, so the rows of its result are not the tokens "
        "in the order [batch, tokens]",
        hint,
    )


def module_of(key: str) -> str:
    """Return what --exclude takes for a key."""
    return key.removesuffix(".weight")


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
