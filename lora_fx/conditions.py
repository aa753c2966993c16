"""Conditions on input sizes: the sizes for which a captured graph is valid.

A condition is a comparison of whole-number arithmetic over sizes, written as text over short names,
as in `a <= 7` where a is dimension 1 of x. Files hold that text, so it is read by a parser of its
own that knows numbers, names, + - * // %, min, max and comparisons, and runs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar, cast

from lora_fx.errors import LoraFxError
from lora_fx.text import Json, JsonView

V = TypeVar("V")
Size = tuple[str, int]
"""(input, dimension)."""


class SizeError(LoraFxError, ValueError):
    """An input size that the model, or its captured graph, does not accept."""


SEARCHED = 4096
"""The largest size that is tried to find the range of a comparison."""


@dataclass(frozen=True)
class Condition:
    """A comparison that some input sizes must satisfy.

    Attributes:
        text: The comparison, over the names in `sizes`.
        sizes: Which size each name is: (name, input, dimension).
        line: The line of the user's code that asked, or a word for what did.
        demanded: The model itself does not run elsewhere; otherwise it takes another path there.
        tree: The parsed comparison; empty if it is none.
    """

    text: str
    sizes: tuple[tuple[str, str, int], ...]
    line: str = ""
    demanded: bool = False
    tree: Tree = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Parse the comparison here, since torch.compile warns of a cache in what it traces."""
        with contextlib.suppress(LoraFxError):  # `build` raises it
            object.__setattr__(self, "tree", parsed(self.text))

    def holds(self, values: Mapping[Size, int]) -> bool:
        """Whether the sizes satisfy the condition; it holds if one of its sizes has no value."""
        by_name = {}
        for name, input_name, dimension in self.sizes:
            if (input_name, dimension) not in values:
                return True
            by_name[name] = values[input_name, dimension]
        return bool(self.build(_result, by_name))

    @property
    def about(self) -> frozenset[Size]:
        """The sizes that the condition depends on."""
        return frozenset((input_name, dimension) for _, input_name, dimension in self.sizes)

    def __str__(self) -> str:
        """The comparison with each size as an input's dimension, and the line of code."""
        text = self._spelled()
        if self.in_tokens:
            text += f", {self.in_tokens}"
        if self.line:
            text += f" ({self.line})"
        return text

    @property
    def in_tokens(self) -> str:
        """The bound on token ids in words, "at most 512 tokens"; empty for other conditions."""
        if self.about not in ({("input_ids", 1)}, {("decoder_input_ids", 1)}):
            return ""
        low, high = self.bounds()
        ends = []
        if low is not None:
            ends.append(f"at least {low}")
        if high is not None:
            ends.append(f"at most {high}")
        if not ends:
            return ""
        return f"{' and '.join(ends)} tokens"

    def _spelled(self) -> str:
        """Return the comparison with every size as `input[dimension]`."""
        bound = self._as_bound()
        if bound is not None:
            return bound
        tree = ast.parse(self.text, mode="eval")
        spelled = {name: f"{input_name}[{dimension}]" for name, input_name, dimension in self.sizes}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in spelled:
                node.id = spelled[node.id]
        return ast.unparse(tree)

    def _as_bound(self) -> str | None:
        """Return a computed comparison as the equivalent bound of its one size; None if none.

        `x == min(512, x) or x < 3` is `x <= 512`.
        """
        if len(self.sizes) != 1:
            return None
        is_computed = len(list(_leaves(parsed(self.text)))) > 2
        if not is_computed:
            return None
        ((_, input_name, dimension),) = self.sizes
        low, high = self.bounds()
        if (low is None) == (high is None):
            return None
        if low is None:
            return f"{input_name}[{dimension}] <= {high}"
        return f"{input_name}[{dimension}] >= {low}"

    def refusal(self, values: Mapping[Size, int]) -> SizeError:
        """Return the error for sizes that do not satisfy the condition."""
        sizes = []
        for _, input_name, dimension in self.sizes:
            size = values[input_name, dimension]
            sizes.append(f"{input_name!r} has size {size} in dimension {dimension}")
        rule = self._spelled()
        if self.in_tokens:
            taker = "the model" if self.demanded else "the captured path"
            text = f"{taker} takes {self.in_tokens}: {rule}"
        elif self.demanded:
            text = f"the model runs only for {rule}"
        else:
            text = f"the captured path is valid only for {rule}"
        if self.line:
            text += f" ({self.line})"
        return SizeError(
            f"{' and '.join(sizes)}; {text}",
            "pass inputs of sizes within these bounds, or capture the model at these sizes",
        )

    def to_json(self) -> Json:
        """Return one row: `min` and `max` for a plain bound, else the comparison."""
        low, high = self.bounds()
        _, input_name, dimension = self.sizes[0]
        row: Json = {
            "input": input_name,
            "dim": dimension,
            "min": low,
            "max": high,
            "line": self.line,
        }
        if low is None and high is None:
            row["condition"] = self._spelled()
        return row

    def turns(self) -> list[int]:
        """Return sizes where the result may change: small sizes, and those next to each number.

        Where it computes, every size up to its numbers, and what comes of two numbers.
        """
        leaves = list(_leaves(parsed(self.text)))
        numbers: set[int] = set()
        for leaf in leaves:
            if isinstance(leaf, int):
                numbers.update((leaf, -leaf))
        all_up_to = 69
        if len(leaves) > 2:  # it computes
            all_up_to = max(all_up_to, min(SEARCHED, max(numbers, default=0) + 1))
            numbers |= _computed(numbers)
        near = [size for size in _neighbours(numbers) if size > all_up_to]
        return [*range(1, all_up_to + 1), *sorted(near)]

    def bounds(self) -> tuple[int | None, int | None]:
        """Return (least, largest) if the condition bounds one size by a number, else Nones."""
        if len(self.sizes) != 1:
            return None, None
        return _bounds(self.text)

    def build(self, make: Callable[[str, Sequence[V]], V], sizes: Mapping[str, V]) -> V:
        """Build the comparison in another form, from its leaves up.

        Args:
            make: (operation, operands) → what it makes; numbers are operands as they are.
            sizes: What stands for each size, by its name here.
        """
        return _built(self.tree or parsed(self.text), make, sizes)

    def equal_sizes(self, places: Mapping[Size, str]) -> list[tuple[Size, str]]:
        """Return (size, symbols of the sum) for a comparison that says a size equals a sum."""
        tree = parsed(self.text)
        if tree[0] != "Eq":
            return []
        by_name = {name: (input_name, dimension) for name, input_name, dimension in self.sizes}
        _, left, right = tree
        equal = []
        for side, other_side in ((left, right), (right, left)):
            if not isinstance(side, str):
                continue
            symbols = _sum(other_side, by_name, places)
            if symbols:
                equal.append((by_name[side], symbols))
        return equal

    def stored(self) -> Json:
        """Return the form for files, in which the line has no folder of the code."""
        path, comma, number = self.line.partition(", line ")
        file = re.split(r"[/\\]", path)[-1]
        return {
            "text": self.text,
            "sizes": [list(size) for size in self.sizes],
            "line": file + comma + number,
            "demanded": self.demanded,
        }

    @classmethod
    def read(cls, row: JsonView) -> Condition:
        """Read what `stored` wrote; raise LoraFxError if the text is not a comparison."""
        sizes = tuple(
            (str(name), str(input_name), int(dimension))
            for name, input_name, dimension in row["sizes"]
        )
        names = _names_in(parsed(str(row["text"])))
        are_axes = all(0 <= dimension < MAX_AXES for _, _, dimension in sizes)
        if not names or names != {name for name, _, _ in sizes} or not are_axes:
            raise LoraFxError(
                f"{row['text']!r} is not a condition on {sizes}",
                "check whether the file was edited",
            )
        return cls(str(row["text"]), sizes, str(row["line"]), bool(row["demanded"]))


