"""Blocks in which libraries say nothing: no warning, no log below a level, nothing printed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping


@contextlib.contextmanager
def silenced(
    redirect: Callable[[io.StringIO], contextlib.AbstractContextManager[object]] | None = None,
    levels: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """A block without warnings: one that is an error is none there.

    Args:
        redirect: contextlib.redirect_stdout or redirect_stderr, for what is printed there.
        levels: Name of a logger → the least level that it writes.
    """
    loggers = {logging.getLogger(name): level for name, level in (levels or {}).items()}
    before = [(logger, logger.level) for logger in loggers]
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), (redirect or contextlib.nullcontext)(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
