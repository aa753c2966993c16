"""Modules beside a user's factory, which never take the place of lora-fx's own imports.

The folder of a factory is importable while the factory is imported and called. A module there that
has the name of one of Python's own, or of a library that lora-fx needs, is passed over: what is
imported under such a name stays in `sys.modules` for everybody who imports it later.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

DISTRIBUTION = "lora-fx"


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """A block in which the modules of a folder can be imported."""
    finder = _Beside(folder)
    sys.meta_path.insert(0, finder)
    sys.path.append(folder)  # last: installed packages come before it
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed them
            sys.meta_path.remove(finder)
        places = [i for i, place in enumerate(sys.path) if place == folder]
        if places:  # the last of equal entries is this block's
            del sys.path[places[-1]]


class _Beside:
    """Finds the modules of a folder before installed ones of the same name that are not needed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of the folder; None for what is not there, or has a name that is reserved."""
        if path is not None:
            return None
        spec = PathFinder.find_spec(name, [self.folder])
        if spec is None or spec.loader is None:  # a folder without __init__.py gives way to any
            return None
        return None if is_reserved(name, self.folder) else spec


def is_reserved(name: str, folder: str) -> bool:
    """Whether a module is Python's or one of a library that lora-fx needs, and not the folder's."""
    if name in sys.stdlib_module_names or name == __name__.partition(".")[0]:
        return True
    return _is_elsewhere(name, folder) and name in _needed()


def _is_elsewhere(name: str, folder: str) -> bool:
    """Whether a module of this name is found without the folder, and is not that of the folder."""
    others = [entry for entry in sys.path if entry and Path(entry).absolute() != Path(folder)]
    found = [PathFinder.find_spec(name, others)]
    for finder in sys.meta_path:
        if not isinstance(finder, _Beside) and finder is not PathFinder:
            find = getattr(finder, "find_spec", None)  # finders of old have none
            found.append(None if find is None else find(name, None))
    here = PathFinder.find_spec(name, [folder])
    origin = None if here is None else here.origin
    return any(spec is not None and spec.origin != origin for spec in found)


@functools.cache
def _needed() -> frozenset[str]:
    """The modules of the distributions that lora-fx requires, extras and their needs included.

    All that are installed, where lora-fx itself is not.
    """
    modules = metadata.packages_distributions()
    pending, required = [DISTRIBUTION], set[str]()
    while pending:
        name = _normalised(pending.pop())
        if name in required:
            continue
        required.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            if name == DISTRIBUTION:
                return frozenset(modules)
            continue
        pending += [found[0] for line in lines if (found := re.match(r"[\w.-]+", line))]
    return frozenset(m for m, owners in modules.items() if required & set(map(_normalised, owners)))


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
