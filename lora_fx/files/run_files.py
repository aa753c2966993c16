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

_TENSOR_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_TEMPORARY = re.compile(r"^\..+\.lora_fx_[0-9a-f]{8}\.(tmp|onnx)$")


class FileState(NamedTuple):
    """Inode, size and time of writing: they tell that a file is another, or was written to."""

    inode: int
    size: int
    time: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state of a file whose status was read; the time is in nanoseconds."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass
class Remembered:
    """The files that a run has read and written.

    Attributes:
        paths: Absolute path → the name that the user knows it by.
        inodes: (device, inode) → the same.
        outputs: Output → the inode that had its name before, None for none.
        states: Absolute path of a file → its state when the run first looked at it.
        tensor_files: Absolute path of a folder → the names of its tensor files at that time.
        scratch: Temporary folders of the run; nothing in them is an input.
    """

    paths: dict[Path, str] = field(default_factory=dict)
    inodes: dict[tuple[int, int], str] = field(default_factory=dict)
    outputs: dict[Path, int | None] = field(default_factory=dict)
    states: dict[Path, FileState] = field(default_factory=dict)
    tensor_files: dict[Path, frozenset[str]] = field(default_factory=dict)
    scratch: list[Path] = field(default_factory=list)

    def is_input(self, path: Path) -> bool:
        """False for files that the run itself writes, and for its temporary folders."""
        if any(_TEMPORARY.search(name) for name in path.parts):
            return False
        places = {path, *path.parents}
        outputs = {Path(os.path.abspath(output)) for output in self.outputs}
        return places.isdisjoint(outputs) and places.isdisjoint(self.scratch)

    @property
    def written(self) -> list[Path]:
        """The outputs that have their name."""
        return [
            output
            for output, inode_before in self.outputs.items()
            if inode_of(output) not in (None, inode_before)
        ]


_run: ContextVar[Remembered | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[Remembered]:
    """A run: what is read within is remembered until its end. One within another is part of it."""
    outer = _run.get()
    if outer is not None:
        yield outer
        return
    run = Remembered()
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


def run_of_files() -> Remembered | None:
    """The files of the run that goes on; None outside of one."""
    return _run.get()


def remember(*paths: str | os.PathLike[str]) -> None:
    """Remember files and folders as inputs of this run, if there is a run.

    A path that names nothing is passed over. `open_input` remembers the files that it opens: this
    is for those that a library opens by their names.
    """
    run = _run.get()
    if run is None:
        return
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            note_input(run, path, os.stat(path))


def note_input(run: Remembered, path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Take a file or folder, whose status was read, for an input of a run."""
    absolute = Path(os.path.abspath(path))
    run.paths[absolute] = os.fspath(path)
    run.inodes[status.st_dev, status.st_ino] = os.fspath(path)
    if stat.S_ISREG(status.st_mode):
        run.states.setdefault(absolute, FileState.of(status))
    elif stat.S_ISDIR(status.st_mode) and absolute not in run.tensor_files:
        run.tensor_files[absolute] = _tensor_files(absolute)


def _tensor_files(folder: Path) -> frozenset[str]:
    """The names of a folder's files that decide which tensors a reader finds."""
    try:
        names = os.listdir(folder)
    except OSError:
        return frozenset()
    return frozenset(
        name for name in names if name.endswith(_TENSOR_FILES) and not name.startswith(".")
    )


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
    for path, state in run.states.items():
        if not run.is_input(path):
            continue
        difference = _difference(path, state)
        if difference:
            raise _changed(run.paths.get(path, str(path)), difference)

    for folder, names in run.tensor_files.items():
        present = _tensor_files(folder)
        added = sorted(present - names)
        if added and run.is_input(folder / added[0]):
            raise _changed(run.paths.get(folder, str(folder)), f"{added[0]!r} was added")
        removed = sorted(names - present)
        if removed and run.is_input(folder / removed[0]):
            raise _changed(run.paths.get(folder, str(folder)), f"{removed[0]!r} was removed")


@contextlib.contextmanager
def naming_changes() -> Iterator[None]:
    """A block that computes with the numbers of inputs.

    Raises:
        LoraFxError: The block raised one, and an input has changed since. Its numbers may mix both
            versions, so the error names the change instead.
    """
    try:
        yield
    except LoraFxError:
        check_unchanged()
        raise


def _difference(path: Path, before: FileState) -> str:
    """The difference of a file from its earlier state, for people; empty if there is none."""
    try:
        now = FileState.of(os.stat(path))
    except OSError:
        return "it was removed"
    if now.inode != before.inode:
        return "another file has its name now"
    if now.size != before.size:
        return f"it had {before.size} bytes and now has {now.size}"
    if now.time != before.time:
        return "it was written to"
    return ""


def _changed(name: str, what: str) -> LoraFxError:
    """The error of an input that another program changed."""
    return LoraFxError(
        f"{name} changed while it was read: {what}; the output would be a mix of both",
        "nothing was written; run this again when no other program writes the input",
    )


def inputs_are_in_memory() -> None:
    """Allow the inputs of this run to change from now on, because none is read again."""
    run = _run.get()
    if run is not None:
        run.states.clear()
        run.tensor_files.clear()


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder; what is read from it is no input of the run."""
    with tempfile.TemporaryDirectory() as folder:
        run = _run.get()
        if run is not None:
            run.scratch.append(Path(os.path.abspath(folder)))
        yield folder
