"""Writing that leaves nothing behind: a lock, a temporary sibling, fsync, rename.

Beside a target NAME lie, while it is written, `.NAME.lock` and the folder
`.NAME.lora_fx_XXXXXXXX.tmp` with what is being written. A killed run leaves the folder; the next
one removes it. Everything here has a way without the calls that a platform or a file system lacks.
An input of the run, and what is somebody's work, are never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

from lora_fx.errors import LoraFxError, explain, explained, stamp
from lora_fx.files.adapter_files import adapter_files
from lora_fx.files.read import (
    MAX_JSON,
    check_unchanged,
    inode_of,
    json_object,
    open_input,
    run_of_files,
)
from lora_fx.text import human, some

_OLD, _NEW = "replaced", "new"
BUSY = "another run is writing"
_ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    own: bool = False,
    listed: bool = True,
    beside: Beside | None = None,
    parts: Beside | None = None,
) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    The block may make a file or a folder of it. Files get the mode 0666 & ~umask and folders
    0777 & ~umask, however they were made, but for copies (see copy_file), which nobody reads who
    could not read the original; links, and files with other names, stay as they are.
    On any error, Ctrl-C included, what was written is removed and `path` is as it was; only when
    the very last step fails, the fsync of the parent, the whole output stands, and the exit code
    of the error is 1. One process at a
    time writes a path. What a killed one left is removed first.

    Args:
        path: The output.
        force: Replace what lora-fx lets be replaced.
        own: `path` is this run's own state, which it may have read.
        listed: A folder gets the list of its files that makes it lora-fx's own.
        beside: The outputs that this one belongs to.
        parts: The outputs that belong to this one; it is left when this one has its name or not.

    Raises:
        LoraFxError: `path` exists and force is not given, or does not count; its parent does not
            exist, another run is writing it, the disk is full, or the file system refuses.
    """
    target = Path(path)
    with explained(target, itself=True):
        check_output(target, force=force, own=own)
        if (run := run_of_files()) is not None:
            run.outputs.setdefault(target, inode_of(target))
        lock = contextlib.ExitStack()
        lock.enter_context(locked(target))
    with lock, contextlib.ExitStack() as stack:
        token = secrets.token_hex(4) if beside is None else beside.token(target)
        holder = target.with_name(f".{target.name}.lora_fx_{token}.tmp")
        temporary = holder / target.name
        (beside or stack).callback(_discard, holder, target)  # what it replaced may come back
        if parts is not None:  # left before the folder goes by which a later run finds them
            parts.target, parts.temporary = target, temporary
            stack.enter_context(parts)
        with explained(target, itself=True):
            _clear_stale(target)
            check_output(target, force=force, own=own)
            holder.mkdir()
            mode = stat.S_IMODE(holder.stat().st_mode) & 0o777  # what the umask leaves
        narrow: dict[Path, int] = {}
        token_of_modes = _narrow.set(narrow)
        try:
            with explained(target, _ONLY_WRITING, itself=True):
                yield temporary
        finally:
            _narrow.reset(token_of_modes)
        with explained(target, itself=True):
            if listed and _is_folder(temporary):
                write_contents(temporary)
            _open_up(temporary, mode, narrow)
            sync(temporary)
            check_output(target, force=force, own=own, new=temporary)
            check_unchanged()
            if beside is not None:
                beside.add(target, temporary)
            _swap(temporary, target, holder / _OLD)
        try:
            _sync_folder(target.parent)
        except OSError as error:
            if beside is not None:  # which takes it back
                raise explain(error, target) from error
            told = explain(error, f"{target} was written, and its folder is not synced")
            raise LoraFxError(told.message, told.hint, exit_code=1) from error


