"""Rows that are invoked at different places, and what an aLoRA changes where it should not.

A mask lies wrong where the rows of a result are the tokens in another order, [tokens · batch] or
reversed; then rows or tokens see the adapter that should not. In some models they see the others
without any adapter, too: tokens that look ahead, rows that share a range. So the base runs twice,
the second time with other ids behind each start: what stays the same there has to stay the same
with the adapter, and what does not is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import NEVER
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.passes.proofs.reference import Reference

DRAWN = 0.5
"""The scale of random updates, large enough to see."""
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
