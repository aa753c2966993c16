"""Format: the interface of an adapter file format, to detect, read and write its files.

Whoever adds a format writes one object of this protocol. Nothing outside it knows its name: the
registry (`lora_fx.formats.registry`) lists the formats, and `load_adapter`, `save_adapter`,
`--force`, the command line and the documentation ask the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError

HEAD = 64
"""The number of bytes at a file's beginning that show its kind."""


@dataclass(frozen=True)
class Magic:
    """The bytes that every file of a format has at a fixed offset.

    Attributes:
        text: The bytes.
        start: How many bytes stand before them; all of them lie within the first 64.

    >>> Magic(b"TORT", start=4).begins(b"....TORT....")
    True
    """

    text: bytes
    start: int = 0

    def begins(self, head: bytes) -> bool:
        """Whether a file with these first bytes has the magic."""
        return head.startswith(self.text, self.start)


@dataclass(frozen=True)
class FileHead:
    """The beginning of a file, from which a format's `detect` decides; tensors are not read.

    Attributes:
        head: The first 64 bytes.
        names: Tensor names of a safetensors file; empty for others.
        metadata: The texts of its header.
        config: True where adapter_config.json lies beside it.
        config_fields: Names of the fields in that file.
        elements: How many all tensors have together.
    """

    head: bytes
    names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: bool = False
    elements: int = 0
    config_fields: frozenset[str] = frozenset()


class Format(Protocol):
    """One kind of adapter file: subclass it and create one object. Defaults are optional.

    Attributes:
        name: What `--format` and `save_adapter(format=…)` call it.
        suffixes: The suffixes of its single files: each is one dot, then letters, digits or _. The
            suffix of a name begins at its last dot, so that of x.mine.safetensors is .safetensors.
            A name with one of them asks for a file, and any other name for a folder. Empty where an
            adapter of it is always a folder.
        magic: How every file of it begins. Without one its files are safetensors files, whose
            tensor names and header `detect` looks at.
        folder_files: The files of a folder of it by name, first the one that holds the tensors.
            Empty where an adapter of it is always one file.
        pickles: Names that the file of the tensors has in a folder as a pickle. They are read with
            `--trust`, and never written.
        older_files: Names that the file of the tensors has in folders of older releases, which are
            read and never written. A .npz file has a format by the names of its arrays.
        only_read: Whether it is read and not written.
        one_model: Whether a file of it holds the updates of one model, under the names of that
            model's parameters. Updates of several components of a pipeline are refused.
        takes_empty: Whether an adapter without an update is written, with a note that says so.
        keeps_variants: Whether an update comes back as the variant that it was, with its tensors.
            Otherwise those that PEFT does not have are written as plain LoRA, and that is noted.
        takes_base: Whether names or orders of rows depend on the model. Then `read` and `write` get
            its folder, where the user gave one, and None otherwise.
        fits_graphs: Whether it has `write_for`: files for one switchable graph (`--for X.onnx`).
        keeps_probe: Whether it has a place for the text `metadata["probe"]`; see docs/probe.md.
        keeps_invocation: Whether it has a place for the tokens from which on an aLoRA acts. Others
            refuse such an adapter.
        sole_suffix: Whether no other program has files of these endings, so that `--force` replaces
            such a file whatever it holds. Otherwise it replaces what the magic shows to be one.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: Magic | None = None
    folder_files: tuple[str, ...] = ()
    pickles: tuple[str, ...] = ()
    older_files: tuple[str, ...] = ()
    only_read: bool = False
    one_model: bool = False
    takes_empty: bool = False
    keeps_variants: bool = False
    takes_base: bool = False
    fits_graphs: bool = False
    keeps_probe: bool = False
    keeps_invocation: bool = False
    sole_suffix: bool = False

    def detect(self, seen: FileHead) -> bool:
        """Whether a file is of this format, decided from its content and never from its name.

        lora-fx calls this for files with the magic, or for safetensors files if the format has no
        magic. Formats of other packages get only files that no format of lora-fx detects. It is an
        error if two formats return True: be strict about files of other formats. For a file of this
        format with one wrong tensor return True, so that `read` can name the tensor.
        """
        return self.magic is not None

    def resembles(self, seen: FileHead) -> bool:
        """Whether a file that no format detects looks like this one but lacks what `detect` needs.

        The first format for which this is true reads the file, and its error says what is missing.
        """
        return False

    def is_adapter(self, head: bytes) -> bool:
        """Whether a file with the magic is an adapter, by its first 64 KiB.

        `--force` asks, where files of other content have the same magic.
        """
        return True

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read a file for which `detect` is true.

        Args:
            path: The file; of a folder the one that holds the tensors.
            base: The folder or file of the model, where the format takes one.

        Returns:
            An Adapter whose keys are the names of the file and whose layouts are None; `bind` fits
            it to a model later. metadata["notes"] lists what should be said to the user.

        Raises:
            LoraFxError: Names the file, the tensor, what was found and what was expected.
        """
        ...

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write an adapter: with at least one update, unless the format allows an empty one.

        Args:
            adapter: Bound to a model or not.
            path: A new file where its suffix is one of `suffixes`, else a folder to create.
            base: The folder or file of the model, where the format takes one.

        Returns:
            Notes: what other readers of the format will not see.

        Raises:
            LoraFxError: The format cannot store an update; the message names its key.
        """
        raise LoraFxError(
            f"lora-fx reads format {self.name} but does not write it", "choose another --format"
        )

    def write_for(self, graph: str, adapter: Adapter, path: Path) -> tuple[str, ...]:
        """Write a file for a switchable .onnx file, with the names and shapes of the file's inputs.

        Args:
            graph: The .onnx file.
            adapter: What `write` takes.
            path: The new file.
        """
        raise LoraFxError(
            f"format {self.name} cannot be written for one .onnx file", "leave --for out"
        )
