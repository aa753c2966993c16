"""Progress reports: the stage that long work is in, and the time of each stage.

Verbs say where they are by `with stage("…")`. Nobody listens unless a caller asks to be told: the
command line, or `progress=` in Python. A stage is told once it has taken a moment, and again at its
end with its seconds; a stage that is over at once is never told.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Listener = Callable[[str], None]
"""A function that is called with a line: `checking 2 of 4 …`, later `checking 2 of 4: 3.1 s`."""
PATIENCE = 1.0
"""The seconds after which a running stage is reported."""
YOUNG = 20_000
"""The number of new objects between two garbage collections; Python's default: 700 or 2,000."""
_listener: ContextVar[Listener | None] = ContextVar("lora_fx_stage", default=None)


@contextlib.contextmanager
def telling(listener: Listener | None) -> Iterator[None]:
    """A block whose stages are reported to a listener; None keeps the current listener."""
    if listener is None:
        listener = _listener.get()
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A block of work that is reported as a stage, by a name for people."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    was_told = threading.Event()
    start = time.monotonic()

    def begin() -> None:
        was_told.set()
        listener(f"{name} …")

    timer = threading.Timer(PATIENCE, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if was_told.is_set():
            listener(f"{name}: {time.monotonic() - start:.1f} s")


def said(line: str) -> None:
    """Report a line immediately, for a user to read before the work continues."""
    listener = _listener.get()
    if listener is not None:
        listener(line)


def told(verb: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that its `progress` argument receives reports of its stages."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with telling(kwargs.get("progress")), collecting_less():  # type: ignore[arg-type]
            return verb(*args, **kwargs)

    return run


_COLLECTOR = threading.Lock()
_thresholds: list[tuple[int, int, int]] = []
"""The collector's thresholds at the start of each running call; the first are the user's."""


@contextlib.contextmanager
def collecting_less() -> Iterator[None]:
    """A block in which Python's garbage collector runs less often: a verb, or a whole command.

    Programs of some thousand nodes are made of objects that stay, which Python walks again and
    again beside all of torch and of the user's model: an eighth of insert's time at 30 layers. The
    imports of a command are such objects too: a seventh of its time before a first training step.
    """
    with _COLLECTOR:
        thresholds = gc.get_threshold()
        _thresholds.append(thresholds)
        young, *older = thresholds
        if len(_thresholds) == 1 and young:  # not where a user has turned it off
            gc.set_threshold(max(YOUNG, young), *older)
    try:
        yield
    finally:
        with _COLLECTOR:
            thresholds = _thresholds.pop()
            if not _thresholds:
                gc.set_threshold(*thresholds)
