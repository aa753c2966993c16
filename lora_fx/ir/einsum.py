"""A product of an activation with one weight, written in einsum letters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Axes, Emitter, Factors, Kind, Site
from lora_fx.ir.kinds import FREE, WeightForm, swap_last

Shape = tuple[Any, ...]
"""The sizes of a tensor; a size that is not an int is symbolic and varies at run time."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
RANK_LETTERS = "zuvabcdefghijklmnopqrstwxy"
"""Letters for the rank, in the order in which they are tried."""
VECTOR = "the weight has one dimension"


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
        """Linear if a matmul computes the contraction, else einsum."""
        return "linear" if self.form else "einsum"

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Find the axes from the letters: in axes in the order of x, out axes in the order of y.

        A letter of w alone, which the equation sums over, is out too, before the others.
        """
        batch: list[int] = []
        out: list[int] = []
        contracted: list[int] = []
        for axis, letter in enumerate(self.w):
            if letter not in self.x:
                out.append(axis)
            elif letter in self.y:
                batch.append(axis)
            else:
                contracted.append(axis)

        contracted.sort(key=lambda axis: self.x.index(self.w[axis]))
        out.sort(key=lambda axis: self.y.find(self.w[axis]))
        return Axes(tuple(batch), tuple(out), tuple(contracted))

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """Emit one einsum."""
        return e.op("einsum", x, w, equation=f"{self.x},{self.w}->{self.y}")

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Emit (x aᵀ) bᵀ for right, b (a x) for left, else two einsums with a rank letter."""
        if self.form == "left":
            return e.op("matmul", f.b, e.op("matmul", f.a, x))
        if self.form == "right":
            swap = swap_last(len(self.axes(site.operand).batch))
            hidden = e.op("matmul", x, e.op("transpose", f.a, perm=swap))
            return e.op("matmul", hidden, e.op("transpose", f.b, perm=swap))
        return self._branch_of_einsums(e, site, x, f)

    def _branch_of_einsums(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Emit two einsums: x with a [batch, rank, in], then with b [batch, out, rank]."""
        axes = self.axes(site.operand)
        batch = self._letters_of(axes.batch)
        out = self._letters_of(axes.out)
        contracted = self._letters_of(axes.in_)
        uncontracted = "".join(letter for letter in self.x if letter not in contracted)
        used = self.x + self.w + self.y
        rank = next(letter for letter in RANK_LETTERS if letter not in used)

        size = dict(zip(self.w, site.operand, strict=True))
        batch_shape = tuple(size[letter] for letter in batch)
        in_shape = tuple(size[letter] for letter in contracted)
        out_shape = tuple(size[letter] for letter in out)
        a = e.op("reshape", f.a, shape=(*batch_shape, FREE, *in_shape))
        b = e.op("reshape", f.b, shape=(*batch_shape, *out_shape, FREE))

        hidden = f"{uncontracted}{rank}"
        a_x = e.op("einsum", x, a, equation=f"{self.x},{batch}{rank}{contracted}->{hidden}")
        return e.op("einsum", a_x, b, equation=f"{hidden},{batch}{out}{rank}->{self.y}")

    def _letters_of(self, axes: tuple[int, ...]) -> str:
        return "".join(self.w[axis] for axis in axes)

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """Return the shape of a per-row value for x @ W and W @ x; empty for other forms."""
        if not self.form or len(site.operand) != 2:
            return ()
        return (out,) if self.form == "right" else (out, 1)


def linear(batch: str = "") -> Einsum:
    """Return the Kind of x [..., in] with w [*batch, out, in]."""
    if batch:
        return Einsum(f"...{batch}ni", f"{batch}oi", f"...{batch}no", "right")
    return Einsum("...i", "oi", "...o", "right")


def matmul_right(batch: str = "") -> Einsum:
    """Return the Kind of x [..., in] @ w [*batch, in, out]."""
    return replace(linear(batch), w=f"{batch}io")


def matmul_left(batch: str = "", *, vector: bool = False) -> Einsum:
    """Return the Kind of w [*batch, out, in] @ x [..., in, n], or @ x [in]."""
    if vector:  # x Wᵀ is the same; ONNX Runtime 1.31 gets Aᵀ x wrong when it fuses the transpose
        return Einsum("i", "oi", "o", "right")
    return Einsum(f"...{batch}in", f"{batch}oi", f"...{batch}on", "left")


def product(x: Shape, w: Shape, *, left: bool) -> tuple[Kind, str]:
    """Return the Kind of x @ w (or w @ x) from the two shapes, and why it is refused (or "")."""
    if len(w) < 2:
        return matmul_right(), VECTOR
    if len(w) == 2:
        if left:
            return matmul_left(vector=len(x) == 1), ""
        return matmul_right(), ""

    n_batch = len(w) - 2
    if _has_batch_axes(x, w):
        # i, o and n name the matrix axes; LETTERS[:n_batch] reaches i only past eight batch axes
        batch = LETTERS[:n_batch]
        if left:
            return matmul_left(batch), ""
        return matmul_right(batch), ""

    rows, columns = n_batch, n_batch + 1
    if left:
        axes = Axes(tuple(range(n_batch)), (rows,), (columns,))
    else:
        axes = Axes(tuple(range(n_batch)), (columns,), (rows,))
    return WeightForm("linear", axes), ""


def _has_batch_axes(x: Shape, w: Shape) -> bool:
    """Whether x has the batch axes of w [*batch, m, n], with equal sizes.

    Where it has not, one of the two is broadcast, and only the weight form is sure to mean the
    same. A size of None is as many matrices as data picks: it equals no other.
    """
    if len(x) < len(w):
        return False
    batch_of_x = x[-len(w) : -2]
    sizes = zip(batch_of_x, w[:-2], strict=True)
    return all(str(size_x) == str(size_w) != "None" for size_x, size_w in sizes)


def contraction(terms: list[str], i: int) -> tuple[Kind, str]:
    """Return the Kind of operand i of an einsum, and why it is refused (or "").

    Args:
        terms: The letters of each operand, and of the result at the end.
        i: Which of the operands is the weight.
    """
    w = terms[i]
    y = terms[-1]
    activations = [*terms[:i], *terms[i + 1 : -1]]
    x = "".join(activations)

    refusal = _refusal(w, activations, y)
    if refusal == ONE_SIDED and len(activations) > 1:
        link = _link_of_a_chain(w, activations[0])
        if link is not None:
            return link, ""

    sums_alone = any(letter not in x and letter not in y for letter in w)
    if len(activations) == 1 and (refusal or not sums_alone):
        return Einsum(activations[0], w, y), refusal

    in_ = tuple(axis for axis, letter in enumerate(w) if letter not in y)
    batch = tuple(axis for axis, letter in enumerate(w) if letter in y and letter in x)
    out = tuple(axis for axis, letter in enumerate(w) if letter in y and letter not in x)
    return WeightForm("einsum", Axes(batch, out, in_)), refusal


ONE_SIDED = "the weight has no input axis or no output axis: it is not a matrix"


def _refusal(w: str, activations: list[str], y: str) -> str:
    """Return why an einsum's weight cannot be adapted, from its letters; empty if it can."""
    if not activations:
        return "the einsum has only one operand"
    if any(len(set(term)) < len(term) for term in (w, *activations)):
        return "a letter occurs twice in one operand of the einsum"

    x = "".join(activations)
    all_in_result = all(letter in y for letter in w)
    if all_in_result and all(letter in x for letter in w):
        return "the einsum multiplies elementwise: it contracts no axis of the weight"
    has_no_out = all(letter in x or letter not in y for letter in w)
    if all_in_result or has_no_out:
        return ONE_SIDED
    return ""


def _link_of_a_chain(w: str, first: str) -> WeightForm | None:
    """Return the weight form of an operand in a chain: axes shared with the first are in."""
    met = tuple(axis for axis, letter in enumerate(w) if letter in first)
    unmet = tuple(axis for axis, letter in enumerate(w) if letter not in first)
    if met and unmet:
        return WeightForm("einsum", Axes((), unmet, met))
    return None


def letters(equation: str, ranks: list[int]) -> list[str]:
    """Return the letters of the operands and the result, with the ellipsis expanded.

    Args:
        equation: As einsum takes it, with or without an arrow.
        ranks: How many axes each operand has.
    """
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")

    # how many axes the ellipsis of each operand stands for
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    widest = 0
    for term, width in zip(terms, widths, strict=True):
        if "..." in term:
            widest = max(widest, width)
    unused = [letter for letter in LETTERS if letter not in equation]
    ellipsis = "".join(unused[:widest])

    spelled = [
        term.replace("...", ellipsis[widest - width :])
        for term, width in zip(terms, widths, strict=True)
    ]
    if arrow:
        return [*spelled, result.replace("...", ellipsis)]

    # without an arrow the result has every letter that stands once, in the alphabet's order
    named = "".join(terms).replace(".", "")
    singles = [letter for letter in sorted(set(named)) if named.count(letter) == 1]
    return [*spelled, ellipsis + "".join(singles)]
