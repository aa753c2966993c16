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


MAX_AXES = 64
"""The most axes of a tensor of a file; a condition names one of them."""


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

    def holds(self, sizes: Mapping[Size, int]) -> bool:
        """Whether sizes satisfy the condition; it holds where one of its own is missing."""
        numbers: dict[str, int] = {}
        for name, input_name, dimension in self.sizes:
            if (input_name, dimension) not in sizes:
                return True
            numbers[name] = sizes[input_name, dimension]
        return bool(self.build(result_of, numbers))

    @property
    def about(self) -> frozenset[Size]:
        """The sizes that it speaks of."""
        return frozenset((input_name, dimension) for _name, input_name, dimension in self.sizes)

    def __str__(self) -> str:
        """The comparison with every size by its input, and the line."""
        text = self._spelled()
        if self.in_tokens:
            text += f", {self.in_tokens}"
        if self.line:
            text += f" ({self.line})"
        return text

    @property
    def in_tokens(self) -> str:
        """The bound of the length of token ids in words, "at most 512 tokens"; empty for others."""
        if self.about not in ({("input_ids", 1)}, {("decoder_input_ids", 1)}):
            return ""
        low, high = self.bounds()
        ends: list[str] = []
        if low is not None:
            ends.append(f"at least {low}")
        if high is not None:
            ends.append(f"at most {high}")
        if not ends:
            return ""
        return f"{' and '.join(ends)} tokens"

    def _spelled(self) -> str:
        """The comparison with every size by its input."""
        bound = self._as_bound()
        if bound is not None:
            return bound
        tree = ast.parse(self.text, mode="eval")
        spelling = {name: f"{input_name}[{axis}]" for name, input_name, axis in self.sizes}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in spelling:
                node.id = spelling[node.id]
        return ast.unparse(tree)

    def _as_bound(self) -> str | None:
        """A computed comparison as the one bound of one size that it comes to; None for others.

        `x == min(512, x) or x < 3` is `x <= 512`.
        """
        if len(self.sizes) != 1 or len(list(leaves_of(parsed(self.text)))) <= 2:
            return None
        ((_name, input_name, dimension),) = self.sizes
        low, high = self.bounds()
        if low is None and high is not None:
            return f"{input_name}[{dimension}] <= {high}"
        if low is not None and high is None:
            return f"{input_name}[{dimension}] >= {low}"
        return None

    def refusal(self, sizes: Mapping[Size, int]) -> SizeError:
        """The error for sizes that do not satisfy it."""
        sizes_in_words = " and ".join(
            f"{input_name!r} has size {sizes[input_name, dimension]} in dimension {dimension}"
            for _name, input_name, dimension in self.sizes
        )
        rule = self._rule()
        if self.line:
            rule += f" ({self.line})"
        hint = "give sizes inside, or capture at these sizes"
        return SizeError(f"{sizes_in_words}; {rule}", hint)

    def _rule(self) -> str:
        """The comparison as a sentence."""
        comparison = self._spelled()
        if self.in_tokens:
            taker = "the model" if self.demanded else "the captured path"
            return f"{taker} takes {self.in_tokens}: {comparison}"
        if self.demanded:
            return f"the model does not run elsewhere: {comparison}"
        return f"the captured path holds for {comparison} only"

    def to_json(self) -> Json:
        """One row: for a plain bound `min` and `max`, for any other the comparison."""
        low, high = self.bounds()
        _name, input_name, dimension = self.sizes[0]
        row: Json = {
            "input": input_name, "dim": dimension, "min": low, "max": high, "line": self.line,
        }  # fmt: skip
        if low is None and high is None:
            row["condition"] = self._spelled()
        return row

    def turns(self) -> list[int]:
        """Sizes at which it may turn: small ones, and those beside each number in it.

        Where it computes, these are every size up to its numbers, and what comes of two numbers.
        """
        leaves = list(leaves_of(parsed(self.text)))
        numbers: set[int] = set()
        for leaf in leaves:
            if isinstance(leaf, int):
                numbers |= {leaf, -leaf}
        far = 69
        if len(leaves) > 2:
            far = max(far, min(SEARCHED, max(numbers, default=0) + 1))
            numbers |= _results_of_two(numbers)
        return [*range(1, far + 1), *sorted(size for size in _beside(numbers) if size > far)]

    def bounds(self) -> tuple[int | None, int | None]:
        """(least, largest) where it bounds one size by a number, else (None, None)."""
        if len(self.sizes) != 1:
            return None, None
        return bounds_of(self.text)

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
        if tree[0] != "Eq":
            return []
        size_of = {name: (input_name, axis) for name, input_name, axis in self.sizes}
        equal: list[tuple[Size, str]] = []
        for name, other_side in ((tree[1], tree[2]), (tree[2], tree[1])):
            if isinstance(name, str):
                symbols = _sum(other_side, size_of, places)
                if symbols:
                    equal.append((size_of[name], symbols))
        return equal

    def stored(self) -> Json:
        """The condition as files hold it: the line without the folder that the code lies in."""
        path, comma, number = self.line.partition(", line ")
        file_name = re.split(r"[/\\]", path)[-1]
        rows = [[name, input_name, dimension] for name, input_name, dimension in self.sizes]
        line = file_name + comma + number
        return {"text": self.text, "sizes": rows, "line": line, "demanded": self.demanded}

    @classmethod
    def read(cls, row: JsonView) -> Condition:
        """The condition that `stored` wrote; raises LoraFxError where the text is no comparison."""
        sizes = tuple(
            (str(name), str(input_name), int(dimension))
            for name, input_name, dimension in row["sizes"]
        )
        text = str(row["text"])
        names_in_text = {leaf for leaf in leaves_of(parsed(text)) if isinstance(leaf, str)}
        names = {name for name, _input_name, _dimension in sizes}
        are_axes = all(0 <= dimension < MAX_AXES for _name, _input_name, dimension in sizes)
        if not names_in_text or names_in_text != names or not are_axes:
            raise LoraFxError(f"{row['text']!r} is no condition on {sizes}", "was the file edited?")
        return cls(text, sizes, str(row["line"]), bool(row["demanded"]))


