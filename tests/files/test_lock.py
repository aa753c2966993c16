"""Several runs at one output, and runs that are killed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock  # noqa: F401 - imported where there is no flock, it warns
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.files.locks import locked

ROOT = Path(__file__).resolve().parents[2]

# A worker: for each line, an output and its own name, tries to write it and says how it went.
WORKER = """
import errno, fcntl, random, sys, time
from pathlib import Path
from lora_fx.files.atomic import replacing
from lora_fx.errors import LoraFxError

def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks")

if sys.argv[1] == "no flock":
    fcntl.flock = refuse
for line in sys.stdin:
    path, name = line.split()
    time.sleep(random.random() * 0.01)
    try:
        with replacing(path) as out:
            out.mkdir()
            for i in range(3):
                (out / str(i)).write_text(name)
                time.sleep(random.random() * 0.003)
        print("won", flush=True)
    except LoraFxError as e:
        print(e.exit_code, e.message, flush=True)
"""

# A writer that replaces its output by the next generation until it is killed.
WRITER = """
import errno, fcntl, sys
from lora_fx.files import atomic

def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks")

if sys.argv[2] == "two renames":
    atomic._exchange = lambda *_: False
if sys.argv[2] == "no flock":
    fcntl.flock = refuse
n = 0
while True:
    with atomic.replacing(sys.argv[1], force=True) as out:
        out.mkdir()
        for i in range(4):
            (out / str(i)).write_bytes(n.to_bytes(4, "little") * 5000)
    n += 1
    if n == 1:
        print("ready", flush=True)
"""

# Dies at its n-th I/O call, for every n, in a forked child; the parent looks at what is left.
EVERY_CALL = """
import os, shutil, signal, sys
from pathlib import Path
from lora_fx.files import atomic
from tests.files.test_atomic import Scene
from tests.faults import Faults

folder, kind, before, swap = sys.argv[1:]
if swap == "two renames":
    atomic._exchange = lambda *_: False
scene = Scene(Path(folder), kind, before)
killed = 0
for at in range(1, 1000):
    scene.prepare()
    child = os.fork()
    if not child:
        with Faults(at, signal.SIGKILL):
            scene.work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
    if swap != "two renames":
        scene.check(clean=False)
    try:
        with atomic.replacing(scene.out, force=True):  # the next run mends, whether it ends well
            scene.check(clean=False)
            raise KeyError
    except KeyError:
        scene.check()
