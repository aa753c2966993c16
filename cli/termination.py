"""Handles SIGTERM like Ctrl-C, so that unfinished outputs are removed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from lora_fx.errors import Terminated


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Make the first SIGTERM in this block raise Terminated; later ones are ignored.

    This does nothing outside the main thread, where no handler can be set, or if SIGTERM already
    has another handler or is ignored. In a forked process, SIGTERM keeps its default effect.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a fork
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would stop the clean-up
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
