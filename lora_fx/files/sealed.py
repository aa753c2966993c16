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
"""Events of a change on disk → which of their arguments are changed paths, each with the one that
is the descriptor of the folder that it is relative to."""
TORCH_LOAD = "lora_fx.torch.load"
"""What is raised as an event where torch.load is called: with weights_only it names no class."""
HUB_CLIENT = "lora_fx.hub_client"
"""What is raised, with the Hub's address, where a client of the Hub is made."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(eq=False)
class Boundary:
    """What a block refuses.

    Attributes:
        what: What is done in it, as the subject of a sentence.
        folders: The folders whose files it may touch, absolute.
        active: False once the block has ended, for threads that go on.
        refused: The exceptions by which something was refused.
    """

    what: str
    folders: tuple[str, ...]
    active: bool = True
    refused: list[BaseException] = field(default_factory=list)

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        """Raise where an event is not let happen."""
        raise NotImplementedError

    def refuse(self, attempt: str, hint: str) -> None:
        """Raise, and remember it."""
        error = LoraFxError(f"{self.what} {attempt}", hint)
        self.refused.append(error)
        raise error

    def _may_touch(self, path: str) -> bool:
        return path.endswith(CODE) or any(
            _is_below(path, folder) for folder in (*self.folders, *ALWAYS)
        )


class _Sealed(Boundary):
    """No network, no pickles, and no file beyond its folders and the installed libraries."""

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        if event in LOOKUPS or event == HUB_CLIENT:
            self._refuse_host(args[0])
        elif event in CONNECTIONS:
            connection, address = args[:2]
            if connection.family in (socket.AF_INET, socket.AF_INET6) and address:
                self._refuse_host(address[0])
        elif event == "pickle.find_class":
            self.refuse(
                f"opens a pickle that names {'.'.join(map(str, args))}, which could run code",
                "get the weights as safetensors",
            )
        elif event == TORCH_LOAD:
            self.refuse("opens a pickle by torch.load", "get the weights as safetensors")
        elif event == "open" and (path := _path(args[0])) is not None:
            self._check_open(path)

    def _refuse_host(self, host: object) -> None:
        self.refuse(
            f"asks the network ({one_line(host, 80)}), and only an argument hf:… does that",
            "does config.json name another model? file.py:FACTORY may load what it likes",
        )

    def _check_open(self, path: str) -> None:
        real = os.path.realpath(path)
        if self._may_touch(path) or any(_is_below(real, root) for root in self._libraries):
            return
        # Libraries go on without a file that they may not read, such as a cache of theirs.
        error = PermissionError(errno.EACCES, f"{self.what}: a file of another place", path)
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
    """No change on disk beyond its folders."""

    def check(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changed = [_path(args[0])] if isinstance(args[2], int) and args[2] & _WRITES else []
        else:
            changed = [
                _path(args[i], -1 if folder is None else args[folder])
                for i, folder in CHANGES.get(event, ())
            ]
        for path in filter(None, changed):
            if event == "os.mkdir" and self._may_stand(path):
                continue
            parent, name = os.path.split(path)
            # Opening follows a link, and every other call changes the link itself.
            real = os.path.realpath(path if event == "open" else parent)
            if not self._may_touch(real if event == "open" else os.path.join(real, name)):
                self.refuse(
                    f"would write {path}, which is beyond its part of the cache",
                    "do not use the server that it comes from",
                )

    def _may_stand(self, folder: str) -> bool:
        """Whether a folder is there already, or one that its own folders lie in."""
        return os.path.isdir(folder) or any(_is_below(own, folder) for own in self.folders)


def _path(value: object, folder: int = -1) -> str | None:
    """An absolute path; None for what is none, such as a descriptor.

    Args:
        value: What a call was given.
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
    """Where an open folder lies."""
    if sys.platform == "darwin":
        place = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(place.rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_below(path: str, folder: str) -> bool:
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
    return boundary if boundary is not None and boundary.active else None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _EVENTS and (boundary := _present()) is not None:
        boundary.check(event, args)


@functools.cache
def _install() -> None:
    """Set the hook, which stays until the process ends, and follow threads as they are started.

    Python raises an event for these from 3.12 on.
    """
    plain = threading.Thread.start

    @functools.wraps(plain)
    def start(thread: threading.Thread) -> None:
        boundary = _present()
        if boundary is not None:
            _started[thread] = boundary
        plain(thread)

    setattr(threading.Thread, "start", start)  # noqa: B010 (mypy lets no method be assigned)
    sys.addaudithook(_hook)


@contextlib.contextmanager
def sealed(what: str, *folders: StrPath) -> Iterator[Boundary]:
    """A block without the network, pickles, and files beyond some folders and the libraries.

    Args:
        what: What is built in it, as the subject of a sentence.
        folders: Those whose files may be opened.

    Raises:
        LoraFxError: The block ended by an error that comes of what was refused.
    """
    with _bounded(_Sealed(what, tuple(map(os.path.abspath, folders)))) as boundary:
        yield boundary


@contextlib.contextmanager
def confined(what: str, *folders: StrPath) -> Iterator[Boundary]:
    """A block in which nothing is written beyond some folders.

    Args:
        what: What is written in it, as the subject of a sentence.
        folders: Where; they need not be there.

    Raises:
        LoraFxError: As `sealed`.
    """
    with _bounded(_Confined(what, tuple(map(os.path.realpath, folders)))) as boundary:
        yield boundary


@contextlib.contextmanager
def _bounded(boundary: Boundary) -> Iterator[Boundary]:
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
            f"{boundary.what} opens {getattr(refused, 'filename', None)}, no file of this model",
            "does config.json name another model or a path?",
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
    """The refusal that an error comes of."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        at = pending.pop()
        if at is None or id(at) in seen:
            continue
        if any(at is one for one in refused):
            return at
        seen.add(id(at))
        pending += [at.__cause__, at.__context__]
    return None
