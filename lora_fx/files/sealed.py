"""Blocks that restrict library code: its network access, pickles, and file access.

Constructors of transformers and timm look names up on the Hub, with the user's token, and open the
files that a config names; a download writes where the Hub says. Python raises an audit event before
it resolves a host name, connects, opens or changes a file or looks the class of a pickle up,
whichever library asks for it, and an exception there ends the attempt. Threads that are started
within a block are in it too, other threads are not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lora_fx.errors import LoraFxError, one_line
from lora_fx.patching import patched
from lora_fx.text import StrPath

ALWAYS = ("/proc", "/sys", "/dev")
"""System folders that libraries read for facts about the machine."""
NOT_THE_SYSTEMS = ("/dev/shm", "/dev/mqueue")
"""Folders among them in which programs keep data of theirs."""
CODE = (".py", ".pyc", ".so", ".pyd", ".dylib", ".dll")
"""Suffixes of the files that an import opens, allowed in any folder."""
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.utime": ((0, 3),),
}  # fmt: skip
"""The audit event of a change on disk → the positions of the changed paths in its arguments.

Each comes with the place of the descriptor of the folder that the path is relative to, or None.
"""
TORCH_LOAD = "lora_fx.torch.load"
"""The event for a call of torch.load; with weights_only, that call looks up no class."""
HUB_CLIENT = "lora_fx.hub_client"
"""The event for a new Hub client, with the Hub's address."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(eq=False)
class Boundary:
    """The rules of a block, and the errors raised for what they do not allow.

    Attributes:
        what: What is done in the block, as the subject of a sentence.
        folders: The folders whose files it may touch, absolute.
        active: False once the block has ended, for threads that go on.
        refused: The exceptions by which something was refused.
    """

    what: str
    folders: tuple[str, ...]
    active: bool = True
    refused: list[BaseException] = field(default_factory=list)

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        """Raise for an event that the block does not allow."""
        raise NotImplementedError

    def refuse(self, attempt: str, hint: str) -> None:
        """Raise an error, and record it."""
        error = LoraFxError(f"{self.what} {attempt}", hint)
        self.refused.append(error)
        raise error

    def _is_own(self, path: str) -> bool:
        """Whether the path is in the block's folders."""
        return any(_is_below(path, folder) for folder in self.folders)


class _Sealed(Boundary):
    """The rules of a block without network, pickles, and files outside folders and libraries."""

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        if event in LOOKUPS or event == HUB_CLIENT:
            self._refuse_host(args[0])
        elif event in CONNECTIONS:
            connection, address = args[:2]
            if connection.family in (socket.AF_INET, socket.AF_INET6) and address:
                self._refuse_host(address[0])
        elif event == "pickle.find_class":
            self.refuse(
                f"opens a pickle that uses {'.'.join(map(str, args))}, which could run code",
                "get the weights as safetensors",
            )
        elif event == TORCH_LOAD:
            self.refuse("opens a pickle by torch.load", "get the weights as safetensors")
        elif event == "open":
            path = _path(args[0])
            if path is not None:
                self._check_open(path)

    def _refuse_host(self, host: object) -> None:
        """Raise for a request to a host."""
        self.refuse(
            f"uses the network ({one_line(host, 80)}), which is allowed only for an argument hf:…",
            "check whether config.json names another model; file.py:FACTORY may load anything",
        )

    def _check_open(self, path: str) -> None:
        """Raise for an opened file that belongs neither to the block nor to a library."""
        real = os.path.realpath(path)
        if self._is_own(path) or path.endswith(CODE) or _is_systems(path):
            return
        if any(_is_below(real, root) for root in self._libraries):
            return
        # Libraries go on without a file that they may not read, such as a cache of theirs.
        error = PermissionError(
            errno.EACCES, f"{self.what}: a file outside of the model's folder", path
        )
        self.refused.append(error)
        raise error

    @functools.cached_property
    def _libraries(self) -> frozenset[str]:
        """The folders of installed libraries and their data."""
        places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path} - {""}
        for name, module in list(sys.modules.items()):
            if "." not in name and hasattr(module, "__path__"):  # installed apart from the others
                places |= {os.fspath(place) for place in module.__path__}
        roots = frozenset(map(os.path.realpath, places))
        return roots - {os.path.realpath(os.getcwd()), os.path.sep}


class _Confined(Boundary):
    """The rules of a block that may change files only in its folders."""

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2]
            path = _path(args[0])
            if path is not None and isinstance(flags, int) and flags & _WRITES:
                self._check_change(path, os.path.realpath(path))
            return
        for place, place_of_folder in CHANGES.get(event, ()):
            folder = -1
            if place_of_folder is not None:
                folder = args[place_of_folder]
            path = _path(args[place], folder)
            if path is None or (event == "os.mkdir" and self._may_make(path)):
                continue
            # Opening follows a link, and every other call changes the link itself.
            parent, name = os.path.split(path)
            self._check_change(path, os.path.join(os.path.realpath(parent), name))

    def _check_change(self, path: str, changed: str) -> None:
        """Raise if the changed path is outside the block's folders."""
        if changed != os.devnull and not self._is_own(changed):
            self.refuse(
                f"would write {path}, which is outside of its part of the cache",
                "do not use this server",
            )

    def _may_make(self, folder: str) -> bool:
        """Whether a folder exists already, or contains one of the block's folders."""
        if os.path.isdir(folder):
            return True
        return any(_is_below(block_folder, folder) for block_folder in self.folders)