def _beside(numbers: Iterable[int]) -> set[int]:
    """The numbers, and those that are 1 less and 1 more."""
    beside: set[int] = set()
    for number in numbers:
        beside |= {number - 1, number, number + 1}
    return beside


def _results_of_two(numbers: set[int]) -> set[int]:
    """Products, quotients and sums of a number, or one beside it, and a number above 0."""
    positive = [number for number in numbers if number > 0]
    results: set[int] = set()
    for first in _beside(numbers):
        for second in positive:
            results |= {first * second, first // second, first + second}
    return results


def _sum(tree: str | Tree | int, size_of: Mapping[str, Size], places: Mapping[Size, str]) -> str:
    """The symbols of a size, or of a sum of sizes and numbers; empty for anything else."""
    if isinstance(tree, int):
        return str(tree) if tree >= 0 else ""
    if isinstance(tree, str):
        return places.get(size_of[tree], "")
    if tree[0] != "Add":
        return ""
    terms = [_sum(operand, size_of, places) for operand in tree[1:]]
    if not all(terms):
        return ""
    return " + ".join(terms)


def without_implied(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions without those that another one of them implies.

    Implied is a comparison of one size that holds at each of the few sizes at which another does,
    and one of whose alternatives (`a or b`) is such a comparison.
    """
    # The sizes at which a condition holds, where they are all below what is searched.
    few_sizes: dict[Condition, list[int]] = {}
    for condition in conditions:
        _low, high = condition.bounds()
        if high is not None:
            few_sizes[condition] = [
                size
                for size in range(1, high + 1)
                if condition.holds(dict.fromkeys(condition.about, size))
            ]

    remaining = list(conditions)
    for condition in conditions:
        others = [other for other in remaining if other is not condition and other in few_sizes]
        if any(
            _implies(few_sizes[other], other, parsed(condition.text), condition.sizes)
            for other in others
        ):
            remaining.remove(condition)
    return remaining


def _implies(
    numbers: Sequence[int], condition: Condition, tree: Tree, sizes: Sequence[tuple[str, str, int]]
) -> bool:
    """Whether a comparison holds wherever a condition does.

    Args:
        numbers: The sizes at which the condition holds.
        condition: The condition, on one size.
        tree: The comparison.
        sizes: Which size each name of the comparison is.
    """
    if tree[0] == "Or":
        alternatives = [operand for operand in tree[1:] if isinstance(operand, tuple)]
        if any(_implies(numbers, condition, tree, sizes) for tree in alternatives):
            return True
    names = {leaf for leaf in leaves_of(tree) if isinstance(leaf, str)}
    about = {(input_name, dimension) for name, input_name, dimension in sizes if name in names}
    if about != condition.about:
        return False
    return all(built(tree, result_of, dict.fromkeys(names, number)) for number in numbers)


def broken(conditions: Iterable[Condition], sizes: Mapping[Size, int]) -> Condition | None:
    """The first condition that the sizes do not satisfy."""
    for condition in conditions:
        if not condition.holds(sizes):
            return condition
    return None
