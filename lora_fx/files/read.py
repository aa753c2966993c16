"""The one gate for what is read: regular files of a bounded size, and names that stay at home.

A path that the user gives is followed wherever it leads. A name that stands in a file (a shard in
an index, the data of an ONNX tensor) or in a folder that is copied whole is another's word: it is
resolved inside that folder, and no link may lead out of it. The Hugging Face cache is the one
exception, since the files of a snapshot there are links to `blobs` of the same repository.

Within a block of `remembering`, whatever is read is remembered, and `atomic` lets no output
take its place. Nor does it give an output its name when an input is another file by then: what was
read before and after that would be a mix of both.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lora_fx.errors import LoraFxError, explain, explained, one_line
from lora_fx.text import Json

MAX_JSON = 32 << 20
"""Largest JSON file, header or index, in bytes; Python's json takes about 12 times that."""

AGAIN = "the file is damaged or cut off: download or write it again"
_TENSORS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_TEMPORARY = re.compile(r"^\..+\.lora_fx_[0-9a-f]{8}\.(tmp|onnx)$")
_LFS = b"version https://git-lfs"
_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip


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


def inode_of(path: Path) -> int | None:
    """The inode that has a name; None for none."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None


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


_trust: ContextVar[bool] = ContextVar("trust", default=False)


@contextlib.contextmanager
def trusting(on: bool = True) -> Iterator[None]:
    """A block in which pickles are read, by torch's unpickler that runs no code, where it is on."""
    token = _trust.set(on or _trust.get())
    try:
        yield
    finally:
        _trust.reset(token)


def trusted() -> bool:
    """True within a block of `trusting`."""
    return _trust.get()


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
            _note(run, path, os.stat(path))


def _note(run: Remembered, path: str | os.PathLike[str], found: os.stat_result) -> None:
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


def open_input(path: str | os.PathLike[str], *, most: int | None = None) -> BufferedReader:
    """A regular file, open for reading.

    Args:
        path: What to open. Links are followed; a pipe or device is not waited for.
        most: The largest size, in bytes; any where None.

    Raises:
        LoraFxError: It is not there, cannot be read, is no regular file, or is larger.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:
        raise LoraFxError(f"{name!r} names no file: {error}", "is the path right?") from error
    except OSError as error:
        if os.path.isdir(path):
            raise LoraFxError(f"{name}: a folder, not a regular file", "name the file") from error
        raise explain(error, f"{name}: cannot be read") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = next((text for test, text in _KINDS.items() if test(found.st_mode)), "no file")
            raise LoraFxError(f"{name}: {kind}, not a regular file", "name the file")
        if most is not None and found.st_size > most:
            raise LoraFxError(
                f"{name}: {found.st_size} bytes; at most {most} are read", "is it the right file?"
            )
        if (run := _run.get()) is not None:
            _note(run, path, found)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """A regular file's content; see open_input. A git-LFS pointer is refused as such."""
    unread = f"{os.fspath(path)}: cannot be read"
    with open_input(path, most=most) as file, explained(unread, itself=True):
        data = file.read()
    refuse_pointer(data, len(data), path)
    return data


