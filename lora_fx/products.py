"""What kind of contraction the shapes of a product make: matmul and einsum, whatever they mean."""

from __future__ import annotations

from typing import Any

from lora_fx import kinds
from lora_fx.kinds import Axes, Kind

Shape = tuple[Any, ...]
"""Sizes; what is no whole number is symbolic."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VECTOR = "the weight has one dimension"


def product(x: Shape, w: Shape, *, left: bool) -> tuple[Kind, str]:
    """The Kind of x @ w (or w @ x) from the two shapes; why it is refused, or an empty text."""
    if len(w) < 2:
        return kinds.matmul_right(), VECTOR
    lead = w[:-2]
    if not lead:
        return kinds.matmul_left(vector=len(x) == 1) if left else kinds.matmul_right(), ""
    # i, o and n name the matrix axes; LETTERS[:len] reaches i only past eight batch axes
    batch = LETTERS[: len(lead)]
    inner = tuple(x[-2 - len(lead) : -2])
    fits = len(x) >= len(w) and all(
        isinstance(n, int) and n == m for n, m in zip(inner, lead, strict=True)
    )
    if fits:
        return kinds.matmul_left(batch) if left else kinds.matmul_right(batch), ""
    n = len(lead)
    out, in_ = (n, n + 1) if left else (n + 1, n)
    return kinds.WeightForm("linear", Axes(tuple(range(n)), (out,), (in_,))), ""


def contraction(terms: list[str], i: int) -> tuple[Kind, str]:
    """The Kind of operand i of an einsum, from the letters of its operands and its result."""
    w, y = terms[i], terms[-1]
    others = [t for j, t in enumerate(terms[:-1]) if j != i]
    x = "".join(others)
    why = ""
    if not others:
        why = "einsum of one operand"
    elif len(set(w)) < len(w) or any(len(set(t)) < len(t) for t in others):
        why = "a letter stands twice in one operand"
    elif all(c in x for c in w) and all(c in y for c in w):
        why = "no contraction: nothing of low rank"
    elif all(c in y for c in w) or all(c in x or c not in y for c in w):
        why = "one side of the weight has no axis: nothing of low rank"
    summed = any(c not in x and c not in y for c in w)
    if len(others) == 1 and (why or not summed):
        return kinds.Einsum(others[0], w, y), why
    in_ = tuple(k for k, c in enumerate(w) if c not in y)
    batch = tuple(k for k, c in enumerate(w) if c in y and c in x)
    out = tuple(k for k, c in enumerate(w) if c in y and c not in x)
    return kinds.WeightForm("einsum", Axes(batch, out, in_)), why


def letters(equation: str, ranks: list[int]) -> list[str]:
    """The operands' and the result's letters, with the ellipsis spelled out."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    free = [c for c in LETTERS if c not in equation]
    longest = max(
        (n - len(t.replace("...", "")) for t, n in zip(terms, ranks, strict=True) if "..." in t),
        default=0,
    )
    dots = "".join(free[:longest])
    spelled = []
    for t, n in zip(terms, ranks, strict=True):
        width = n - len(t.replace("...", ""))
        spelled.append(t.replace("...", dots[longest - width :]))
    if arrow:
        result = right.replace("...", dots)
    else:
        every = "".join(terms).replace(".", "")
        result = dots + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return [*spelled, result]
