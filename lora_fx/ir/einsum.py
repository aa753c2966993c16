"""A product of an activation with one weight, written in einsum letters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Axes, Emitter, Factors, Kind, Site
from lora_fx.ir.kinds import FREE, WeightForm, swap_last


@dataclass(frozen=True)
class Einsum:
    """A contraction of an activation with one weight: x, w → y in einsum letters.

    Letters of w that x and y share with it are batch, those only x has are in, those only y has
    are out. `form` names the cases that need no einsum: right is x @ W with in as the last axis
    of x, left is W @ x with in as the last but one (or the only one).
    """

    x: str
    w: str
    y: str
    form: str = ""
    has_branch = True

    @property
    def name(self) -> str:
        """Linear where a matmul computes it, else einsum."""
        return "linear" if self.form else "einsum"

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """The letters decide; the axes of in stand in the order of x, those of out in that of y.

        A letter of w alone, which the equation sums over, is out too, before the others.
        """
        batch: list[int] = []
        out: list[int] = []
        in_: list[int] = []
        for i, c in enumerate(self.w):
            (out if c not in self.x else batch if c in self.y else in_).append(i)
        in_.sort(key=lambda i: self.x.index(self.w[i]))
        out.sort(key=lambda i: self.y.find(self.w[i]))
        return Axes(tuple(batch), tuple(out), tuple(in_))

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """One einsum."""
        return e.op("einsum", x, w, equation=f"{self.x},{self.w}->{self.y}")

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Right: (x aᵀ) bᵀ; left: b (a x); else two einsums through a letter for the rank."""
        axes = self.axes(site.operand)
        if self.form == "left":
            return e.op("matmul", f.b, e.op("matmul", f.a, x))
        if self.form == "right":
            swap = swap_last(len(axes.batch))
            t = e.op("matmul", x, e.op("transpose", f.a, perm=swap))
            return e.op("matmul", t, e.op("transpose", f.b, perm=swap))
        # a letter that the equation does not use stands for the rank
        rank = next(c for c in "zuvabcdefghijklmnopqrstwxy" if c not in self.x + self.w + self.y)
        sizes = dict(zip(self.w, site.operand, strict=True))
        batch, out, in_ = ("".join(self.w[i] for i in p) for p in (axes.batch, axes.out, axes.in_))
        free = "".join(c for c in self.x if c not in in_)
        lead = tuple(sizes[c] for c in batch)
        a = e.op("reshape", f.a, shape=(*lead, FREE, *(sizes[c] for c in in_)))
        b = e.op("reshape", f.b, shape=(*lead, *(sizes[c] for c in out), FREE))
        t = e.op("einsum", x, a, equation=f"{self.x},{batch}{rank}{in_}->{free}{rank}")
        return e.op("einsum", t, b, equation=f"{free}{rank},{batch}{out}{rank}->{self.y}")

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """The last axis of x @ W."""
        return (out,) if self.form == "right" and len(site.operand) == 2 else ()


def linear(batch: str = "") -> Einsum:
    """X [..., in] with w [*batch, out, in]."""
    x, y = (f"...{batch}ni", f"...{batch}no") if batch else ("...i", "...o")
    return Einsum(x, f"{batch}oi", y, "right")


def matmul_right(batch: str = "") -> Einsum:
    """X [..., in] @ w [*batch, in, out]."""
    return replace(linear(batch), w=f"{batch}io")


def matmul_left(batch: str = "", *, vector: bool = False) -> Einsum:
    """W [*batch, out, in] @ x [..., in, n], or @ x [in]."""
    if vector:  # x Wᵀ is the same; ONNX Runtime 1.31 gets Aᵀ x wrong when it fuses the transpose
        return Einsum("i", "oi", "o", "right")
    return Einsum(f"...{batch}in", f"{batch}oi", f"...{batch}on", "left")


Shape = tuple[Any, ...]
"""Sizes of a tensor; one that is no whole number is symbolic, and free at run time."""


LETTERS = "abcdefghijklmnopqrstuvwxyz"


VECTOR = "the weight has one dimension"


def product(x: Shape, w: Shape, *, left: bool) -> tuple[Kind, str]:
    """The Kind of x @ w (or w @ x) from the two shapes; why it is refused, or an empty text."""
    if len(w) < 2:
        return matmul_right(), VECTOR
    lead = w[:-2]
    if not lead:
        return matmul_left(vector=len(x) == 1) if left else matmul_right(), ""
    # i, o and n name the matrix axes; LETTERS[:len] reaches i only past eight batch axes
    batch = LETTERS[: len(lead)]
    inner = tuple(x[-2 - len(lead) : -2])
    # Where x does not have the batch axes of w at the same sizes, one of the two is broadcast, and
    # only the weight form is sure to mean the same. As many matrices as data picks is a symbol.
    fits = len(x) >= len(w) and all(
        str(n) == str(m) != "None" for n, m in zip(inner, lead, strict=True)
    )
    if fits:
        return matmul_left(batch) if left else matmul_right(batch), ""
    n = len(lead)
    out, in_ = (n, n + 1) if left else (n + 1, n)
    return WeightForm("linear", Axes(tuple(range(n)), (out,), (in_,))), ""


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
        met = tuple(k for k, c in enumerate(w) if c in others[0])
        rest = tuple(k for k in range(len(w)) if k not in met)
        if len(others) > 1 and met and rest:  # a link of a chain: what it meets first is in
            return WeightForm("einsum", Axes((), rest, met)), ""
        why = "one side of the weight has no axis: nothing of low rank"
    summed = any(c not in x and c not in y for c in w)
    if len(others) == 1 and (why or not summed):
        return Einsum(others[0], w, y), why
    in_ = tuple(k for k, c in enumerate(w) if c not in y)
    batch = tuple(k for k, c in enumerate(w) if c in y and c in x)
    out = tuple(k for k, c in enumerate(w) if c in y and c not in x)
    return WeightForm("einsum", Axes(batch, out, in_)), why


def letters(equation: str, ranks: list[int]) -> list[str]:
    """The operands' and the result's letters, with the ellipsis spelled out."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    free = [c for c in LETTERS if c not in equation]
    widths = [n - len(t.replace("...", "")) for t, n in zip(terms, ranks, strict=True)]
    longest = max((w for t, w in zip(terms, widths, strict=True) if "..." in t), default=0)
    dots = "".join(free[:longest])
    spelled = [t.replace("...", dots[longest - w :]) for t, w in zip(terms, widths, strict=True)]
    if arrow:
        result = right.replace("...", dots)
    else:
        every = "".join(terms).replace(".", "")
        result = dots + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return [*spelled, result]
