"""The progress lines that train prints about its steps."""

from __future__ import annotations

import time
from collections.abc import Callable

TENTHS = 10
"""Lines of a run, beside those of its first steps."""
EARLY = 4
"""The step of this run after which the time of a step is told. Times begin with the line of the
second: the first step compiles what the others run, and is followed by a validation."""


class StepLines:
    """A printer of the loss, the seconds of a step so far, and the time that is left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._taken = 0
        self._began = 0.0

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Print a line about the first, fourth and last step, and at each tenth of the run.

        Args:
            step: Its number, from 1.
            steps: Those of the run.
            loss: Its loss.
        """
        now = time.monotonic()
        self._taken += 1
        if self._taken == 2:
            self._began = now
        is_tenth = step % max(1, steps // TENTHS) == 0
        if not is_tenth and step != steps and self._taken not in (1, EARLY):
            return
        line = f"step {step}/{steps}: loss {loss:.4f}"
        if self._taken >= EARLY:
            seconds = (now - self._began) / (self._taken - 2)
            left = seconds * (steps - step)
            line += f", {seconds:.2g} s a step"
            if left >= 1:
                line += f", {duration(left)} left"
        self._say(line)


def duration(seconds: float) -> str:
    """Return a time as text, in seconds, minutes or hours.

    >>> [duration(number) for number in (7.4, 100, 5000)]
    ['7 s', '2 min', '1.4 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