class Beside(contextlib.ExitStack):
    """Outputs beside a main one, which go again where that one does not get its name.

    What they replaced comes back. Between two renames a run can be killed: what lies in the folder
    of the main output is taken away by the next run of that, by a link in a temporary folder whose
    name has the same token. A copy elsewhere stays.

    Attributes:
        target: The main output; None where nothing follows.
        temporary: Where that lies until it has its name.
    """

    target: Path | None = None
    temporary: Path | None = None

    def on_error(self, undo: Callable[[], object]) -> None:
        """Let this be called where an error comes before the main output has its name."""
        main = None if self.temporary is None else inode_of(self.temporary)

        def end(error: type[BaseException] | None, *_: object) -> None:
            settled = self.target is not None and main in {inode_of(self.target)} - {None}
            if error is not None and not settled:
                with contextlib.suppress(OSError):
                    undo()

        self.push(end)

    def token(self, target: Path) -> str:
        """What the temporary folder of an output is known by: that of the main one, beside it."""
        main = self.temporary
        together = main is not None and target.parent == main.parent.parent
        return main.parent.name[-12:-4] if together and main else secrets.token_hex(4)

    def add(self, target: Path, new: Path) -> None:
        """Take in what is about to be renamed to `target`; it lies in its temporary folder."""
        inode, old = new.stat().st_ino, new.with_name(_OLD)
        self.on_error(lambda: _take_back(target, inode, (old, new)))
        if _there(target) and not _is_folder(target):  # a folder changes places with its new one
            try:
                os.link(target, old, follow_symlinks=False)
            except OSError:  # no links on this file system
                shutil.copy2(target, old, follow_symlinks=False)
        if not _is_folder(new):
            with contextlib.suppress(OSError):
                os.link(new, new.with_name(_NEW))


def _take_back(target: Path, inode: int, old: Sequence[Path]) -> None:
    """Remove an output, unless another has its name by now; put back what it replaced."""
    if not _there(target) or target.lstat().st_ino != inode:
        return
    if _is_folder(target):
        shutil.rmtree(target, ignore_errors=True)
    replaced = next(filter(_there, old), None)
    if replaced is not None:
        os.replace(replaced, target)
    else:
        target.unlink(missing_ok=True)


EXISTS = "choose another output, or --force to replace it"


