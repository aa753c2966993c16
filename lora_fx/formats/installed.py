"""Formats from other installed packages, found by their entry points `lora_fx.formats`.

    [project.entry-points."lora_fx.formats"]        in the pyproject.toml of the package
    mine = "my_package.my_module:MINE"              the format's name, and its object

Such a package is code that the user installed, and it runs with the user's rights. Its module is
imported only when lora-fx needs the format. Its errors become one line that names the package.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.adapter.variant import expect_variant
from lora_fx.errors import LoraFxError, one_line, type_of
from lora_fx.files.tensor_files import is_float
from lora_fx.formats.checked_file import File
from lora_fx.formats.format import HEAD, FileHead, Format, Magic
from lora_fx.text import by_key, some

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "lora_fx.formats"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")
_MEMBERS = (
    "name", "suffixes", "magic", "folder_files", "pickles", "older_files", "only_read", "one_model",
    "takes_empty", "keeps_variants", "takes_base", "fits_graphs", "keeps_probe",
    "keeps_invocation", "sole_suffix", "detect", "resembles", "is_adapter", "read", "write",
    "write_for",
)  # fmt: skip
_METHODS = ("detect", "resembles", "is_adapter", "read", "write", "write_for")
OTHER_FILES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".onnx", ".pt2", ".json")
"""Suffixes of files that lora-fx reads as something else: models, pickles and configs."""


def entry_points() -> dict[str, EntryPoint]:
    """Return the entry points of installed formats by name; import nothing.

    A distribution that lies in the current folder is not installed, though Python may have that
    folder among the places of its imports.

    Raises:
        LoraFxError: Two of one name: both packages are named.
    """
    by_name = by_key((point.name, point) for point in _points())
    for name, points in by_name.items():
        if len(points) > 1:
            raise two_of_one_name(name, package_of(points[0]), package_of(points[1]))
    return {name: by_name[name][0] for name in sorted(by_name)}


def _points() -> Iterator[EntryPoint]:
    """Yield the entry points of the group; the first one of a package that is found repeatedly."""
    from importlib import metadata  # an import of 20 ms, which few need

    packages = set[str]()
    places = [place for place in sys.path if place]
    for package in metadata.distributions(path=places):
        points = package.entry_points.select(group=GROUP)
        if points and package.name not in packages:
            packages.add(package.name)
            yield from points


def package_of(point: EntryPoint) -> str:
    """Return the name of the installed package of an entry point."""
    return point.dist.name if point.dist else point.module


def two_of_one_name(name: str, package: str, other: str) -> LoraFxError:
    """Return the error for two packages with formats of one name."""
    first, second = sorted((package, other), key=lambda name: (name != "lora-fx", name))
    return LoraFxError(
        f"the packages {first} and {second} both have an adapter format {name!r}",
        f"pip uninstall {second}, or ask its authors to rename the format",
    )


def load(point: EntryPoint) -> InstalledFormat:
    """Import the format of an entry point.

    Raises:
        LoraFxError: It cannot be imported, or is not a Format; names the format and its package.
    """
    what = f"the adapter format {point.name!r} of the package {package_of(point)}"
    hint = f"update the package, or pip uninstall {package_of(point)}"
    try:
        loaded = point.load()
        fault = fault_of(point.name, loaded)
    except (Exception, SystemExit) as error:
        why = one_line(f"{type(error).__name__}: {error}", 200)
        raise LoraFxError(f"{what} cannot be imported: {why}", hint) from error
    if fault:
        raise LoraFxError(
            f"{what} is not a Format: {fault}", f"{hint}; passes/README.md describes a Format"
        )
    return InstalledFormat(loaded, package_of(point))


def fault_of(name: str, loaded: Format) -> str:
    """Return the reason why an object is not the Format of this name; empty if it is.

    The tests ask the same about lora-fx's own formats.
    """
    if isinstance(loaded, type):
        return f"{loaded.__name__} is a class; expected an object of it"
    missing = [member for member in _MEMBERS if not hasattr(loaded, member)]
    if missing:
        return f"{type(loaded).__name__} has no {some(missing, 5)}"
    no_methods = [member for member in _METHODS if not callable(getattr(loaded, member))]
    if no_methods:
        return f"its {some(no_methods, 5)} cannot be called"
    if loaded.name != name or not _NAME.fullmatch(name):
        return (
            f"its name is {loaded.name!r}; expected {name!r}, in lower-case letters, digits and "
            "-_.+"
        )
    if not _are_texts(loaded.suffixes) or not (loaded.suffixes or loaded.folder_files):
        return f"its suffixes are {loaded.suffixes!r}; expected a tuple of file suffixes"
    for suffix in loaded.suffixes:
        if not re.fullmatch(r"\.\w+", suffix):
            return (
                f"one of its suffixes is {suffix!r}; expected one dot, then letters, digits or _, "
                "as in '.safetensors'"
            )
        if suffix in OTHER_FILES:
            return (
                f"one of its suffixes is {suffix!r}; expected a suffix that model files do not use"
            )
    for names in (loaded.folder_files, loaded.pickles, loaded.older_files):
        if not _are_texts(names) or any(Path(n).name != n for n in names):
            return (
                f"its file names of a folder are {names!r}; expected a tuple of names without '/'"
            )
    return _fault_of_magic(loaded.magic)


def _fault_of_magic(magic: object) -> str:
    if magic is None:
        return ""
    if not isinstance(magic, Magic) or not isinstance(magic.text, bytes):
        return f"its magic is {magic!r}; expected a Magic, or None for safetensors files"
    if not magic.text or not 0 <= magic.start <= HEAD - len(magic.text):
        return f"its magic is {magic!r}; expected bytes within the first {HEAD} bytes"
    if not magic.start and magic.text.startswith(b"\x80"):
        return f"its magic is {magic!r}, which begins pickles; no format may read pickles"
    return ""


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


class InstalledFormat(Format):
    """A format of another package; its errors and invalid results become one-line errors.

    Attributes:
        package: The name of the package.
    """

    def __init__(self, inner: Format, package: str) -> None:
        self._inner = inner
        self.package = package
        self.name = inner.name
        self.suffixes = inner.suffixes
        self.magic = inner.magic
        self.folder_files = inner.folder_files
        self.pickles = inner.pickles
        self.older_files = inner.older_files
        self.only_read = bool(inner.only_read)
        self.one_model = bool(inner.one_model)
        self.takes_empty = bool(inner.takes_empty)
        self.keeps_variants = bool(inner.keeps_variants)
        self.takes_base = bool(inner.takes_base)
        self.fits_graphs = bool(inner.fits_graphs)
        self.keeps_probe = bool(inner.keeps_probe)
        self.keeps_invocation = bool(inner.keeps_invocation)
        self.sole_suffix = bool(inner.sole_suffix)

    def detect(self, seen: FileHead) -> bool:
        """Whether a file is of this format."""
        with self._retold("cannot recognise its files"):
            return bool(self._inner.detect(seen))

    def resembles(self, seen: FileHead) -> bool:
        """Whether a file is of this format, but incomplete."""
        with self._retold("cannot recognise its files"):
            return bool(self._inner.resembles(seen))

    def is_adapter(self, head: bytes) -> bool:
        """Whether a file with the magic is an adapter."""
        with self._retold("cannot recognise its files"):
            return bool(self._inner.is_adapter(head))

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read a file, and check that the result is valid updates of numbers."""
        with self._retold("cannot read it", f"{path}: "):
            adapter = self._inner.read(path, base)
            if not isinstance(adapter, Adapter):
                read = f"returned {type_of(adapter)}; expected an Adapter"
                raise self._error(f"{path}: ", read)
            self._check_texts(f"{path}: ", adapter)
            for key, entry in adapter.entries.items():
                self._check(f"{path}: {self}: {key!r}", entry)
        return adapter

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write a file or a folder."""
        with self._retold("cannot write it", f"{path.name}: "):
            notes = self._inner.write(adapter, path, base)
        return self._written(path, notes)

    def write_for(self, graph: str, adapter: Adapter, path: Path) -> tuple[str, ...]:
        """Write a file for one switchable .onnx file."""
        with self._retold("cannot write it", f"{path.name}: "):
            notes = self._inner.write_for(graph, adapter, path)
        return self._written(path, notes)

    def __str__(self) -> str:
        """The format and its package, for messages."""
        return f"the adapter format {self.name!r} of the package {self.package}"

    def _written(self, path: Path, notes: object) -> tuple[str, ...]:
        """Return the notes of a writer; raise if it wrote nothing, or a link."""
        if not path.exists() or path.is_symlink():
            raise self._error(f"{path.name}: ", "wrote nothing")
        if not isinstance(notes, (tuple, list)):
            raise self._error(f"{path.name}: ", f"returned {type(notes).__name__}; expected notes")
        return tuple(map(str, notes))

    def _check_texts(self, where: str, adapter: Adapter) -> None:
        """Raise for keys that are not valid names, and for notes that are not texts."""
        if not isinstance(adapter.entries, Mapping):
            read = type(adapter.entries).__name__
            raise self._error(where, f"read entries of type {read}; expected a mapping")
        for key in adapter.entries:
            if not isinstance(key, str) or not key:
                raise self._error(where, f"read the key {key!r}; expected a name")
        notes = adapter.metadata.get("notes", [])
        if not isinstance(notes, (list, tuple)) or not all(isinstance(note, str) for note in notes):
            raise self._error(where, f"read {notes!r} as notes; expected a list of texts")

    def _check(self, where: str, entry: object) -> None:
        """Raise for an entry that is not an update, or does not hold numbers."""
        if not isinstance(entry, get_args(Entry)):
            raise LoraFxError(
                f"{where} is of type {type(entry).__name__}; expected a LowRank, a Full or another "
                "kind of update",
                self._hint,
            )
        if isinstance(entry, Full) and not isinstance(entry.value, np.ndarray):
            raise LoraFxError(
                f"{where} has a value of type {type(entry.value).__name__}; expected an array",
                self._hint,
            )
        if isinstance(entry, LowRank):
            self._check_factors(where, entry)
        for name, value in vars(entry).items():
            if isinstance(value, np.ndarray) and is_float(value):
                File(where).check_finite(name, value)

    def _check_factors(self, where: str, update: LowRank) -> None:
        """Raise for A and B that are not finite fp32 of [*batch, r, in] and [*batch, out, r]."""
        expect_variant(update.variant, where)
        for half, factor in (("A", update.a), ("B", update.b)):
            if not isinstance(factor, np.ndarray):
                raise LoraFxError(
                    f"{where} has {half} of type {type(factor).__name__}; expected an array",
                    self._hint,
                )
        a = np.asarray(update.a)
        b = np.asarray(update.b)
        fits = a.ndim >= 2 and b.ndim >= 2 and a.size and b.size
        if not fits or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
            raise LoraFxError(
                f"{where} has A {list(a.shape)} and B {list(b.shape)}; expected [*batch, r, in] "
                "and [*batch, out, r]",
                self._hint,
            )
        for half, array in (("A", a), ("B", b)):
            if array.dtype != np.float32:
                raise LoraFxError(f"{where} has {half} in {array.dtype}, not float32", self._hint)
            File(where).check_finite(half, array)
        if not np.isfinite(update.alpha):
            raise LoraFxError(f"{where} has alpha {update.alpha}; expected a number", self._hint)

    @property
    def _hint(self) -> str:
        return f"if the file is valid, report this to the authors of {self.package}"

    def _error(self, where: str, what: str) -> LoraFxError:
        return LoraFxError(f"{where}{self} {what}", self._hint)

    @contextlib.contextmanager
    def _retold(self, what: str, where: str = "") -> Iterator[None]:
        """A block whose errors become one-line LoraFxErrors; LoraFxErrors stay."""
        try:
            yield
        except LoraFxError:
            raise
        except (Exception, SystemExit) as error:
            why = one_line(f"{type(error).__name__}: {error}", 200)
            raise self._error(where, f"{what}: {why}") from error
