"""The manifest of lora-fx in a .pt2 file, read without torch; the archive itself is fx/pt2's."""

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
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    RuntimeError,  # of an encrypted member
)  # fmt: skip
"""What Python's zipfile raises for a damaged archive, or one of another kind."""


def program_manifest(path: Path) -> Json:
    """Return the manifest of a .pt2 file; an empty one where another program wrote the file.

    Raises:
        LoraFxError: The file cannot be read, or is no .pt2 file.
    """
    hint = "pass a file that lora-fx export --mode switch wrote"
    with open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith(MANIFEST)]
                if not members:
                    return {}
                if members[0].file_size > MAX_JSON:
                    raise LoraFxError(f"{path}: its manifest is too large", hint)
                data = archive.read(members[0])
        except UNREADABLE as e:
            raise LoraFxError(f"{path}: not a .pt2 file: {one_line(e, 120)}", hint) from e
    return json_object(data, f"{path}: its manifest", hint=hint)
