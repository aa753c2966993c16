"""Conditions on the sizes of inputs: the set of sizes that a capture is true for.

A condition is a comparison of whole-number arithmetic over sizes, written as text over short names,
as in `a <= 7` where a is dimension 1 of x. Files hold that text, so it is read by a parser of its
own that knows numbers, names, + - * // %, min, max and comparisons, and runs nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_fx.comparisons import SEARCHED, Tree, bounds_of, built, leaves_of, parsed, result_of
from lora_fx.errors import LoraFxError
from lora_fx.text import Json, JsonView

V = TypeVar("V")
Size = tuple[str, int]
"""(input, dimension)."""


class SizeError(LoraFxError, ValueError):
    """A size that the model, or the graph captured of it, does not take."""


@dataclass(frozen=True)
class Condition:
    """What some sizes have to satisfy.

    Attributes:
        text: The comparison, over the names in `sizes`.
        sizes: Which size each name is: (name, input, dimension).
        line: The line of the user's code that asked, or a word for what did.
        demanded: The model itself does not run elsewhere; otherwise it takes another path there.
    """

    text: str
    sizes: tuple[tuple[str, str, int], ...]
    line: str = ""
    demanded: bool = False

    def holds(self, given: Mapping[Size, int]) -> bool:
        """Whether the sizes satisfy it; sizes that are not given make it true."""
        if any((i, d) not in given for _, i, d in self.sizes):
            return True
        return bool(self.build(result_of, {n: given[i, d] for n, i, d in self.sizes}))

    @property
    def about(self) -> frozenset[Size]:
        """The sizes that it speaks of."""
        return frozenset((i, d) for _, i, d in self.sizes)

    def __str__(self) -> str:
        """The comparison with every size by its input, and the line."""
        words = f", {self.in_tokens}" if self.in_tokens else ""
        return f"{self._spelled()}{words}{f' ({self.line})' if self.line else ''}"

    @property
    def in_tokens(self) -> str:
        """The bound of the length of token ids in words, "at most 512 tokens"; empty for others."""
        if self.about not in ({("input_ids", 1)}, {("decoder_input_ids", 1)}):
            return ""
        low, high = self.bounds()
        ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        return f"{' and '.join(ends)} tokens" if ends else ""

    def _spelled(self) -> str:
        if (bound := self._as_bound()) is not None:
            return bound
        tree = ast.parse(self.text, mode="eval")
        names = {n: f"{i}[{d}]" for n, i, d in self.sizes}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in names:
                node.id = names[node.id]
        return ast.unparse(tree)

    def _as_bound(self) -> str | None:
        """A computed comparison as the one bound of one size that it comes to; None for others.

        `x == min(512, x) or x < 3` is `x <= 512`.
        """
        if len(self.sizes) != 1 or len(list(leaves_of(parsed(self.text)))) <= 2:
            return None
        ((_, name, d),) = self.sizes
        low, high = self.bounds()
        if (low is None) == (high is None):
            return None
        return f"{name}[{d}] <= {high}" if low is None else f"{name}[{d}] >= {low}"

    def refusal(self, given: Mapping[Size, int]) -> SizeError:
        """The error for sizes that do not satisfy it."""
        found = " and ".join(
            f"{i!r} has size {given[i, d]} in dimension {d}" for _, i, d in self.sizes
        )
        where = f" ({self.line})" if self.line else ""
        rule = self._spelled()
        text = f"the captured path holds for {rule} only"
        if self.demanded:
            text = f"the model does not run elsewhere: {rule}"
        if self.in_tokens:
            taker = "the model" if self.demanded else "the captured path"
            text = f"{taker} takes {self.in_tokens}: {rule}"
        return SizeError(f"{found}; {text}{where}", "give sizes inside, or capture at these sizes")

    def to_json(self) -> Json:
        """One row: for a plain bound `min` and `max`, for any other the comparison."""
        low, high = self.bounds()
        _, name, d = self.sizes[0]
        row: Json = {"input": name, "dim": d, "min": low, "max": high, "line": self.line}
        if low is None and high is None:
            row["condition"] = self._spelled()
        return row

    def turns(self) -> list[int]:
        """Sizes at which it may turn: small ones, and those beside each number in it.

        Where it computes, every size up to its numbers, and what comes of two numbers.
        """
        leaves = list(leaves_of(parsed(self.text)))
        numbers = {n for m in leaves if isinstance(m, int) for n in (m, -m)}
        far = 69
        if len(leaves) > 2:
            far = max(far, min(SEARCHED, max(numbers, default=0) + 1))
            more = {n + k for n in numbers for k in (-1, 0, 1)}
            numbers |= {x for m in more for n in numbers if n > 0 for x in (m * n, m // n, m + n)}
        near = {n + k for n in numbers for k in (-1, 0, 1)}
        return [*range(1, far + 1), *sorted(n for n in near if n > far)]

    def bounds(self) -> tuple[int | None, int | None]:
        """(least, largest) where it bounds one size by a number, else (None, None)."""
        return bounds_of(self.text) if len(self.sizes) == 1 else (None, None)

    def build(self, make: Callable[[str, Sequence[V]], V], sizes: Mapping[str, V]) -> V:
        """The comparison in another form, made from its leaves up.

        Args:
            make: (operation, operands) → what it makes; numbers are operands as they are.
            sizes: What stands for each size, by its name here.
        """
        return built(parsed(self.text), make, sizes)

    def equal_sizes(self, places: Mapping[Size, str]) -> list[tuple[Size, str]]:
        """(size, symbols that it is the sum of), where the comparison says just that."""
        tree = parsed(self.text)
        where = {n: (i, d) for n, i, d in self.sizes}
        if tree[0] != "Eq":
            return []
        pairs = ((tree[1], tree[2]), (tree[2], tree[1]))
        return [(where[a], text) for a, b in pairs
                if isinstance(a, str) and (text := _sum(b, where, places))]  # fmt: skip

    def stored(self) -> Json:
        """As files hold it: the line without the folder that the code lies in."""
        path, comma, rest = self.line.partition(", line ")
        line = re.split(r"[/\\]", path)[-1] + comma + rest
        rows = [[n, i, d] for n, i, d in self.sizes]
        return {"text": self.text, "sizes": rows, "line": line, "demanded": self.demanded}

    @classmethod
    def read(cls, row: JsonView) -> Condition:
        """What `stored` wrote; raises LoraFxError where the text is no comparison."""
        sizes = tuple((str(n), str(i), int(d)) for n, i, d in row["sizes"])
        names = {leaf for leaf in leaves_of(parsed(str(row["text"]))) if isinstance(leaf, str)}
        fits = all(0 <= d < MAX_AXES for _, _, d in sizes)
        if not names or names != {n for n, _, _ in sizes} or not fits:
            raise LoraFxError(f"{row['text']!r} is no condition on {sizes}", "was the file edited?")
        return cls(str(row["text"]), sizes, str(row["line"]), bool(row["demanded"]))


def without_implied(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions without those that another one of them implies.

    Implied is a comparison of one size that holds at each of the few sizes at which another does,
    and one of whose alternatives (`a or b`) is such a comparison.
    """
    few = {}  # the sizes at which a condition holds, where they are all below what is searched
    for c in conditions:
        if len(c.sizes) == 1 and (high := c.bounds()[1]) is not None:
            few[c] = [n for n in range(1, high + 1) if c.holds(dict.fromkeys(c.about, n))]
    kept = list(conditions)
    for c in conditions:
        others = [o for o in kept if o is not c and o in few]
        if any(_implies(few[o], o, parsed(c.text), c.sizes) for o in others):
            kept.remove(c)
    return kept