def read_text(path: str | os.PathLike[str], *, most: int | None = None) -> str:
    """A regular file's text, which has to be UTF-8; a mark of byte order is left out."""
    data = read_bytes(path, most=most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoraFxError(
            f"{os.fspath(path)}: line {line} is not UTF-8: {error}", "iconv -t UTF-8 converts it"
        ) from error


def refuse_pointer(data: bytes, size: int, path: str | os.PathLike[str]) -> None:
    """Raise where a file's first bytes are those of a git-LFS pointer."""
    if data.startswith(_LFS):
        raise LoraFxError(
            f"{os.fspath(path)}: a git-LFS pointer ({size} bytes), not the file it stands for",
            f"fetch the real files: git -C {Path(path).parent} lfs pull",
        )


def json_value(
    raw: str | bytes, where: str, *, sizes: bool = False, constants: bool = False, hint: str = AGAIN
) -> Any:
    """A JSON value, read strictly: no key twice, no NaN, no half of a surrogate pair.

    A whole number of more than 64 bits is a float, as in other languages: nothing that is counted
    is as large, and no array holds it. More than 300 digits are refused: some of thousands take
    Python's time. A fraction that no float holds, such as 1e999, is infinite, and refused as such.

    Args:
        raw: UTF-8 where it is bytes.
        where: The file, for messages.
        sizes: -0 is refused too, and a mark of byte order: whole numbers are sizes.
        constants: Infinity and NaN are taken, which Python writes and JSON has not.
        hint: Of the error.

    Raises:
        LoraFxError: It is no JSON, or nested too deeply.
    """

    def once(pairs: list[tuple[str, object]]) -> Json:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
            raise ValueError(f"key {one_line(repr(twice), 80)} is there twice")
        return result

    def number(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def integer(digits: str) -> int | float:
        if sizes and digits == "-0":
            raise ValueError("-0 is no size")
        if len(digits) > 300:
            raise ValueError(f"a whole number of {len(digits)} digits")
        whole = int(digits)
        return whole if abs(whole) < 1 << 64 else float(whole)

    def fraction(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{one_line(digits, 40)} is larger than a float holds")
        return value

    try:
        encoding = "utf-8" if sizes else "utf-8-sig"
        plain = raw.decode(encoding) if isinstance(raw, bytes) else raw
        # Python's own way is faster, and right where no number is long.
        long = re.search(r"\d{19}|[eE]\+?\d{3}", plain)
        odd = (sizes and "-0" in plain) or long
        value = json.loads(
            plain,
            object_pairs_hook=once,
            parse_constant=None if constants else number,
            parse_int=integer if odd else None,
            parse_float=fraction if long and not constants else None,
        )
        if "\\u" in plain:  # half a surrogate pair is no text: nothing could print or write it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else one_line(error)
        raise LoraFxError(f"{where}: not valid JSON: {why}", hint) from error
    return value


def json_object(
    raw: str | bytes, where: str, *, sizes: bool = False, constants: bool = False, hint: str = AGAIN
) -> Json:
    """A JSON object; see json_value.

    Raises:
        LoraFxError: It is no JSON, or no object.
    """
    value = json_value(raw, where, sizes=sizes, constants=constants, hint=hint)
    if not isinstance(value, dict):
        raise LoraFxError(f"{where}: a JSON {type(value).__name__}, not an object", hint)
    return value


def read_json(path: str | os.PathLike[str], *, constants: bool = False, hint: str = AGAIN) -> Json:
    """The JSON object of a file of at most MAX_JSON bytes; see json_object."""
    text = read_bytes(path, most=MAX_JSON)
    return json_object(text, os.fspath(path), constants=constants, hint=hint)


# TOML, of which Python's reader is slow, and slower than linear for dotted keys.


MAX_TOML = 1 << 19
"""Largest TOML file, in bytes: 5,000 paths of adapters. Python's tomllib takes a second for it."""
MAX_DOTS = 16
"""Parts of a dotted key; of one of 20,000 parts tomllib takes 18 s and 2 GB."""
_QUOTED = re.compile(
    r"""(?sx) \"{3} (?: \\. | (?!\"{3}). )*+ (?: \"{3} | \Z)
    | '{3} (?: (?!'{3}). )*+ (?: '{3} | \Z)
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    | \# [^\n]*+"""
)
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_DOTS}}}[\w-]")


def read_toml(path: str | os.PathLike[str], hint: str) -> Json:
    """The tables of a TOML file of at most MAX_TOML bytes.

    Args:
        path: The file.
        hint: Of the error, where it is no TOML.

    Raises:
        LoraFxError: It is no TOML, nested too deeply, or holds a whole number of more than the 64
            bits that TOML has.
    """
    text, name = read_text(path, most=MAX_TOML), os.fspath(path)
    if _LONG_KEY.search(_QUOTED.sub("q", text)):
        raise LoraFxError(f"{name}: a dotted key of more than {MAX_DOTS} parts", hint)
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else one_line(error)
        raise LoraFxError(f"{name}: not TOML: {why}", hint) from error
    if (large := next(_too_large(tables), None)) is not None:
        raise LoraFxError(f"{name}: {large} has a whole number of more than 64 bits", hint)
    return tables


def _too_large(value: object, key: str = "it") -> Iterator[str]:
    """The keys whose values hold a whole number of more than 64 bits."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _too_large(part, one_line(repr(name), 80))
    elif isinstance(value, list):
        for part in value:
            yield from _too_large(part, key)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        yield key


# Names from files.


def inside(folder: Path, name: str) -> Path | None:
    """The file that a name from a file stands for; None where that leads out of the folder.

    Args:
        folder: Where the file lies that says the name.
        name: Relative, by `/`.

    Returns:
        Where it lies, without links; it may be missing.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:\0]", name):
        return None
    return within(folder, name)


def within(folder: Path, name: str) -> Path | None:
    """Where the links of a folder's own entry lead; None where that is out of the folder."""
    try:
        home, file = folder.resolve(), (folder / name).resolve()
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError):  # links in a circle; a name that is too long
        return None
    return file if any(root in file.parents for root in (home, *_blobs(folder))) else None


def companion(folder: Path, name: str) -> Path:
    """A file that lies in a folder and goes along with it, where its links stay in the folder.

    Raises:
        LoraFxError: It is a link that leads out.
    """
    if within(folder, name) is None:
        raise LoraFxError(
            f"{folder / name}: a link that leads out of the folder",
            "copy what it points to (cp -L) in its place, or remove it",
        )
    return folder / name


def _blobs(folder: Path) -> Iterator[Path]:
    """Where links of a snapshot of the Hugging Face cache lead: REPOSITORY/blobs."""
    at, real = Path(os.path.abspath(folder)), folder.resolve()
    for snapshot in (at, *at.parents, real, *real.parents):
        blobs = snapshot.parent.parent / "blobs"
        if snapshot.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            yield blobs.resolve()
