"""The registry of adapter formats: lora-fx's own, and those of other installed packages.

The registry answers which formats there are, what their files are called and which of them can do
something. Packages are looked for where no format of lora-fx knows a name or a file, and
where all formats are listed: reading what lora-fx knows by itself runs no code of theirs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_fx.adapter.expert_layouts import LAYOUTS
from lora_fx.errors import LoraFxError
from lora_fx.files.adapter_formats import register
from lora_fx.files.safetensors import may_be_safetensors, parse_header
from lora_fx.files.strict_json import MAX_JSON
from lora_fx.formats import installed
from lora_fx.formats.diffusers import DIFFUSERS
from lora_fx.formats.file_head import head_with
from lora_fx.formats.format import HEAD, FileHead, Format
from lora_fx.formats.gguf import GGUF
from lora_fx.formats.graph_inputs import GRAPH_INPUTS
from lora_fx.formats.kohya import KOHYA
from lora_fx.formats.mlx import MLX
from lora_fx.formats.onnx_adapter import ONNX_ADAPTER
from lora_fx.formats.peft.file import PEFT
from lora_fx.formats.torchtune import TORCHTUNE

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

OURS: tuple[Format, ...] = (
    PEFT, KOHYA, DIFFUSERS, TORCHTUNE, MLX, ONNX_ADAPTER, GGUF, GRAPH_INPUTS
)  # fmt: skip
"""The formats of lora-fx. The first is the default for a folder."""

FormatName = Literal["peft", "kohya", "diffusers", "mlx", "onnx_adapter", "gguf"] | str
"""The name of a format that can be written: lora-fx's own, or an installed one."""

_PACKAGE = "lora-fx"
_TENSORS = re.compile(rb"(?i)lora|hada_|lokr_|oft_")
"""Texts in the tensor names of an adapter."""


