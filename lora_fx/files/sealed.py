"""Blocks in which a library reaches no more than it has to.

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
from lora_fx.text import StrPath

ALWAYS = ("/proc", "/sys", "/dev")
"""Folders of the system that libraries ask about the machine."""
CODE = (".py", ".pyc", ".so", ".pyd", ".dylib", ".dll")
"""Ends of files that an import opens, wherever a package is installed."""
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.utime": ((0, 3),),
}  # fmt: skip
"""Event of a change on disk → the places of the changed paths among its arguments.

Each comes with the place of the descriptor of the folder that the path is relative to, or None.
"""
TORCH_LOAD = "lora_fx.torch.load"
"""The event of a call of torch.load, which with weights_only looks no class up."""
HUB_CLIENT = "lora_fx.hub_client"
"""The event of a new client of the Hub, with the Hub's address."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(eq=False)
class Boundary:
    """The rules of a block, and what was refused in it.

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
        """Raise an error, and remember it."""
        error = LoraFxError(f"{self.what} {attempt}", hint)
        self.refused.append(error)
        raise error

    def _may_touch(self, path: str) -> bool:
        """True for code, and for what lies in the block's folders or in those of the system."""
        if path.endswith(CODE):
            return True
        return any(_is_below(path, folder) for folder in (*self.folders, *ALWAYS))


class _Sealed(Boundary):
    """Allows no network, no pickles, and no file outside its folders and installed libraries."""

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
        if self._may_touch(path) or any(_is_below(real, root) for root in self._libraries):
            return
        # Libraries go on without a file that they may not read, such as a cache of theirs.
        error = PermissionError(
            errno.EACCES, f"{self.what}: a file outside of the model's folder", path
        )
        self.refused.append(error)
        raise error

    @functools.cached_property
    def _libraries(self) -> frozenset[str]:
        """Where installed libraries and their data lie."""
        places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path} - {""}
        for name, module in list(sys.modules.items()):
            if "." not in name and hasattr(module, "__path__"):  # installed apart from the others
                places |= {os.fspath(place) for place in module.__path__}
        roots = frozenset(map(os.path.realpath, places))
        return roots - {os.path.realpath(os.getcwd()), os.path.sep}


class _Confined(Boundary):
    """Allows no change on disk outside its folders."""

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
        """Raise where what is changed, by a path that is named, lies beyond the folders."""
        if not self._may_touch(changed):
            self.refuse(
                f"would write {path}, which is outside of its part of the cache",
                "do not use this server",
            )

    def _may_make(self, folder: str) -> bool:
        """True for a folder that exists already, and for one that the block's folders lie in."""
        if os.path.isdir(folder):
            return True
        return any(_is_below(block_folder, folder) for block_folder in self.folders)


def _path(value: object, folder: int = -1) -> str | None:
    """An absolute path; None for what is none, such as a descriptor.

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
    """The path of an open folder."""
    if sys.platform == "darwin":
        place = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(place.rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_below(path: str, folder: str) -> bool:
    """True for a folder itself too."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


_boundary: ContextVar[Boundary | None] = ContextVar("boundary", default=None)
_started: weakref.WeakKeyDictionary[threading.Thread, Boundary] = weakref.WeakKeyDictionary()
_EVENTS = frozenset(
    {*LOOKUPS, *CONNECTIONS, *CHANGES, "open", "pickle.find_class", TORCH_LOAD, HUB_CLIENT}
)


def _present() -> Boundary | None:
    """The boundary of this thread, where it is in a block or was started in one."""
    boundary = _boundary.get()
    if boundary is None and _started:
        boundary = _started.get(threading.current_thread())
    if boundary is None or not boundary.active:
        return None
    return boundary


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Let the boundary of this thread check an event."""
    if event not in _EVENTS:
        return
    boundary = _present()
    if boundary is not None:
        boundary.check(event, args)


@functools.cache
def _install() -> None:
    """Set the hook, which stays until the process ends, and follow threads as they are started.

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
    """A block without the network, pickles, and files beyond some folders and the libraries.

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
    """A block in which nothing is written beyond some folders.

    Args:
        what: What is written in it, as the subject of a sentence.
        folders: Where it may write; they need not exist.

    Raises:
        LoraFxError: The block ended by an error that a refusal caused.
    """
    with _bounded(_Confined(what, tuple(map(os.path.realpath, folders)))) as boundary:
        yield boundary


@contextlib.contextmanager
def _bounded(boundary: Boundary) -> Iterator[Boundary]:
    """A block within a boundary, whose errors name what was refused."""
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
    """A block within one of `sealed` in which lora-fx itself reads what the user named."""
    token = _boundary.set(None)
    try:
        yield
    finally:
        _boundary.reset(token)


def _cause(error: BaseException, refused: list[BaseException]) -> BaseException | None:
    """The refusal that caused an error, which may have come through other errors; None for none."""
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
