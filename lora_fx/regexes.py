"""Regular expressions of files and of users: bounded before they are compiled, and while they run.

A pattern is read as Python's `re` reads it, since that is what PEFT and users write, and matched by
the package `regex`, which alone can be stopped. `regex` writes out the least count of every repeat:
`((a{999}){999}){999}` would take 9 GB. So the size of a pattern is computed first, from the tree
that `re` parses it to, which holds a repeat as two numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import unicodedata
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora_fx.errors import LoraFxError, one_line

if TYPE_CHECKING:
    import regex

MOST_SIZE = 100_000
"""The largest size of one pattern; see `written_out`. Five hundred names of modules are 10,000.
`regex` compiles 100,000 in 0.6 s and 20 MB."""
MOST_IN_ALL = 250_000
"""The largest size of the patterns since `begin`; two tables of 800 names are 130,000."""
EACH = 30
"""The cost of a pattern besides its parts: compiling an empty one takes as long as 30 parts."""
MOST_TEXT = 10_000
"""Characters of the longest text that a pattern is matched with."""
SECONDS = 1.0
"""Seconds for all matching since `begin`, not counting the first MATCH of every match."""
MATCH = 1e-4
"""Seconds of one match that are not counted: a list of 500 names takes some 20 µs."""
_SIMPLER = "write it without nested repeats"


@dataclass
class _Spent:
    """The time and the sizes spent since `begin`.

    Attributes:
        where: What the patterns are from, for messages.
        seconds: Seconds of matching.
        sizes: Pattern → its size.
    """

    where: str = ""
    seconds: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)


_spent: ContextVar[_Spent | None] = ContextVar("spent", default=None)
"""Each thread counts by itself."""


class PatternError(ValueError):
    """A text that is not a regular expression."""


def begin(where: str = "") -> None:
    """Reset the counts of time and sizes, for the next config or the next selectors.

    Args:
        where: What errors say the patterns are from, such as a file; nothing where it is empty.
    """
    _spent.set(_Spent(where and f"{where}: "))


def _spent_now() -> _Spent:
    """What this thread has spent."""
    spent = _spent.get()
    if spent is None:
        spent = _Spent()
        _spent.set(spent)
    return spent


def matched(
    pattern: str | regex.Pattern[str],
    text: str,
    how: Literal["match", "fullmatch", "search"] = "match",
) -> regex.Match[str] | None:
    """As `re.match`, `re.fullmatch` or `re.search`, in bounded time.

    Raises:
        PatternError: It is no pattern.
        LoraFxError: It is too large (see `compiled`), takes longer than SECONDS, or the text is
            longer than MOST_TEXT.
    """
    if isinstance(pattern, str):
        pattern = compiled(pattern)
    spent = _spent_now()
    if len(text) > MOST_TEXT:
        raise LoraFxError(
            f"{spent.where}{one_line(repr(text), 60)} has {len(text)} characters; expected a name "
            f"of at most {MOST_TEXT}",
            "is it the name of a module?",
        )
    remaining = max(0.001, SECONDS - spent.seconds)
    start = time.thread_time()
    try:
        match: regex.Match[str] | None = getattr(pattern, how)(text, timeout=remaining)
    except (TimeoutError, MemoryError) as error:
        raise LoraFxError(
            f"{spent.where}matching the pattern {one_line(repr(pattern.pattern), 120)} takes "
            f"longer than {SECONDS:g} s, alone or with the other patterns, for "
            f"{one_line(repr(text), 120)}",
            _SIMPLER,
        ) from error
    finally:
        spent.seconds += max(0.0, time.thread_time() - start - MATCH)
    return match


def compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern as `re` reads it, for `regex`.

    Raises:
        PatternError: It is no pattern.
        LoraFxError: It is larger than MOST_SIZE, or than MOST_IN_ALL with those that were compiled
            since `begin`.
    """
    spent = _spent_now()
    if pattern not in spent.sizes:
        size = _checked_size(pattern)
        total_size = size + sum(spent.sizes.values())
        if total_size > MOST_IN_ALL:
            raise LoraFxError(
                f"{spent.where}the patterns have {total_size} parts in all, up to "
                f"{one_line(repr(pattern), 60)}; expected at most {MOST_IN_ALL}",
                _SIMPLER,
            )
        spent.sizes[pattern] = size
    return _compiled(pattern)


