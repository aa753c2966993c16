"""Import modules from the folder of a user's factory; they never replace lora-fx's imports.

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
    finder = _FolderFinder(folder)
    sys.meta_path.insert(0, finder)
    sys.path.append(folder)  # last: installed packages come before it
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed them
            sys.meta_path.remove(finder)
        positions = [position for position, entry in enumerate(sys.path) if entry == folder]
        if positions:  # the last of equal entries is this block's
            del sys.path[positions[-1]]


class _FolderFinder:
    """Finds the modules of a folder before installed ones of the same name that are not needed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of the folder; None if it does not exist or has a reserved name."""
        if path is not None:  # a module inside a package
            return None
        spec = PathFinder.find_spec(name, [self.folder])
        if spec is None or spec.loader is None:  # a folder without __init__.py gives way to any
            return None
        if is_reserved(name, self.folder):
            return None
        return spec


def is_reserved(name: str, folder: str) -> bool:
    """Whether a module is Python's or one of a library that lora-fx needs, and not the folder's."""
    if name in sys.stdlib_module_names or name == __name__.partition(".")[0]:
        return True
    return _is_elsewhere(name, folder) and name in _needed()


def _is_elsewhere(name: str, folder: str) -> bool:
    """Whether a module of this name exists outside the folder."""
    entries = [entry for entry in sys.path if entry and Path(entry).absolute() != Path(folder)]
    specs = [PathFinder.find_spec(name, entries)]
    for finder in sys.meta_path:
        if isinstance(finder, _FolderFinder) or finder is PathFinder:
            continue
        find_spec = getattr(finder, "find_spec", None)  # finders of old have none
        if find_spec is not None:
            specs.append(find_spec(name, None))

    origin_in_folder = None
    spec_in_folder = PathFinder.find_spec(name, [folder])
    if spec_in_folder is not None:
        origin_in_folder = spec_in_folder.origin
    return any(spec is not None and spec.origin != origin_in_folder for spec in specs)


@functools.cache
def _needed() -> frozenset[str]:
    """The modules of the distributions that lora-fx requires, extras and their needs included.

    All that are installed, where lora-fx itself is not.
    """
    distributions_by_module = metadata.packages_distributions()
    required = _required_distributions()
    if required is None:
        return frozenset(distributions_by_module)
    modules = set()
    for module, distributions in distributions_by_module.items():
        if required & {_normalised(distribution) for distribution in distributions}:
            modules.add(module)
    return frozenset(modules)


def _required_distributions() -> set[str] | None:
    """lora-fx and all that it requires, and so on; None where lora-fx is not installed."""
    pending = [DISTRIBUTION]
    required: set[str] = set()
    while pending:
        name = _normalised(pending.pop())
        if name in required:
            continue
        required.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            if name == DISTRIBUTION:
                return None
            continue
        for requirement in requirements:
            required_name = re.match(r"[\w.-]+", requirement)
            if required_name is not None:
                pending.append(required_name[0])
    return required


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
