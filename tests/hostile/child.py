"""One command of the command line in a child of this process, with limits on time and memory.

The parent imports the libraries once and forks, so that a command costs milliseconds and not the
seconds that torch takes to be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.faults import Faults

SECONDS = 10.0
WAITS = 20
"""Wall time over CPU time, after which a command is taken to wait for something."""
MEGABYTES = 1024
"""What a command may take for a hostile file, beyond what the libraries have."""
LIBRARIES = (
    "lora_fx.fx.load.models", "lora_fx.onnx.session", "lora_fx.passes.verbs.adapt",
    "lora_fx.passes.verbs.export", "lora_fx.passes.verbs.merge", "lora_fx.checkpoint.merge",
    "lora_fx.checkpoint.verify", "lora_fx.formats.io", "lora_fx.onnx.load",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code; minus the signal's number where one ended it.
        out: Stdout.
        err: Stderr.
        seconds: Of wall time.
        megabytes: Resident at most, beyond what the parent had.
        hung: True where it was killed for its CPU time, or its wall time.
        calls: Calls of the system that were counted, where they were (see faults).
        cpu: Seconds of processor time.
    """

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float
    hung: bool = False
    calls: int = 0
    cpu: float = 0.0

    @property
    def raw(self) -> bool:
        """True where an exception reached the user, or the process died."""
        told = "report this with the output of -v" in self.err or "Traceback" in self.err
        return self.hung or self.code not in (0, 1, 2) or told

    @property
    def refused(self) -> bool:
        """True for exit 2 with one line of error and one of hint."""
        lines = [x for x in self.err.splitlines() if x.startswith(("Error: ", "Hint: "))]
        return self.code == 2 and [x.split(":")[0] for x in lines] == ["Error", "Hint"]


def tell(rows: Iterable[tuple[str, ...]], **counts: object) -> NoReturn:
    """Print a line for each row that failed, then one JSON object of counts, and exit.

    The last row is ("counts", JSON of how often each end came).
    """
    failed: Counter[str] = Counter()
    for row in rows:
        if row[0] == "counts":
            print(json.dumps({**counts, "ended": json.loads(row[1]), "failed": failed}))
        else:
            failed[row[0]] += 1
            print("\t".join(row), flush=True)
    sys.exit(1 if failed else 0)


def prepare() -> None:
    """Import what commands import, so that every fork has it."""
    for name in (*LIBRARIES, *(f"lora_fx.cli.{p.stem}" for p in _commands())):
        importlib.import_module(name)


def _commands() -> list[Path]:
    import lora_fx.cli

    (folder,) = lora_fx.cli.__path__
    return sorted(p for p in Path(folder).glob("*.py") if not p.name.startswith("_"))


def command(
    argv: Sequence[str],
    folder: Path,
    *,
    seconds: float = SECONDS,
    hard: float = 6.0,
    stop: tuple[float, signal.Signals] | None = None,
    faults: Faults | None = None,
    terminal: bool = False,
) -> Outcome:
    """Run `lora-fx ARGV` in a folder.

    Args:
        argv: What follows lora-fx.
        folder: The working folder.
        seconds: Of CPU time, after which it is killed; see WAITS.
        hard: GiB of address space that it may add; what needs more gets a MemoryError.
        stop: (seconds, signal): what it is sent, and when.
        faults: What its calls of the system meet with.
        terminal: Its output goes to a pseudo-terminal, and all of it is `out`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        screen, tty = os.openpty() if terminal else (-1, -1)
        ready, told_ready = os.pipe()
        child = os.fork()
        if not child:  # which never comes back
            to = (tty, tty) if terminal else (out.fileno(), err.fileno())
            _run(argv, folder, *to, (seconds, hard), told_ready, faults)
        os.close(told_ready)
        os.read(ready, 1)  # libraries do things of their own as they are forked
        start = time.monotonic()
        if stop is not None:
            time.sleep(max(0.0, start + stop[0] - time.monotonic()))
            os.kill(child, stop[1])  # a zombie until it is waited for: the number is still its own
        hung, status, usage = _wait(child, start + WAITS * seconds)
        code = os.waitstatus_to_exitcode(status)
        hung = hung or code == -signal.SIGXCPU
        calls = int(os.read(ready, 20) or 0)
        os.close(ready)
        out.seek(0)
        err.seek(0)
        told = [f.read().decode("utf-8", "replace") for f in (out, err)]
        if terminal:
            os.close(tty)
            told = [_shown(screen), ""]
        grown = max(0.0, usage.ru_maxrss / 1024 - before)
        cpu = usage.ru_utime + usage.ru_stime
        return Outcome(code, told[0], told[1], time.monotonic() - start, grown, hung, calls, cpu)


def _shown(screen: int) -> str:
    """What a terminal was told, at most what its buffer holds."""
    parts = []
    with contextlib.suppress(OSError):  # its end
        while part := os.read(screen, 1 << 16):
            parts.append(part)
    os.close(screen)
    return b"".join(parts).decode("utf-8", "replace")


def _wait(child: int, end: float) -> tuple[bool, int, resource.struct_rusage]:
    pause, hung = 0.002, False
    while True:
        done, status, usage = os.wait4(child, 0 if hung else os.WNOHANG)
        if done:
            return hung, status, usage
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            hung = True
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)


def _run(
    argv: Sequence[str],
    folder: Path,
    out: int,
    err: int,
    most: tuple[float, float],
    ready: int,
    faults: Faults | None,
) -> None:
    """The child: it never returns."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        seconds, size = math.ceil(most[0]), used + int(most[1] * 2**30)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        warnings.simplefilter("ignore")
        from lora_fx.cli import main

        os.write(ready, b"1")
        try:
            with faults or contextlib.nullcontext():
                main(list(argv))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        os.write(ready, str(len(faults.calls)).encode() if faults else b"")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
