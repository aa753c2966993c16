"""Long work shows itself: which stage of it runs, and how long it took.

Verbs say where they are by `with stage("…")`. Nobody listens unless a caller asks to be told: the
command line, or `progress=` in Python. A stage is told once it has taken a moment, and again at its
end with its seconds; what is over at once is never told.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Listener = Callable[[str], None]
"""Called with a line: `checking 2 of 4 …`, later `checking 2 of 4: 3.1 s`."""
PATIENCE = 1.0
"""Seconds that a stage may take before it is told."""
YOUNG = 20_000
"""New objects between two looks of the collector; Python's own number is 700 or 2,000."""
_listener: ContextVar[Listener | None] = ContextVar("lora_fx_stage", default=None)


@contextlib.contextmanager
def telling(listener: Listener | None) -> Iterator[None]:
    """A block whose stages are told to a listener; None leaves things as they are."""
    if listener is None:
        yield
        return
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A block of work, by a name for people."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    told, start = threading.Event(), time.monotonic()

    def begin() -> None:
        told.set()
        listener(f"{name} …")

    timer = threading.Timer(PATIENCE, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if told.is_set():
            listener(f"{name}: {time.monotonic() - start:.1f} s")


def said(line: str) -> None:
    """Tell a line at once: what a user should know before the work goes on."""
    listener = _listener.get()
    if listener is not None:
        listener(line)


def told(verb: Callable[P, T]) -> Callable[P, T]:
    """A function whose `progress` argument is told its stages."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with telling(kwargs.get("progress")), _collecting_less():  # type: ignore[arg-type]
            return verb(*args, **kwargs)

    return run


_COLLECTOR = threading.Lock()
_running: list[contextlib.ExitStack] = []
"""One for each verb that runs, in any thread; the first has what undoes the change."""
_stayed = [0]
"""Blocks of memory that were in use when a verb began and the collector had looked at them."""


@contextlib.contextmanager
def _collecting_less() -> Iterator[None]:
    """A block in which the garbage collector looks at fewer objects, and less often.

    Programs of some thousand nodes are made of objects that stay, which Python walks again and
    again beside all of torch and of the user's model: an eighth of insert's time at 30 layers.
    """
    with _COLLECTOR:
        _running.append(contextlib.ExitStack())
        if len(_running) == 1:
            _freeze(_running[0])
    try:
        yield
    finally:
        with _COLLECTOR:
            _running.pop().close()


def _freeze(after: contextlib.ExitStack) -> None:
    """Set what is there apart from new objects until `after` is closed.

    That starts the count anew after which Python looks at old objects: where one verb follows
    another it never would. So it does here, once they are a quarter more, which is its own rule.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(YOUNG, before[0]) if before[0] else 0, *before[1:])
    after.callback(gc.set_threshold, *before)
    if gc.get_freeze_count():  # by a caller
        return
    count = sys.getallocatedblocks()  # at once; counting what is frozen takes 20 ms beside torch
    if grown := gc.isenabled() and 4 * count > 5 * (_stayed[0] or count):
        gc.collect()
        count = sys.getallocatedblocks()
    _stayed[0] = count if grown else min(count, _stayed[0] or count)
    gc.freeze()
    after.callback(gc.unfreeze)
