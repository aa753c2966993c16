"""Detection of an adapter file's format from its content: magic, tensor names and header.

Here is the door that every file passes before a format's `read` gets it, whatever format that is.
Git-LFS pointers are refused, pickles too outside a block of `trusting`, headers of safetensors
files are checked, and an archive that unpacks to far more than its size is refused.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from os import PathLike, fspath
from pathlib import Path

from lora_fx.data_files import check_unpacked
from lora_fx.errors import LoraFxError, near_path, one_line
from lora_fx.files.read import open_input
from lora_fx.files.safetensors import first_bytes, is_pickle, may_be_safetensors
from lora_fx.formats.file_head import config_fields, has_config, tensors_head
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.registry import FORMATS, files_of, older_files_of, pickles_of

NO_OUTPUT = (".bin", ".pt", ".pth", ".ckpt", ".onnx", ".pt2", ".json")
"""Suffixes that an adapter is never written with."""

_LARGE = 64 << 20
_HEAD_OF_KIND = 64 << 10
_ZIP = b"PK\x03\x04"
_PICKLED = (".pkl", ".pickle")
_WIDEST = 8
"""The largest size of a tensor element in bytes."""


def look(path: Path) -> FileHead:
    """Read the head of a file.

    Raises:
        LoraFxError: A pickle, a Git LFS pointer, no file of any format, or a damaged one.
    """
    head = first_bytes(path)
    if not FORMATS.with_magic(head) and not is_pickle(head) and not may_be_safetensors(head):
        for error in FORMATS.failures():  # of a format whose magic it might be
            raise error
    if not FORMATS.with_magic(head) or _is_pickled(path, head):
        return tensors_head(path)
    if head.startswith(_ZIP):
        check_unpacked(path, "check that it is the right file")
    return FileHead(head, config=has_config(path), config_fields=config_fields(path))


def _is_pickled(path: Path, head: bytes) -> bool:
    """Whether a file is a pickle, or an archive that holds one."""
    if not is_pickle(head):
        return False
    if not head.startswith(_ZIP):
        return True
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith(_PICKLED) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return True  # nobody can tell


def format_in(path: Path, seen: FileHead) -> Format:
    """Return the one format that a file has.

    Raises:
        LoraFxError: No format knows the file, or several do; a format that might cannot be
            imported.
    """
    detecting = FORMATS.detecting(seen)
    if len(detecting) == 1:
        return detecting[0]
    if detecting:
        names = " or ".join(format.name for format in detecting)
        raise _unclear(path, seen, f"the format is ambiguous ({names})")
    for format in FORMATS.importable():
        if format.resembles(seen):
            return format
    for error in FORMATS.failures():  # of a format that might have known it
        raise error
    raise _unclear(path, seen, "not an adapter in a known format")


def _unclear(path: Path, seen: FileHead, what: str) -> LoraFxError:
    shown = ", ".join(one_line(name, 80) for name in seen.names[:3]) or "nothing"
    return LoraFxError(
        f"{path}: {what}: its tensors ({len(seen.names)}) are named {shown} …",
        f"use a file in one of the formats {', '.join(FORMATS)}",
    )


def format_of(path: str | Path) -> str:
    """Return the format of an adapter, from its content; raise as load_adapter does."""
    path = tensor_file(Path(path))
    if path.suffix == ".onnx":
        return "onnx"
    return format_in(path, look(path)).name


def format_for(path: str | Path, *, of_graph: bool = False) -> str:
    """Return the format for an output's name, if only one format uses such names.

    Args:
        path: The output.
        of_graph: It is for one switchable file, for which few formats have files.

    >>> format_for("x.onnx_adapter"), format_for("folder")
    ('onnx_adapter', 'peft')
    >>> format_for("x.safetensors", of_graph=True)
    'graph_inputs'
    """
    path = Path(path)
    if of_graph:
        for format in FORMATS.importable():
            if format.fits_graphs and path.suffix in format.suffixes:
                return format.name
    if not path.suffix:
        return FORMATS.default.name
    is_shared = False
    for formats in FORMATS.in_turn():
        written = [format for format in formats if not format.only_read]
        called_so = [format for format in written if path.suffix in format.suffixes]
        is_shared = is_shared or len(called_so) > 1
        if is_shared:  # a file that is all of some format's folder has that one's name
            called_so = [format for format in written if format.folder_files == (path.name,)]
        if len(called_so) == 1:
            return called_so[0].name
    if is_shared or path.suffix in NO_OUTPUT:
        raise LoraFxError(
            f"{path}: the file name does not determine the format",
            f"pass --format with one of {', '.join(FORMATS.writers())}",
        )
    for error in FORMATS.failures():
        raise error
    return FORMATS.default.name


def tensor_file(path: Path) -> Path:
    """Return the one file with an adapter's tensors; a pickle only if there is no other."""
    if not path.exists():
        raise LoraFxError(f"{path}: no such file or folder", near_path(path, "check the path"))
    if path.is_file():
        if not _lies_beside(path):
            return path
        return tensor_file(path.parent)
    for formats in FORMATS.in_turn():
        for name in files_with_tensors(formats):
            if (path / name).is_file():
                return path / name
    weights = FORMATS.default.folder_files[0]
    raise LoraFxError(f"{path}: no {weights} in this folder", _hint_for_folder(path, weights))