def without_implied(conditions: Sequence[Condition]) -> list[Condition]:
    """Return the conditions that no other condition implies.

    Implied is a comparison of one size that holds at each of the few sizes at which another does,
    and one of whose alternatives (`a or b`) is such a comparison.
    """
    few_sizes = {}  # those at which a condition holds, where all are below what is searched
    for condition in conditions:
        _, high = condition.bounds()
        if len(condition.sizes) == 1 and high is not None:
            few_sizes[condition] = _sizes_that_hold(condition, high)
    remaining = list(conditions)
    for condition in conditions:
        for other in remaining:
            if other is condition or other not in few_sizes:
                continue
            tree = parsed(condition.text)
            if _implies(few_sizes[other], other, tree, condition.sizes):
                remaining.remove(condition)
                break
    return remaining


def _sizes_that_hold(condition: Condition, high: int) -> list[int]:
    """Return the sizes up to `high` at which a condition of one size holds."""
    sizes = []
    for size in range(1, high + 1):
        if condition.holds(dict.fromkeys(condition.about, size)):
            sizes.append(size)
    return sizes


def _implies(
    values: Sequence[int], condition: Condition, tree: Tree, sizes: Sequence[tuple[str, str, int]]
) -> bool:
    """Whether a comparison holds wherever a condition does.

    Args:
        values: The sizes at which the condition holds.
        condition: The condition.
        tree: The comparison, parsed.
        sizes: Which size each name of the comparison is.
    """
    if tree[0] == "Or":
        alternatives = [inner for inner in tree[1:] if isinstance(inner, tuple)]
        if any(_implies(values, condition, inner, sizes) for inner in alternatives):
            return True
    names = _names_in(tree)
    about = {(input_name, dimension) for name, input_name, dimension in sizes if name in names}
    if about != condition.about:
        return False
    return all(_built(tree, _result, dict.fromkeys(names, value)) for value in values)


def broken(conditions: Iterable[Condition], values: Mapping[Size, int]) -> Condition | None:
    """Return the first condition that the sizes do not satisfy."""
    for condition in conditions:
        if not condition.holds(values):
            return condition
    return None