def _implies(
    numbers: Sequence[int], condition: Condition, tree: Tree, sizes: Sequence[tuple[str, str, int]]
) -> bool:
    """Whether a comparison holds wherever a condition does, which is at these numbers."""
    if tree[0] == "Or":
        parts = [t for t in tree[1:] if isinstance(t, tuple)]
        if any(_implies(numbers, condition, part, sizes) for part in parts):
            return True
    names = {leaf for leaf in leaves_of(tree) if isinstance(leaf, str)}
    about = {(i, d) for n, i, d in sizes if n in names}
    if about != condition.about:
        return False
    return all(built(tree, result_of, dict.fromkeys(names, n)) for n in numbers)


def broken(conditions: Iterable[Condition], given: Mapping[Size, int]) -> Condition | None:
    """The first condition that the sizes do not satisfy."""
    return next((c for c in conditions if not c.holds(given)), None)


MAX_AXES = 64
"""Axes that a tensor of a file has at most, of which a condition names one."""


def _sum(tree: str | Tree | int, where: Mapping[str, Size], places: Mapping[Size, str]) -> str:
    """The symbols of a size, or of a sum of sizes and numbers; empty for anything else."""
    if isinstance(tree, int):
        return str(tree) if tree >= 0 else ""
    if isinstance(tree, str):
        return places.get(where[tree], "")
    parts = [_sum(t, where, places) for t in tree[1:]] if tree[0] == "Add" else [""]
    return " + ".join(parts) if all(parts) else ""