def _hint_for_folder(path: Path, weights: str) -> str:
    """Return a hint for a folder without an adapter: a file or folders that may hold one."""
    files = sorted(path.glob("*.safetensors"))
    if files:
        return f"pass the adapter's file: {files[0]}"
    folders = sorted(file.parent.name for file in path.glob(f"*/{weights}"))
    if folders:
        return f"pass one of its folders with an adapter: {', '.join(folders[:5])}"
    if (path / "adapter_config.json").is_file():
        return "its weights are missing: copy or fetch them into the folder"
    return "check that it is an adapter"


def files_with_tensors(formats: Collection[Format]) -> tuple[str, ...]:
    """Return the names of these formats' tensor files in folders: older ones last, then pickles."""
    safe = [format.folder_files[0] for format in formats if format.folder_files]
    return (*safe, *older_files_of(formats), *pickles_of(formats))


def _lies_beside(path: Path) -> bool:
    """Whether the name is that of an additional file (such as a config) in an adapter folder."""
    for formats in FORMATS.in_turn():
        if any(path.name in format.folder_files[1:] for format in formats):
            return True
        if any(path.suffix in format.suffixes or path.name in format.pickles for format in formats):
            return False
    return False


def is_adapter(path: str | PathLike[str]) -> bool:
    """Whether load_adapter would read this path, decided from its files and their headers."""
    path = Path(path)
    if path.is_dir():
        return any(_has_file_of(path, formats) for formats in FORMATS.in_turn())
    if not path.is_file() or path.suffix in NO_OUTPUT or not _has_name_of_adapter(path):
        return FORMATS.is_pickle(path.name)
    head = look(path)
    return head.config or bool(FORMATS.detecting(head))


def _has_name_of_adapter(path: Path) -> bool:
    """Whether files of this name, or with its suffix, may hold the tensors of an adapter."""
    return bool(FORMATS.suffix_of(path.name)) or FORMATS.is_older_file(path.name)


def is_foreign_model(path: str | PathLike[str]) -> bool:
    """Whether a file has the magic of an adapter's format, but holds no adapter (a GGUF model)."""
    file = Path(path)
    if not file.is_file():
        return False
    with open_input(file) as opened:
        return FORMATS.kind_of(file, opened.read(_HEAD_OF_KIND)) == ""


def _has_file_of(folder: Path, formats: Collection[Format]) -> bool:
    """Whether a folder has a file that these formats write."""
    return any((folder / name).is_file() for name in files_of(formats))


def check_elements(path: str | PathLike[str], most: int) -> None:
    """Raise, before reading, if tensors have more elements than an adapter of a base can have.

    Files up to 64 MiB are read in any case.
    """
    if not Path(path).is_file() or os.stat(path).st_size <= _LARGE:
        return
    head = look(Path(path))
    if head.elements > most:
        raise LoraFxError(
            f"{fspath(path)}: its tensors have {head.elements} elements; expected at most {most}, "
            "twice the elements of this base",
            "check that it is an adapter of this model",
        )
    size = os.stat(path).st_size
    if not head.names and size > _LARGE + _WIDEST * most:  # a header that only its format reads
        raise LoraFxError(
            f"{fspath(path)}: {size} bytes; expected at most {most} elements, twice the elements "
            "of this base",
            "check that it is an adapter of this model",
        )