class Registry(Mapping[str, Format]):
    """The formats by name; other packages are searched for formats on the first need."""

    def __init__(self, ours: tuple[Format, ...]) -> None:
        self._ours = {format.name: format for format in ours}
        self._loaded: dict[str, Format] = {}
        self.default = ours[0]

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """The entry points of other packages' formats by name; nothing is imported."""
        points = installed.entry_points()
        reserved = {*self._ours, *LAYOUTS, "onnx"}
        for name, point in points.items():
            if name in reserved:
                raise installed.two_of_one_name(name, _PACKAGE, installed.package_of(point))
        return points

    def __getitem__(self, name: str) -> Format:
        """Return a format; import the package that has it.

        Raises:
            KeyError: There is no such format.
            LoraFxError: The package cannot be imported, or two have a format of this name.
        """
        if name in self._ours:
            return self._ours[name]
        if name not in self._loaded:
            self._loaded[name] = installed.load(self._points[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a format with this name; import no package."""
        return name in self._ours or name in self._points

    def __iter__(self) -> Iterator[str]:
        """Yield the names; import no package."""
        yield from self._ours
        yield from self._points

    def __len__(self) -> int:
        """The number of formats."""
        return len(self._ours) + len(self._points)

    def refresh(self) -> None:
        """Search for packages again, after one was installed while this process runs."""
        self._loaded.clear()
        for looked_up in ("_points", "_imports"):
            vars(self).pop(looked_up, None)

    def writers(self) -> tuple[str, ...]:
        """Return the names of the formats that can be written; import no package.

        Whether one of another package is only read is seen when it is asked to write.
        """
        ours = (name for name, format in self._ours.items() if not format.only_read)
        return (*ours, *self._points)

    def importable(self) -> list[Format]:
        """Return the formats that can be imported, lora-fx's own first."""
        return [*self._ours.values(), *self._imports[0]]

    def failures(self) -> list[LoraFxError]:
        """Return the errors of formats that cannot be imported."""
        return self._imports[1]

    @functools.cached_property
    def _imports(self) -> tuple[list[Format], list[LoraFxError]]:
        """The formats of other packages, and the errors of those that cannot be imported."""
        formats: list[Format] = []
        failures: list[LoraFxError] = []
        for name in self._points:
            try:
                formats.append(self[name])
            except LoraFxError as error:
                failures.append(error)
        return formats, failures

    def in_turn(self) -> Iterator[Sequence[Format]]:
        """Yield lora-fx's formats, and then those of other packages, which are imported only then.

        Whoever finds an answer among the first does not go on.
        """
        yield [*self._ours.values()]
        yield self._imports[0]

    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of adapter files, each with its dot."""
        return tuple(dict.fromkeys(suffixes_of(self.importable())))

    def suffix_of(self, name: str) -> str:
        """Return the suffix of a file name that some format has; empty if none has it."""
        if "." not in name:
            return ""
        for formats in self.in_turn():
            for suffix in suffixes_of(formats):
                if name.endswith(suffix):
                    return suffix
        return ""

    def is_pickle(self, name: str) -> bool:
        """Whether a file of this name is the pickle in an adapter's folder."""
        return any(name in pickles_of(formats) for formats in self.in_turn())

    def is_older_file(self, name: str) -> bool:
        """Whether a folder of an older release has its tensors in a file of this name."""
        return any(name in older_files_of(formats) for formats in self.in_turn())

    def files_of_folders(self) -> tuple[str, ...]:
        """Return the names of all files that an adapter folder can have, pickles included."""
        return files_of(self.importable())

    def names_of_input(self) -> tuple[str, ...]:
        """Return the file names that an adapter folder read in this process can have.

        A package that was not imported has read none.
        """
        return files_of([*self._ours.values(), *self._loaded.values()])

    def detecting(self, seen: FileHead) -> list[Format]:
        """Return the formats that a file has, by its content: normally exactly one.

        Packages are asked about files that no format of lora-fx knows.
        """
        for formats in self.in_turn():
            detecting = detecting_among(formats, seen)
            if detecting:
                return detecting
        return []

    def with_magic(self, head: bytes) -> list[Format]:
        """Return the formats whose magic is in a file's first bytes.

        A file that begins as a safetensors file is one, whatever magic it has besides. Packages are
        asked about files that have no magic of lora-fx's formats.
        """
        for formats in self.in_turn():
            if begins_as_safetensors(head):
                return []
            with_magic = with_magic_among(formats, head)
            if with_magic:
                return with_magic
        return []

    def ending_by_magic(self, head: bytes) -> str:
        """Return the suffix of files that begin with this magic; empty if no format has it."""
        with_magic = self.with_magic(head)
        return _word_for(with_magic[0]) if with_magic else ""

    def kind_of(self, file: Path, head: bytes) -> str | None:
        """Return the kind of an adapter file in words, from its first 64 KiB.

        Files of one kind take each other's place under `--force`: those of formats with one ending.

        Returns:
            None for the file of no adapter format, and an empty text for one that is no adapter.
        """
        with_magic = self.with_magic(head)
        for formats in self.in_turn():
            with_suffix = [format for format in formats if file.suffix in format.suffixes]
            for format in with_suffix:
                if format.sole_suffix and (not with_magic or format in with_magic):
                    return f"a {file.suffix} file"
            if with_magic:
                adapters = [_word_for(format) for format in with_magic if format.is_adapter(head)]
                return f"an adapter in a {adapters[0]} file" if adapters else ""
            if with_suffix and _holds_an_adapter(file, head, with_suffix):
                return f"an adapter in a {file.suffix} file"
        return None


def files_of(formats: Collection[Format]) -> tuple[str, ...]:
    """Return the names of all files that folders of these formats can have, pickles included.

    Formats may share a name, as those that keep their settings in adapter_config.json.
    """
    names: dict[str, None] = {}
    for format in formats:
        names |= dict.fromkeys((*format.folder_files, *format.older_files))
    return tuple(names | dict.fromkeys(pickles_of(formats)))


def pickles_of(formats: Collection[Format]) -> Iterator[str]:
    """Yield the names of the pickles that folders of these formats can have."""
    for format in formats:
        yield from format.pickles


def older_files_of(formats: Collection[Format]) -> Iterator[str]:
    """Yield the names of the files of tensors in folders of older releases."""
    for format in formats:
        yield from format.older_files


def suffixes_of(formats: Collection[Format]) -> Iterator[str]:
    """Yield the file suffixes of these formats, in order."""
    for format in formats:
        yield from format.suffixes


def with_magic_among(formats: Collection[Format], head: bytes) -> list[Format]:
    """Return the formats among these whose magic is in a file's first bytes."""
    return [format for format in formats if format.magic is not None and format.magic.begins(head)]


def begins_as_safetensors(head: bytes) -> bool:
    """Whether these first bytes are those of a safetensors file, also of a damaged one."""
    return may_be_safetensors(head) and int.from_bytes(head[:8], "little") <= MAX_JSON


def detecting_among(formats: Collection[Format], seen: FileHead) -> list[Format]:
    """Return the formats among these that a file has, by its content."""
    if not seen.names and not begins_as_safetensors(seen.head):
        with_magic = with_magic_among(formats, seen.head)
        if with_magic:
            return [format for format in with_magic if format.detect(seen)]
    return [format for format in formats if format.magic is None and format.detect(seen)]


def _word_for(format: Format) -> str:
    """Return a word for the files of a format: their suffix, or the format's name."""
    if format.suffixes:
        return format.suffixes[0]
    return format.name


def _holds_an_adapter(file: Path, head: bytes, formats: list[Format]) -> bool:
    """Whether a safetensors file is an adapter, by its tensor names or by one of these formats.

    A checkpoint that `merge` wrote has its record in the header's metadata, which is none.
    """
    length = int.from_bytes(head[:8], "little")
    if not may_be_safetensors(head) or length > MAX_JSON:
        return False
    with file.open("rb") as opened:  # an output that is there, and no input of the run
        data = opened.read(8 + length)
    try:
        header = parse_header(data, file.stat().st_size, file)
    except LoraFxError:  # damaged, and perhaps somebody's adapter
        return _TENSORS.search(data) is not None
    if any(_TENSORS.search(name.encode()) for name in header.tensors):
        return True
    file_head = head_with(header, data[:HEAD], file)
    return any(format.magic is None and format.detect(file_head) for format in formats)


FORMATS = Registry(OURS)
register(FORMATS)