def check_output(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    own: bool = False,
    new: Path | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Refuse an output, before any work is done, that exists or whose folder does not.

    Args:
        path: The output.
        force: It may exist, where lora-fx lets it be replaced.
        own: It is this run's own state, which it may have read.
        new: What takes its place, once that is written.
        names: The files of a folder that is written, where they are known before.
    """
    target = Path(path)
    if target.name in ("", "..") or "\0" in str(target):
        raise LoraFxError(f"{str(target)!r} names no file", "name a file or folder to create")
    if str(target).startswith("hf:"):
        upload = "write a folder, then: hf upload ORG/NAME FOLDER"
        raise LoraFxError(f"{target}: nothing is uploaded", upload)
    with explained(target):
        if _there(target) and not force:
            raise LoraFxError(f"{target} exists already", EXISTS)
        if _there(target):
            check_replaceable(target, new, names)
            if not own:
                check_apart(target)
        if not target.parent.is_dir():
            raise LoraFxError(f"the folder {target.parent} does not exist", "create it first")


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Refuse when the disk of `folder` has less than `needed` bytes free for this user."""
    with explained(folder):
        disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # a total of 0: the file system does not say
        raise LoraFxError(
            f"{os.fspath(folder)}: {human(disk.free)}B free, expected at least {human(needed)}B",
            "free space, or write to another disk",
        )


def sync(path: Path) -> None:
    """Fsync a file, or every file of a folder and the folder; links are not followed."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        for child in path.iterdir():
            sync(child)
        _sync_folder(path)
    elif stat.S_ISREG(mode):
        _fsync(path)


def _sync_folder(path: Path) -> None:
    try:
        _fsync(path)
    except OSError as error:
        # Some network file systems sync no folders.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_narrow: ContextVar[dict[Path, int] | None] = ContextVar("narrow", default=None)
"""Copies within a block of `replacing` → the mode of what each is a copy of."""


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file into what a block of `replacing` makes.

    Others get no more access to the copy than they have to the source.

    Args:
        source: Where links lead is copied: who names a file of a folder asks `companion` first.
        target: A new name within what the block makes.

    Raises:
        LoraFxError: The source cannot be read, or is no regular file.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open_input(source) as read, os.fdopen(os.open(target, new, 0o600), "wb") as written:
        keep_mode(os.fstat(read.fileno()), target)
        shutil.copyfileobj(read, written)


def keep_mode(source: os.stat_result, target: Path) -> None:
    """Let a new file be read by no more people than the one that it is made of."""
    modes = _narrow.get()
    if modes is not None:
        modes[target] = stat.S_IMODE(source.st_mode) | stat.S_IRUSR | stat.S_IWUSR


def _open_up(path: Path, mode: int, narrow: Mapping[Path, int]) -> None:
    """Give files `mode` without its x, folders `mode`: what is made by tempfile has 0600."""
    found = path.lstat()
    folder = stat.S_ISDIR(found.st_mode)
    wanted = mode if folder else mode & 0o666 & narrow.get(path, 0o777)
    want = stat.S_IMODE(found.st_mode) & ~0o777 | wanted
    alone = found.st_nlink < 2  # or an input would change with its other name
    if want != stat.S_IMODE(found.st_mode) and (folder or (stat.S_ISREG(found.st_mode) and alone)):
        path.chmod(want)
    if folder:
        for child in path.iterdir():
            _open_up(child, mode, narrow)


# --- taking the place of what is there -----------------------------------------------------------


def _swap(new: Path, target: Path, old: Path) -> None:
    """Give `new` the name `target`; a folder with content cannot be renamed over."""
    if not (_there(target) and (_is_folder(target) or _is_folder(new))):
        os.replace(new, target)
    elif not _exchange(new, target):
        target.rename(old)  # back it comes by _discard, should the next line fail
        new.rename(target)


def _there(path: Path) -> bool:
    """True for a link to nothing too. Raises when that cannot be told, unlike lexists."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        one, two = os.fsencode(a), os.fsencode(b)
        here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, and macOS' RENAME_SWAP
        if sys.platform == "linux":
            return bool(libc.renameat2(here, one, here, two, swap) == 0)
        return sys.platform == "darwin" and bool(libc.renamex_np(one, two, swap) == 0)
    except (ImportError, AttributeError, TypeError, OSError):
        return False


def sweep(target: Path) -> None:
    """Take away what an interrupt between two steps left of an output of this run."""
    with contextlib.suppress(OSError, LoraFxError), locked(target):
        _clear_stale(target)


def _clear_stale(target: Path) -> None:
    """Remove what killed runs left of this target; its lock is held, so none of it is in use."""
    ours = re.compile(re.escape(f".{target.name}.lora_fx_") + r"([0-9a-f]{8})\.tmp")
    for name in os.listdir(target.parent):
        path = target.with_name(name)
        if (found := ours.fullmatch(name)) and _is_folder(path):
            _clear_beside(target, found[1], named=not _there(path / target.name))
            _discard(path, target)


def _clear_beside(target: Path, token: str, *, named: bool) -> None:
    """Take away what a killed run left beside an output.

    Where that did not get its name, what was put beside it goes too: it lies in the same folder,
    and its own temporary folder has a hard link to it.
    """
    beside = re.compile(r"\.(.+)\.lora_fx_" + token + r"\.tmp")
    for name in os.listdir(target.parent):
        found, holder = beside.fullmatch(name), target.with_name(name)
        if found is None or found[1] == target.name or not _is_folder(holder):
            continue
        path, new = target.with_name(found[1]), holder / _NEW
        with contextlib.suppress(OSError, LoraFxError), locked(path):
            if not named and _there(new) and stat.S_ISREG(new.lstat().st_mode):
                _take_back(path, new.lstat().st_ino, [holder / _OLD])
            _discard(holder, path)


def _discard(holder: Path, target: Path) -> None:
    """Remove a temporary folder, unless it holds the only copy of what was to be replaced."""
    old, interrupt = holder / _OLD, None
    for last in (False, False, True):  # an error may pass, and who waits may press Ctrl-C again
        try:
            if _there(old) and not _there(target):
                old.rename(target)
            if _there(holder):
                shutil.rmtree(holder, ignore_errors=last)
            break
        except OSError:
            continue
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


# One writer a target: the lock file `.NAME.lock` beside it.
#
# With flock the file is empty and a killed run leaves nothing that counts: the kernel drops the
# lock with the process. The file is unlinked while it is held, so whoever gets the lock looks
# whether the name still leads to the file it locked, and starts again if not; without that look,
# one process could hold a file that has lost its name and another the file that took it. The
# library filelock would leave its file beside every output.
#
# Where there is no flock (some network file systems) filelock holds the lock: who creates
# the file has it, and writes process and host into it, by which that of a dead process is known.

_TRIES = 1000  # each lost one means that another run ended in between


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; it is not waited for.

    Raises:
        LoraFxError: Another run holds it.
        OSError: The lock file cannot be made.
    """
    lock = target.with_name(f".{target.name}.lock")
    fd = _acquire(lock, target)
    if fd is None:
        with _marked(lock, target):
            yield
        return
    try:
        yield
    finally:
        _release(fd, lock)


def _acquire(lock: Path, target: Path) -> int | None:
    """A descriptor of the lock file, which this process now holds; None where there is no flock."""
    for _ in range(_TRIES):
        fd, made = _open(lock)
        marked, held = b"", False
        try:
            if (got := _flock(fd)) is None:
                return None
            if not got:
                made = False  # another run got the file that this one made, and unlinks it
                raise _busy(target)
            marked = os.read(fd, 1)
            held = not marked and _leads_to(lock, fd)
        finally:
            if not held:
                _release(fd, lock) if made else os.close(fd)
        if held:
            return fd
        if marked:  # by a process that found no flock: it lives, or its file is taken away
            with _marked(lock, target):
                pass
    raise _busy(target)


@contextlib.contextmanager
def _marked(lock: Path, target: Path) -> Iterator[None]:
    from filelock import SoftFileLock, Timeout

    marker = SoftFileLock(lock, timeout=0)
    try:
        marker.acquire()
    except Timeout:
        who = "unknown"
        with contextlib.suppress(OSError):
            who = " ".join(lock.read_text(errors="replace").split()[:2]) or who
        hint = f"; if no such process runs ({who}), remove {lock}"
        raise _busy(target, hint) from None
    try:
        yield
    finally:
        marker.release()


def _open(lock: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made by this call."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # unlinked by its holder since
            kind = lock.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe would be waited for
                raise LoraFxError(f"{lock}: not a regular file", "remove it: it is no lock of ours")
            return os.open(lock, flags), False
    raise OSError(f"{lock} comes and goes")


def _flock(fd: int) -> bool | None:
    """Whether flock gave the lock; None where there is no flock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP: this file system has no locks
        return None
    return True


def _leads_to(lock: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _release(fd: int, lock: Path) -> None:
    """Unlink while held, then let go. A file that stays stops nobody. Raises nothing."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            if _leads_to(lock, fd):
                os.unlink(lock)
            break
    with contextlib.suppress(OSError):
        os.close(fd)


def _busy(target: Path, more: str = "") -> LoraFxError:
    hint = "wait for it to end, or choose another output"
    return LoraFxError(f"{BUSY} {target}", hint + more)


# What --force may replace, and what no output may touch.
#
# --force takes the place of what lora-fx made. That is a file of the same kind as the new one, told
# by its ending where no other program has that, else by its content; a folder whose `lora_fx.json`
# lists every file in it by name and size; or, without that list, a folder that has no other files
# than the new one. Anything else is somebody's work. An input of the run is never replaced, with
# --force or without it.


CONTENTS = "lora_fx.json"
"""In a folder that is ours: its files by name and size."""

CURVE = "step,loss,validation"
"""The first line of a training's losses as CSV."""
_HEAD = 1 << 16
_AWAY = "move it away yourself, or choose another output"
_ENDINGS = (".onnx", ".pt2", ".safetensors")


def write_contents(folder: Path) -> None:
    """Write the list of a new folder's files into it."""
    files = {name: size for name, size in sorted(_files(folder)) if name != CONTENTS}
    text = json.dumps({**stamp(), "files": files}, indent=1)
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")


def check_apart(target: Path) -> None:
    """Refuse an output that exists and is, holds or hard-links an input of this run.

    Raises:
        LoraFxError: Names the input.
    """
    run = run_of_files()
    if run is None or not os.path.lexists(target):
        return
    found = target.lstat()
    name = run.inodes.get((found.st_dev, found.st_ino))
    inputs = {Path(os.path.realpath(path)): name for path, name in run.paths.items()} | run.paths
    for place in (Path(os.path.abspath(target)), Path(os.path.realpath(target))):
        name = name or inputs.get(place)
        held = name or next((n for p, n in inputs.items() if place in p.parents), None)
        if held is not None:
            inside = "" if held == name else ", which lies in it"
            raise LoraFxError(
                f"{target}: the output would replace the input {held}{inside}",
                "inputs are never changed: choose another output",
            )


def check_replaceable(target: Path, new: Path | None, names: Collection[str] | None) -> None:
    """Refuse to replace what is not of lora-fx's making.

    Args:
        target: What is there.
        new: What takes its place; None while that is not written yet.
        names: The files that a new folder will have, where that is known before it is written.

    Raises:
        LoraFxError: Says what is there.
    """
    link = target.is_symlink()
    if link and not target.exists():
        return
    mode = target.stat().st_mode
    folder = stat.S_ISDIR(mode)
    if target.name == ".git" or (folder and ".git" in os.listdir(target)):
        raise LoraFxError(f"{target}: a git repository is not replaced", _AWAY)
    if not (folder or stat.S_ISREG(mode)):
        raise LoraFxError(f"{target}: not a regular file or folder", "choose another output")
    if new is not None and new.is_dir() != folder:
        there, made = ("folder", "file") if folder else ("file", "folder")
        raise LoraFxError(f"{target} is a {there}, and a {made} would replace it", _AWAY)
    if not folder:
        _check_file(target, new)
    elif not link:  # a link to a folder goes alone
        known = {n for n, _ in _files(new)} if new is not None else names
        if foreign := _foreign(target, known):
            raise LoraFxError(
                f"{target}: the folder holds more than lora-fx wrote: {some(foreign, 5)}", _AWAY
            )


def _check_file(target: Path, new: Path | None) -> None:
    if not target.stat().st_size:
        return
    there = kind_of(target)
    made = there if new is None else kind_of(new)
    if there is None or there != made:
        known = f"it is {there}" if there else "it is no file that lora-fx writes"
        wanted = f", and {made} would replace it" if made and new is not None else ""
        raise LoraFxError(f"{target}: --force does not replace it: {known}{wanted}", _AWAY)


def kind_of(file: Path) -> str | None:
    """What a file of a kind that lora-fx writes is; None for any other."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if (adapters := adapter_files()) is not None:
        kind = adapters.kind_of(file, head)
        if kind is not None:
            return kind or None
    is_safetensors = _begins_as_safetensors(file, head)
    if adapters is None and (is_safetensors or file.suffix == ".safetensors"):
        return None  # only the formats can tell an adapter from a checkpoint
    if file.suffix in _ENDINGS:
        return f"a {file.suffix} file"
    if is_safetensors:
        return "a .safetensors file"
    if b"<title>lora-fx " in head and head.lstrip()[:15].lower() == b"<!doctype html>":
        return "a page of lora-fx"
    if head.startswith(f"{CURVE}\n".encode()):
        return "a loss curve of lora-fx"
    if file.suffix == ".toml" and head.startswith(b"# lora-fx "):
        return "a config of lora-fx"
    with contextlib.suppress(LoraFxError):
        found = json_object(file.read_bytes(), str(file)) if head.lstrip()[:1] == b"{" else {}
        if isinstance(found.get("version"), int) and "format" in found:
            return "JSON of lora-fx"
    return None


def _begins_as_safetensors(file: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 8 + length <= file.stat().st_size


def _foreign(folder: Path, names: Collection[str] | None) -> list[str]:
    """Names of a folder's files that lora-fx did not write, or that were changed since."""
    there = {n: size for n, size in _files(folder) if not _is_clutter(n.rpartition("/")[2])}
    if not 0 <= there.get(CONTENTS, -1) <= MAX_JSON:
        return [] if names is None else [n for n in there if n not in names]
    text = (folder / CONTENTS).read_bytes()
    try:
        listed = json_object(text, CONTENTS).get("files")
    except LoraFxError:
        return [CONTENTS]
    known = listed if isinstance(listed, dict) else {}
    return [n for n, size in there.items() if n != CONTENTS and known.get(n) != size]


def _is_clutter(name: str) -> bool:
    """True for what desktops and network file systems leave in a folder."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith(".nfs")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """(name, size) of every file below a folder; of a link, pipe or device the size is -1."""
    for path in sorted(folder.iterdir()):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            yield from ((f"{path.name}/{name}", size) for name, size in _files(path))
        else:
            yield path.name, found.st_size if stat.S_ISREG(found.st_mode) else -1