def _path(value: object, folder: int = -1) -> str | None:
    """Return an absolute path; None for an object that is not a path, such as a descriptor.

    Args:
        value: An argument of a call.
        folder: The descriptor of the folder that a relative path begins at, as `shutil.rmtree`
            removes files; -1 for the current one.
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        return None
    path = os.fsdecode(value)
    if folder >= 0 and not os.path.isabs(path):
        path = os.path.join(_place_of(folder), path)
    return os.path.abspath(path)


def _place_of(descriptor: int) -> str:
    """Return the path of an open folder."""
    if sys.platform == "darwin":
        place = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(place.rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_below(path: str, folder: str) -> bool:
    """Whether the path is the folder itself or below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_systems(path: str) -> bool:
    """Whether a path is in one of the system's folders."""
    if any(_is_below(path, folder) for folder in NOT_THE_SYSTEMS):
        return False
    return any(_is_below(path, folder) for folder in ALWAYS)


_boundary: ContextVar[Boundary | None] = ContextVar("boundary", default=None)
_started: weakref.WeakKeyDictionary[threading.Thread, Boundary] = weakref.WeakKeyDictionary()
_EVENTS = frozenset(
    {*LOOKUPS, *CONNECTIONS, *CHANGES, "open", "pickle.find_class", TORCH_LOAD, HUB_CLIENT}
)


def _present() -> Boundary | None:
    """Return the boundary of this thread, from its block or the block that started the thread."""
    boundary = _boundary.get()
    if boundary is None and _started:
        boundary = _started.get(threading.current_thread())
    if boundary is None or not boundary.active:
        return None
    return boundary


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Check an audit event against the boundary of this thread."""
    if event not in _EVENTS:
        return
    boundary = _present()
    if boundary is not None:
        boundary.check(event, args)


@functools.cache
def _install() -> None:
    """Install the audit hook, which stays until the process ends, and track started threads.

    Python raises an event for threads from 3.12 on.
    """
    plain_start = threading.Thread.start

    @functools.wraps(plain_start)
    def start(thread: threading.Thread) -> None:
        boundary = _present()
        if boundary is not None:
            _started[thread] = boundary
        plain_start(thread)

    setattr(threading.Thread, "start", start)  # noqa: B010 (mypy lets no method be assigned)
    sys.addaudithook(_hook)


@contextlib.contextmanager
def sealed(what: str, *folders: StrPath) -> Iterator[Boundary]:
    """A block without network and pickles, and with files only from some folders and libraries.

    Args:
        what: What is built in it, as the subject of a sentence.
        folders: The folders whose files may be opened.

    Raises:
        LoraFxError: The block ended by an error that a refusal caused.
    """
    with _bounded(_Sealed(what, tuple(map(os.path.abspath, folders)))) as boundary:
        yield boundary


@contextlib.contextmanager
def confined(what: str, *folders: StrPath) -> Iterator[Boundary]:
    """A block that may write only in some folders, and keeps no bytecode of what it imports.

    Args:
        what: What is written in it, as the subject of a sentence.
        folders: Where it may write; they need not exist.

    Raises:
        LoraFxError: The block ended by an error that a refusal caused.
    """
    boundary = _Confined(what, tuple(map(os.path.realpath, folders)))
    with patched(sys, dont_write_bytecode=True), _bounded(boundary):
        yield boundary


@contextlib.contextmanager
def _bounded(boundary: Boundary) -> Iterator[Boundary]:
    """A block with this boundary, whose errors name what was refused."""
    _install()
    token = _boundary.set(boundary)
    try:
        yield boundary
    except Exception as error:
        refused = _cause(error, boundary.refused)
        if refused is None or (refused is error and isinstance(error, LoraFxError)):
            raise
        if isinstance(refused, LoraFxError):
            raise LoraFxError(refused.message, refused.hint) from error
        raise LoraFxError(
            f"{boundary.what} opens {getattr(refused, 'filename', None)}, which is outside of the "
            "model",
            "check whether config.json names another model or a path",
        ) from error
    finally:
        _boundary.reset(token)
        boundary.active = False


@contextlib.contextmanager
def unsealed() -> Iterator[None]:
    """A block inside `sealed` in which lora-fx itself may read what the user named."""
    token = _boundary.set(None)
    try:
        yield
    finally:
        _boundary.reset(token)


def _cause(error: BaseException, refused: list[BaseException]) -> BaseException | None:
    """Return the refusal that caused an error, also through other errors; None if there is none."""
    visited: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in visited:
            continue
        if any(current is refusal for refusal in refused):
            return current
        visited.add(id(current))
        pending += [current.__cause__, current.__context__]
    return None
