"""Invocation tokens: an aLoRA acts on a row from the last place on where its tokens stand.

    start[b] = the first position of the last occurrence of the tokens in row b's ids
    the adapter acts at position t of row b where t ≥ start[b]; never in a row without the tokens

That is the rule of peft 0.21.2 (`calculate_alora_offsets` in peft/tuners/lora/variants.py), which
counts from the end: offset = length − start. Pads are ids like others there, so a start is a place
in the whole row, with the padding on its left. What comes after the row (tokens that are
generated) is behind the start, too. So nothing before it knows of the adapter, and in a causal
model the base's KV cache of these tokens is the adapter's as well (arXiv:2504.12397).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.text import is_whole

NEVER = np.iinfo(np.int64).max
"""The start of a row on which the adapter does not act: beyond every position."""
ALWAYS = 0
"""The start of a row on which the adapter acts everywhere, as a LoRA does."""
LONGEST = 4096
"""The most tokens that are read from a file; an invocation is a short text."""


def checked(tokens: object, where: str) -> tuple[int, ...]:
    """Return invocation tokens as a tuple.

    Args:
        tokens: A sequence of ids.
        where: What the message calls it.

    Raises:
        LoraFxError: It is empty, too long, or holds what is no id.
    """
    ids: list[object] = []
    if isinstance(tokens, np.ndarray):
        ids = tokens.reshape(-1).tolist()
    elif isinstance(tokens, (list, tuple)):
        ids = list(tokens)
    whole = [int(token) for token in ids if is_whole(token) and 0 <= token < 2**31]
    if not whole or len(whole) != len(ids) or len(whole) > LONGEST:
        raise LoraFxError(
            f"{where} is {one_line(repr(tokens), 60)}; expected a list of 1 to {LONGEST} token ids",
            "pass the ids of the invocation's text: tokenizer.encode(text, "
            "add_special_tokens=False)",
        )
    return tuple(whole)


def adapter_starts(ids: Array, invocation: Sequence[int]) -> Array:
    """Return where an aLoRA begins to act, by row: int64 [batch]; NEVER where it does not.

    Args:
        ids: The ids of whole rows [batch, tokens], or of one row [tokens]; pads are ids like
            others. Where the rows continue in a cache, these are the ids from the row's beginning.
        invocation: The adapter's tokens; empty for a plain LoRA, which acts from 0 on.

    >>> adapter_starts(np.array([[5, 1, 2, 9, 1, 2, 3]]), [1, 2])
    array([4])
    """
    hint = "pass the ids of whole rows, prompt and invocation, padded on the left to one length"
    try:
        rows = np.atleast_2d(np.asarray(ids))
    except ValueError:
        raise LoraFxError("ids are rows of several lengths; expected one array", hint) from None
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise LoraFxError(
            f"ids are {rows.dtype.name} {list(rows.shape)}; expected whole numbers [batch, tokens]",
            hint,
        )
    starts = np.full(len(rows), NEVER if len(invocation) else ALWAYS, np.int64)
    count = rows.shape[1] - len(invocation) + 1
    if not len(invocation) or count < 1:
        return starts
    found = np.ones((len(rows), count), bool)
    for offset, token in enumerate(invocation):
        found &= rows[:, offset : offset + count] == token
    for row in np.flatnonzero(found.any(axis=1)):
        starts[row] = np.flatnonzero(found[row])[-1]
    return starts


def planted(ids: Array, invocation: Sequence[int], seed: int = 0) -> Array:
    """Return ids [batch, tokens] with the invocation somewhere in the rows, for a proof.

    Every third row is left without, and rows that are shorter than the invocation are.
    """
    rows = np.array(ids)
    room = rows.shape[1] - len(invocation)
    for row in range(len(rows)):
        if room >= 0 and row % 3 < 2:
            start = (room // 2 + row + seed) % (room + 1)
            rows[row, start : start + len(invocation)] = invocation
    return rows


def refuse_invocation(invocation: Sequence[int], name: str, taker: str) -> None:
    """Raise for an aLoRA where an adapter would act on every token.

    Args:
        invocation: The tokens; empty for a plain LoRA.
        name: What the message calls the adapter.
        taker: What cannot take it.
    """
    if invocation:
        raise LoraFxError(
            f"{name} is an aLoRA, which acts from its invocation tokens on: {taker} would change "
            "every token",
            "export it with --mode switch or --mode batch, where it is masked by token",
        )
