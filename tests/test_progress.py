"""Long work shows itself: what is told, when, and how a terminal and a pipe see it."""

from __future__ import annotations

import gc
import inspect
import os
import pty
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import progress
from lora_fx.cli.group import group
from lora_fx.cli.output import _Lines
from lora_fx.cli.run import main
from lora_fx.progress import stage, telling, told

Told = Callable[[str], None]


class AtOnce(threading.Timer):
    """A timer that does not wait; a thread might come too late for a stage of .01 s."""

    def start(self) -> None:
        self.function()


RUN = f"""
import threading

{inspect.getsource(AtOnce)}

threading.Timer = AtOnce
from lora_fx.cli import main

main()
"""
"""A command whose stages are all told."""


def named(lines: list[str]) -> list[str]:
    """The lines without their seconds."""
    return [line.rpartition(": ")[0] or line for line in lines]


def test_a_stage_is_told_once_it_takes_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    lines: list[str] = []
    with telling(lines.append):
        with stage("outer"):
            with stage("at once"):
                pass
            with stage("inner"):
                time.sleep(0.2)
        with stage("after"):
            pass
    assert named(lines)[-2:] == ["inner", "outer"]
    assert sorted(named(lines)) == ["inner", "inner …", "outer", "outer …"]
    with stage("nobody listens"):
        time.sleep(0.1)
    assert len(lines) == 4


def test_a_stage_that_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Timer", AtOnce)
    lines: list[str] = []
    with pytest.raises(ValueError, match="no"), telling(lines.append), stage("work"):
        raise ValueError("no")
    assert named(lines) == ["work …", "work"]


@pytest.mark.parametrize("verb", ["insert", "attach", "fold", "export"])
def test_python_is_told_by_progress(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "Timer", AtOnce)
    lines: list[str] = []
    model, x = nn.Sequential(nn.Linear(5, 4)).eval(), torch.randn(2, 5)
    adapter = lora_fx.insert(model, (x,), rank=2).adapter()
    if verb == "export":
        lora_fx.export(model, tmp_path / "m.onnx", (x,), provider="cpu", progress=lines.append)
        wanted = {"capturing, eval mode", "translating to ONNX"}
    elif verb == "fold":
        lora_fx.fold(model, (x,), adapter=adapter, progress=lines.append)
        wanted = {"capturing, eval mode"}
    else:
        getattr(lora_fx, verb)(nn.Sequential(model), (x,), rank=2, progress=lines.append)
        wanted = {"capturing, eval mode"}
    assert wanted <= set(named(lines))
    before = len(lines)
    lora_fx.find(model, (x,))
    assert len(lines) == before


def test_a_verb_keeps_its_name_and_its_result() -> None:
    @told
    def verb(x: int, *, progress: Told | None = None) -> int:
        """Its words."""
        return x + 1

    assert (verb(2), verb.__name__, verb.__doc__) == (3, "verb", "Its words.")


@pytest.fixture
def collector() -> Iterator[None]:
    """Python's own: that of the tests looks at less."""
    before = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)
    gc.freeze()


@pytest.mark.usefixtures("collector")
def test_verbs_in_threads_leave_the_collector_as_it_was() -> None:
    """The one that began first ends first: the other may not put back what it found."""
    first, second = threading.Event(), threading.Event()

    @told
    def verb(begun: threading.Event, end: threading.Event) -> None:
        begun.set()
        assert end.wait(60)

    before = gc.get_threshold()
    ends = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=verb, args=a) for a in zip((first, second), ends, strict=True)
    ]
    for begun, thread in zip((first, second), threads, strict=True):
        thread.start()
        assert begun.wait(60)
    assert gc.get_threshold()[0] >= progress.YOUNG
    for end, thread in zip(ends, threads, strict=True):
        end.set()
        thread.join()
    assert gc.get_threshold() == before


@pytest.mark.usefixtures("collector")
def test_a_whole_command_looks_for_garbage_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports, and a training loop behind them, are no part of a verb."""
    before = gc.get_threshold()
    seen: list[int] = []

    def command(*_: object, **__: object) -> None:
        seen.append(gc.get_threshold()[0])

    monkeypatch.setattr(group, "main", command)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert seen == [progress.YOUNG]
    assert gc.get_threshold() == before


class Circle:
    """Garbage that the collector alone finds, with things it holds."""

    def __init__(self) -> None:
        self.own, self.held = self, [[] for _ in range(20_000)]  # type: ignore[var-annotated]


@pytest.mark.usefixtures("collector")
def test_garbage_between_verbs_is_collected() -> None:
    """A loop of verbs does not put off what Python does between them."""

    @told
    def verb() -> None:
        pass

    gc.collect()
    gc.freeze()  # other tests' objects are not what is collected 40 times
    verb()
    left = []
    for _ in range(40):
        left.append(weakref.ref(Circle()))
        verb()
    assert sum(ref() is not None for ref in left) < 35


def test_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _Lines()
    for line in ("a …", "a: 1.5 s", "b …", "c …", "c: 2.0 s", "b: 3.0 s", "d: 4.0 s", "e …"):
        lines(line)
    lines.end()
    lines.end()
    assert capsys.readouterr().err == "a … 1.5 s\nb …\nc … 2.0 s\nb: 3.0 s\nd: 4.0 s\ne …\n"


def command(tmp_path: Path, *options: str) -> list[str]:
    adapter = lora_fx.insert(nn.Linear(5, 4).eval(), (torch.randn(2, 5),), rank=2).adapter()
    lora_fx.save_adapter(adapter, tmp_path / "a", force=True)
    given = ("convert", str(tmp_path / "a"), "-o", str(tmp_path / "b"), *options)
    return [sys.executable, "-c", RUN, *given]


def test_a_command_is_told_when_piped_without_control_characters(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    assert done.stderr.startswith("convert …")
    assert "\nconvert: " in done.stderr
    assert all(c.isprintable() or c == "\n" for c in done.stderr)
    quiet = subprocess.run(command(tmp_path, "--force", "-q"), capture_output=True, check=True)
    assert quiet.stderr == b""
    other = {**os.environ, "RANK": "1"}  # of several processes, the second
    told = subprocess.run(command(tmp_path, "--force"), capture_output=True, check=True, env=other)
    assert told.stderr.startswith(b"note: PEFT") and b"convert" not in told.stderr


def test_a_terminal_sees_the_same(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(command(tmp_path), stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert seen.startswith("convert …")
    assert "convert: " in seen
    assert done.stdout
