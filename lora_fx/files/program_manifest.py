"""What lora-fx adds to a .pt2 file, read without torch; the archive itself is fx/pt2's."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import open_input
from lora_fx.files.strict_json import MAX_JSON, json_object
from lora_fx.text import Json

MANIFEST = "data/extra/lora_fx.json"
"""The member of the archive, below its root folder."""
SWITCH = "switch"
"""The field of the manifest that names the inputs for A and B."""
BASE_ENDING = ".base.safetensors"
"""What follows the stem in the name of the file that stands for the base, where every run has to be
given A and B."""
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    RuntimeError,  # of an encrypted member
)  # fmt: skip
"""What Python's zipfile raises for a damaged archive, or one of another kind."""


HINT = "pass a file that lora-fx export --mode switch wrote"


def program_manifest(path: Path) -> Json:
    """Return the manifest of a .pt2 file; an empty one where another program wrote the file.

    Raises:
        LoraFxError: The file cannot be read, or is no .pt2 file.
    """
    data = program_member(path, MANIFEST, MAX_JSON)
    if data is None:
        return {}
    return json_object(data, f"{path}: its manifest", hint=HINT)


def program_member(path: Path, member: str, most: int) -> bytes | None:
    """Return the bytes of one member of a .pt2 file; None where the file has no such member.

    Args:
        path: The file.
        member: The name below the archive's root folder.
        most: The size in bytes above which the member is not read.

    Raises:
        LoraFxError: The file cannot be read, is no .pt2 file, or its member is too large.
    """
    with open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if info.filename.partition("/")[2] != member:
                        continue
                    if info.file_size > most:
                        raise LoraFxError(
                            f"{path}: its member {member} has {info.file_size} bytes; expected at "
                            f"most {most}",
                            HINT,
                        )
                    return archive.read(info)
        except UNREADABLE as e:
            raise LoraFxError(f"{path}: not a .pt2 file: {one_line(e, 120)}", HINT) from e
    return None


def add_member(path: Path, member: str, data: bytes) -> None:
    """Add a member to a .pt2 file that was just written; the others keep their places."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        # the time of every member is that of ZIP's beginning, as torch writes it
        archive.writestr(zipfile.ZipInfo(f"{root}/{member}"), data)
