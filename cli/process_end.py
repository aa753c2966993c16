"""End the process of a command without Python's garbage collections at exit.

Python collects garbage three times there, through every object of every library that is imported:
a fifth of the CPU time of `targets`. Frozen objects are in no collection. What has to happen at the
end still does: files are flushed, temporary folders are removed, and other atexit functions run.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import stat

WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
"""The classes that hold back what is written; text comes first, since it writes into the others."""


def end_quickly() -> None:
    """Freeze every object when the process ends, after the atexit functions registered later."""
    atexit.unregister(_freeze)
    atexit.register(_freeze)


def _freeze() -> None:
    if _may_write_a_file():
        _flush_files()
    gc.freeze()


def _may_write_a_file() -> bool:
    """Whether the process has a regular file open for writing, besides the standard streams.

    To look at every object for one takes as long as half a collection.
    """
    try:
        import fcntl

        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except (ImportError, OSError):
        return True  # no such list on this system

    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # that of the list itself is closed
            mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if descriptor > 2 and is_file and mode != os.O_RDONLY:
                return True
    return False


def _flush_files() -> None:
    """Flush open files, such as one that the user's module opened and never closes.

    A collection would close it. `type` asks no object for its class, as isinstance may.
    """
    writers = [x for x in gc.get_objects() if issubclass(type(x), WRITERS)]
    for kind in WRITERS:
        for writer in writers:
            if issubclass(type(writer), kind):
                with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed file
                    writer.flush()