print(killed)
"""


def start(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(params=["flock", "no flock"])
def workers(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    made = [start(WORKER, request.param) for _ in range(8)]
    yield made
    for worker in made:
        worker.communicate(timeout=60)
        assert worker.returncode == 0


def test_one_of_eight_runs_wins(tmp_path: Path, workers: list[Any]) -> None:
    answers: set[str] = set()
    for turn in range(20):
        out = tmp_path / f"out{turn}"
        for i, worker in enumerate(workers):
            worker.stdin.write(f"{out} worker{i}\n")
            worker.stdin.flush()
        said = [worker.stdout.readline().strip() for worker in workers]
        winners = [i for i, text in enumerate(said) if text == "won"]
        assert len(winners) == 1, said
        assert {(out / str(i)).read_text() for i in range(3)} == {f"worker{winners[0]}"}
        refusals = {text.replace(str(out), "OUT") for text in said if text != "won"}
        assert refusals <= {"2 another run is writing OUT", "2 OUT already exists"}
        answers |= refusals
    assert "2 another run is writing OUT" in answers, "no two of the runs met"
    assert sorted(os.listdir(tmp_path)) == sorted(f"out{i}" for i in range(20))


@pytest.mark.parametrize("how", ["exchange", "two renames", "no flock"])
def test_killed_at_any_time(tmp_path: Path, how: str) -> None:
    moment, left = random.Random(0), 0
    out = tmp_path / "out"
    for _ in range(8):
        writer = start(WRITER, str(out), how)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(moment.random() * 0.05)
        writer.kill()
        writer.communicate()
        left += len(os.listdir(tmp_path)) > 1
        assert how == "two renames" or out.exists()
        # The next run puts back what was being replaced and removes the rest, come what may.
        with pytest.raises(KeyError), replacing(out, force=True):
            raise KeyError
        assert os.listdir(tmp_path) == ["out"]
        contents = {(out / str(i)).read_bytes() for i in range(4)}
        assert len(contents) == 1 and len(contents.pop()) == 20000
    assert left, "no kill came in time"


@pytest.mark.parametrize(
    ("kind", "before", "swap"),
    [("file", "none", ""), ("folder", "none", ""), ("file", "file", ""),
     ("folder", "folder", ""), ("folder", "folder", "two renames")],
)  # fmt: skip
def test_killed_at_every_call(memory: Path, kind: str, before: str, swap: str) -> None:
    run = start(EVERY_CALL, str(memory / "s"), kind, before, swap)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and int(said) > 20


# --- the lock ------------------------------------------------------------------------------------


def test_a_second_run_fails_at_once(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text('{"format": 1, "version": 1}')
        begin = time.monotonic()
        with pytest.raises(LoraFxError) as caught, replacing(tmp_path / "x", force=True):
            pytest.fail("entered")
        assert time.monotonic() - begin < 1
        assert caught.value.message == f"another run is writing {tmp_path / 'x'}"
        assert caught.value.exit_code == 2 and "wait" in caught.value.hint
        with replacing(tmp_path / "y") as other:
            other.write_text("another output")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_lock_whose_file_lost_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock the holder may unlink the file: then the lock is on nothing."""
    real, unlinked = fcntl.flock, list[int]()

    def late(fd: int, how: int) -> None:
        if not unlinked:
            os.unlink(tmp_path / ".x.lock")
            unlinked.append(fd)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "x"):
        assert (tmp_path / ".x.lock").exists()
        with pytest.raises(LoraFxError, match="another run"), locked(tmp_path / "x"):
            pytest.fail("two hold it")


def _unlockable(code: int) -> Callable[[pytest.MonkeyPatch], None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return lambda m: m.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("remove", [_unlockable(errno.ENOLCK), _unlockable(errno.EOPNOTSUPP)])
def test_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Callable[[pytest.MonkeyPatch], None]
) -> None:
    file = tmp_path / ".x.lock"
    with monkeypatch.context() as m:
        remove(m)
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text('{"format": 1, "version": 1}')
            content = file.read_text()
            pid, host, *_ = content.split()
            me = f"{pid} {host}"
            assert int(pid) == os.getpid() and host.startswith(os.uname().nodename)
            with pytest.raises(LoraFxError, match="another run") as caught, locked(tmp_path / "x"):
                pytest.fail("entered")
            assert me in caught.value.hint and str(file) in caught.value.hint
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                              capture_output=True, text=True).stdout.strip()  # fmt: skip
        for text, free in [(f"{dead}\n{host}\n", True), (f"{dead}\nelsewhere\n", False),
                           (content, False), ("", False), ("garbage", False)]:  # fmt: skip
            file.write_text(text)
            if free:
                with replacing(tmp_path / "x", force=True) as temporary:
                    temporary.write_text('{"format": 1, "version": 2}')
                assert os.listdir(tmp_path) == ["x"]
                continue
            with pytest.raises(LoraFxError, match="another run") as caught, locked(tmp_path / "x"):
                pytest.fail("entered")
            assert file.exists() and str(file) in caught.value.hint
    file.write_text(content)  # with flock again: who wrote it lives, and could not use flock
    with pytest.raises(LoraFxError, match="another run"), locked(tmp_path / "x"):
        pytest.fail("entered")
    file.write_text("")
    with locked(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_a_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").mkdir()
    with pytest.raises(LoraFxError, match="x: is a folder"), replacing(tmp_path / "x"):
        pytest.fail("entered")
