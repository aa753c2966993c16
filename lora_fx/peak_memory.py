"""The most memory that a job will take, told before it starts and held against what is free.

An estimate is a sum of named parts, all beyond what the process holds already. Each part has the
bytes that are expected, and the least that are certain. So has their sum:

    least ≤ what is free ≤ expected     the job may fail, which one line says
    what is free < least                the job cannot be done, and the command refuses it

A refusal that is wrong is worse than one that is missed: what is certain is compared with memory
and swap together, and nothing is refused where the free memory is not known, or in Python, where
a caller's process is the caller's own. `--no-memory-check` refuses nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.progress import said
from lora_fx.text import sized

WORTH_TELLING = 500_000_000
"""Bytes below which no line is told: Python and torch alone take as much."""
OVERRIDE = "--no-memory-check starts it all the same"
_refuses: ContextVar[bool] = ContextVar("lora_fx_refuses_over_memory", default=False)


@dataclass(frozen=True)
class MemoryPart:
    """Memory that a job takes for one purpose.

    Attributes:
        name: The purpose.
        expected: Bytes.
        least: The bytes of them that are certain to be needed at the peak.
    """

    name: str
    expected: int
    least: int = 0

    def __str__(self) -> str:
        """Return the name with its size."""
        return f"{self.name} {sized(self.expected)}"


@dataclass(frozen=True)
class PeakMemory:
    """An estimate of the memory that a job takes at its peak, beyond what is taken already.

    Attributes:
        job: The job, as the subject of a sentence.
        parts: What it takes.
        loaded: Bytes of weights that are in memory already.
        detail: What else is worth knowing, as a clause.
    """

    job: str
    parts: tuple[MemoryPart, ...]
    loaded: int = 0
    detail: str = ""

    @property
    def expected(self) -> int:
        """The bytes that are expected."""
        return sum(part.expected for part in self.parts)

    @property
    def least(self) -> int:
        """The bytes that are certain to be needed."""
        return sum(part.least for part in self.parts)

    @property
    def largest(self) -> MemoryPart:
        """The part that takes most."""
        return max(self.parts, key=lambda part: part.expected)

    def told(self, free: FreeMemory | None) -> str:
        """Return the estimate as one line, with its parts, beside what is free."""
        parts = ", ".join(str(part) for part in self.parts if part.expected)
        clauses = [f"memory: {self.job} takes about {sized(self.expected)} ({parts})"]
        if self.loaded:
            clauses[0] += f", beside weights of {sized(self.loaded)}"
        if self.detail:
            clauses.append(self.detail)
        clauses.append("the free memory is not known" if free is None else _available(free))
        return "; ".join(clauses)


@contextlib.contextmanager
def refusing(on: bool = True) -> Iterator[None]:
    """A block in which a job that cannot fit is refused (with `on`), and not only told."""
    token = _refuses.set(on)
    try:
        yield
    finally:
        _refuses.reset(token)


def check_memory(
    peak: PeakMemory, free: FreeMemory | None, ways_out: Callable[[int], Iterable[str]]
) -> None:
    """Tell an estimate if it is worth a line, and refuse or warn of a job that does not fit.

    Args:
        peak: The estimate.
        free: What is free; None where that is not known.
        ways_out: Bytes that are free → what makes the job fit them, one hint each. It is called
            if the job does not fit, and may take a while.

    Raises:
        LoraFxError: What is certain to be needed is more than memory and swap.
    """
    if free is None or peak.expected <= free.memory:
        if peak.expected >= WORTH_TELLING:
            said(peak.told(free))
        return
    said(peak.told(free))
    hints = [*ways_out(free.memory)]
    if peak.least <= free.memory + free.swap:
        advice = "; ".join(hints) or "close other programs"
        said(f"warning: {peak.job} may run out of memory: {advice}")
        return
    if not _refuses.get():
        said(f"warning: {peak.job} will run out of memory, and starts all the same")
        return
    raise LoraFxError(
        f"{peak.job} needs at least {sized(peak.least)} of memory, and {_available(free)}; "
        f"its largest part: {peak.largest}",
        "; or ".join([*hints, OVERRIDE]),
    )


def _available(free: FreeMemory) -> str:
    """Return what is free as a clause."""
    if not free.swap:
        return f"{sized(free.memory)} are free"
    return f"{sized(free.memory)} are free, with {sized(free.swap)} of swap"