MAX_AXES = 64
"""The most axes of a tensor in a file; a condition names one of them."""
Tree = tuple["str | Tree | int", ...]
BINARY: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul,
    "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
    "Eq": operator.eq, "NotEq": operator.ne, "Or": operator.or_, "And": operator.and_,
}  # fmt: skip
_CALLS: dict[str, Callable[..., int]] = {"min": min, "max": max}


@lru_cache(4096)
def parsed(text: str) -> Tree:
    """Parse the comparison to nested tuples: (op, left, right), names and numbers.

    Raises:
        LoraFxError: It is anything else than a comparison of whole-number arithmetic.
    """
    try:
        tree = _tree(ast.parse(text[:4000], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = ()
    if not isinstance(tree, tuple) or not tree:
        raise LoraFxError(
            f"{text[:80]!r} is not a condition on sizes", "check whether the file was edited"
        )
    return tree


def _tree(node: ast.expr) -> str | Tree | int:
    """Return an expression as nested tuples.

    Raises:
        ValueError: It is more than arithmetic, comparisons, `and`, `or`, min and max.
    """
    match node:
        case ast.Constant(value) if type(value) is int:
            return value
        case ast.Name(name):
            return name
        case ast.UnaryOp(ast.USub(), operand):
            return ("Sub", 0, _tree(operand))
        case ast.BinOp(left, operation, right) if type(operation).__name__ in BINARY:
            return (type(operation).__name__, _tree(left), _tree(right))
        case ast.Compare(left, [operation], [right]) | ast.BoolOp(operation, [left, right]):
            return (type(operation).__name__, _tree(left), _tree(right))
        case ast.Call(ast.Name(name), [_, *_] as arguments, []) if name in _CALLS:
            return (name, *(_tree(argument) for argument in arguments))
    raise ValueError(ast.dump(node))


def _sum(tree: str | Tree | int, by_name: Mapping[str, Size], places: Mapping[Size, str]) -> str:
    """Return the symbols of a size, or of a sum of sizes and numbers; else empty."""
    if isinstance(tree, int):
        return str(tree) if tree >= 0 else ""
    if isinstance(tree, str):
        return places.get(by_name[tree], "")
    if tree[0] != "Add":
        return ""
    symbols = [_sum(inner, by_name, places) for inner in tree[1:]]
    if not all(symbols):
        return ""
    return " + ".join(symbols)


def _computed(numbers: set[int]) -> set[int]:
    """Return products, quotients and sums of the numbers with each other and their neighbours."""
    computed: set[int] = set()
    divisors = [number for number in numbers if number > 0]
    for left in _neighbours(numbers):
        for right in divisors:
            computed.update((left * right, left // right, left + right))
    return computed


def _neighbours(numbers: Iterable[int]) -> set[int]:
    """Return the numbers, and the integers next to them."""
    neighbours: set[int] = set()
    for number in numbers:
        neighbours.update((number - 1, number, number + 1))
    return neighbours


@lru_cache(4096)
def _bounds(text: str) -> tuple[int | None, int | None]:
    """Return the bounds of one size; try every size if the comparison's form does not show them."""
    tree = parsed(text)
    if len(tree) == 3 and isinstance(tree[1], str) and isinstance(tree[2], int):
        comparison = str(tree[0])
        number = tree[2]
        low = {"Gt": number + 1, "GtE": number, "Eq": number}.get(comparison)
        high = {"Lt": number - 1, "LtE": number, "Eq": number}.get(comparison)
        return low, high

    (name,) = _names_in(tree)
    sizes = [size for size in range(1, SEARCHED + 1) if _built(tree, _result, {name: size})]
    if not sizes:
        return None, None
    least = sizes[0]
    largest = sizes[-1]
    if sizes != list(range(least, largest + 1)):
        return None, None
    return (
        least if least > 1 else None,
        largest if largest < SEARCHED else None,
    )


def _names_in(tree: Tree) -> set[str]:
    return {leaf for leaf in _leaves(tree) if isinstance(leaf, str)}


def _leaves(tree: str | Tree | int) -> Iterator[str | int]:
    """Yield the names and numbers of a comparison, from left to right."""
    if not isinstance(tree, tuple):
        yield tree
        return
    for inner in tree[1:]:
        yield from _leaves(inner)


def _built(
    tree: str | Tree | int, make: Callable[[str, Sequence[V]], V], sizes: Mapping[str, V]
) -> V:
    """Build a comparison in another form; see `Condition.build`."""
    if isinstance(tree, tuple):
        return make(str(tree[0]), [_built(inner, make, sizes) for inner in tree[1:]])
    if isinstance(tree, str):
        return sizes[tree]
    return cast("V", tree)


def _result(op: str, values: Sequence[int]) -> int:
    """Return the result of an operation; 0 for a division by 0."""
    if op in _CALLS:
        return _CALLS[op](values)
    if op in ("FloorDiv", "Mod") and values[1] == 0:
        return 0
    return BINARY[op](*values)