@functools.lru_cache(maxsize=512)
def _checked_size(pattern: str) -> int:
    """The size of one pattern, which is not too large."""
    _refuse_large(pattern, len(pattern))  # to parse a million characters takes 2 s
    with _as_pattern_error():
        size = written_out(pattern)
    _refuse_large(pattern, size)
    return EACH + size


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern that both packages take, compiled by `regex`."""
    import regex  # most configs have no pattern

    with _as_pattern_error(regex.error):
        re.compile(pattern)
        return regex.compile(_for_regex(pattern))


_OTHERWISE = re.compile(
    r"""(?sx) \\N\{ (?P<name> [^}]+ ) \}
    | \\.
    | (?P<set> \[ \^? \]? (?: \\. | [^]\\] )*+ \] )
    | \{ (?! \d*,?\d* \} )"""
)
_IN_SET = re.compile(r"(?s)\\N\{(?P<name>[^}]+)\}|\\.|\[")


def _for_regex(pattern: str) -> str:
    """A pattern whose parts that the two packages read differently are written so that they agree.

    1. Braces that count nothing are plain in `re`, and fuzzy matching in `regex`.
    2. A bracket in a set is plain in `re`, and begins a class such as [:alpha:] in `regex`.
    3. `regex` takes N with a name for any character but a line's end.
    """

    def escaped(match: re.Match[str]) -> str:
        if match["name"]:
            return re.escape(unicodedata.lookup(match["name"]))
        if match[0].startswith("\\"):
            return match[0]
        return f"\\{match[0]}"

    def rewritten(match: re.Match[str]) -> str:
        if match["set"]:
            return f"[{_IN_SET.sub(escaped, match[0][1:])}"
        return escaped(match)

    return _OTHERWISE.sub(rewritten, pattern)


@contextlib.contextmanager
def _as_pattern_error(*kinds: type[Exception]) -> Iterator[None]:
    """A block whose errors, of the two packages, become PatternErrors; it has no warnings."""
    expected: tuple[type[Exception], ...] = (re.error, RecursionError, OverflowError, MemoryError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that may mean something else one day
            yield
    except (*expected, *kinds) as error:
        raise PatternError(one_line(error) or type(error).__name__) from error


def _refuse_large(pattern: str, size: int) -> None:
    """Raise where the size of one pattern is too large."""
    if size > MOST_SIZE:
        where = _spent_now().where
        raise LoraFxError(
            f"{where}the pattern {one_line(repr(pattern), 120)} has {_power(size)} parts "
            f"with its repeats written out; expected at most {MOST_SIZE}",
            _SIMPLER,
        )


def _power(size: int) -> str:
    """A size in few characters: a product of repeats may have a thousand digits."""
    if size < 10**9:
        return str(size)
    return f"10^{int(math.log10(size))}"


def written_out(pattern: str) -> int:
    """The parts of a pattern with every repeat written out as often as it has to match.

    >>> written_out("abc"), written_out("(ab){30}"), written_out("(a{3}|b){2,99}")
    (3, 90, 12)

    Raises:
        re.error: It is no pattern.
        OverflowError: A repeat of more than `re` counts.
    """
    from re import _parser  # type: ignore[attr-defined] # its tree has no public name

    return _size(_parser.parse(pattern))


def _size(tree: Any) -> int:
    """The parts of what `re` parses a pattern to: pairs of an operation and its operands."""
    total = 0
    for operation, operands in tree:
        name = str(operation)
        if name == "IN":
            total += 1 + sum(_width(*part) for part in operands)
            continue
        size_of_operands = sum(map(_size, _trees(operands)))
        if name.endswith("_REPEAT"):
            least_count = operands[0]
            total += max(1, least_count) * size_of_operands
        else:
            total += 1 + size_of_operands
    return total


def _trees(operands: Any) -> Iterator[Any]:
    """The trees among operands, in lists too."""
    from re import _parser  # type: ignore[attr-defined]

    if isinstance(operands, _parser.SubPattern):
        yield operands
    elif isinstance(operands, (tuple, list)):
        for operand in operands:
            yield from _trees(operand)


def _width(operation: object, operands: Any) -> int:
    """The size of a part of a set.

    `re` goes through a range of letters one by one where case is ignored.
    """
    if str(operation) != "RANGE":
        return 1
    first, last = operands
    n_further: int = last - first
    return 1 + n_further // 256
