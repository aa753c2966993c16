"""The files that a run has read and written.

Within a block of `remembering`, whatever is read is remembered, and `atomic` lets no output
take its place. Nor does it give an output its name when an input is another file by then: what was
read before and after that would be a mix of both.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_fx.errors import LoraFxError
from lora_fx.files.entries import inode_of

_TENSORS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


_TEMPORARY = re.compile(r"^\..+\.lora_fx_[0-9a-f]{8}\.(tmp|onnx)$")


class FileState(NamedTuple):
    """What tells that a file is another one, or was written to."""

    inode: int
    size: int
    time: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """The state that a look at a file found; the time is in nanoseconds."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass
class Remembered:
    """What a run has read and written.

    Attributes:
        paths: Absolute path → the name that the user knows it by.
        inodes: (device, inode) → the same.
        outputs: Output → the inode that had its name before.
        states: Absolute path of a file → its state when the run first looked at it.
        tensor_files: Absolute path of a folder → the names of its tensor files at that time.
        scratch: Temporary folders of the run, of which nothing is an input.
    """

    paths: dict[Path, str] = field(default_factory=dict)
    inodes: dict[tuple[int, int], str] = field(default_factory=dict)
    outputs: dict[Path, int | None] = field(default_factory=dict)
    states: dict[Path, FileState] = field(default_factory=dict)
    tensor_files: dict[Path, frozenset[str]] = field(default_factory=dict)
    scratch: list[Path] = field(default_factory=list)

    def is_input(self, path: Path) -> bool:
        """False for what the run itself writes, and for what lies in its temporary folders."""
        around = {path, *path.parents}
        written = {Path(os.path.abspath(output)) for output in self.outputs}
        temporary = any(_TEMPORARY.search(part) for part in path.parts)
        return not temporary and around.isdisjoint(written) and around.isdisjoint(self.scratch)

    @property
    def written(self) -> list[Path]:
        """The outputs that have their name."""
        return [p for p, before in self.outputs.items() if inode_of(p) not in (None, before)]


_run: ContextVar[Remembered | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[Remembered]:
    """A run: what is read within is remembered until its end. One within another is part of it."""
    now = _run.get()
    if now is not None:
        yield now
        return
    run = Remembered()
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


def run_of_files() -> Remembered | None:
    """What the run that goes on has read and written; None outside of one."""
    return _run.get()


def remember(*paths: str | os.PathLike[str]) -> None:
    """Take files and folders for inputs of this run, where there is one; what is not there is not.

    A file is remembered by itself wherever it is opened here: this is for those that a library
    opens by their names.
    """
    run = _run.get()
    if run is None:
        return
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            note_input(run, path, os.stat(path))


def note_input(run: Remembered, path: str | os.PathLike[str], found: os.stat_result) -> None:
    """Take a file or folder for an input of a run."""
    place = Path(os.path.abspath(path))
    run.paths[place] = os.fspath(path)
    run.inodes[found.st_dev, found.st_ino] = os.fspath(path)
    if stat.S_ISREG(found.st_mode):
        run.states.setdefault(place, FileState.of(found))
    elif stat.S_ISDIR(found.st_mode) and place not in run.tensor_files:
        run.tensor_files[place] = _tensor_files(place)


def _tensor_files(folder: Path) -> frozenset[str]:
    """The names of a folder's files by which a reader knows its tensors."""
    try:
        names = os.listdir(folder)
    except OSError:
        return frozenset()
    return frozenset(n for n in names if n.endswith(_TENSORS) and not n.startswith("."))


def check_unchanged() -> None:
    """Raise where an input of the run that goes on is not the file that it was at first.

    Its size, its time of writing and its inode are compared, and of a folder the names of its
    tensor files. A file that was only touched counts as changed: nothing else tells numbers that
    were written over in place.

    Raises:
        LoraFxError: Names the file, and what it was and is.
    """
    run = _run.get()
    if run is None:
        return
    for path, before in run.states.items():
        if run.is_input(path) and (said := _difference(path, before)):
            raise _changed(run.paths.get(path, str(path)), said)
    for folder, names in run.tensor_files.items():
        now = _tensor_files(folder)
        new, gone = sorted(now - names), sorted(names - now)
        if new and run.is_input(folder / new[0]):
            raise _changed(run.paths.get(folder, str(folder)), f"{new[0]!r} appeared in it")
        if gone and run.is_input(folder / gone[0]):
            raise _changed(run.paths.get(folder, str(folder)), f"{gone[0]!r} is gone")


@contextlib.contextmanager
def naming_changes() -> Iterator[None]:
    """A block that computes with the numbers of inputs.

    Raises:
        LoraFxError: The block raised one, and an input is another file by now: its numbers may have
            been of both, so the change is named and not what was wrong with them.
    """
    try:
        yield
    except LoraFxError:
        check_unchanged()
        raise


def _difference(path: Path, before: FileState) -> str:
    """What has become of a file, for people; empty where it is as it was."""
    try:
        now = FileState.of(os.stat(path))
    except OSError:
        return "it is gone"
    if now.inode != before.inode:
        return "another file has its name"
    if now.size != before.size:
        return f"it had {before.size} bytes, and has {now.size}"
    return "it was written to" if now.time != before.time else ""


def _changed(name: str, what: str) -> LoraFxError:
    return LoraFxError(
        f"{name} changed while it was read: {what}; the output would be a mix of both",
        "nothing was written: run this again when no other program writes the input",
    )


def inputs_are_in_memory() -> None:
    """Let the inputs of this run change from here on: nothing more is read of them."""
    if (run := _run.get()) is not None:
        run.states.clear()
        run.tensor_files.clear()


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder; what is read from it is no input of the run."""
    with tempfile.TemporaryDirectory() as folder:
        if (run := _run.get()) is not None:
            run.scratch.append(Path(os.path.abspath(folder)))
        yield folder
