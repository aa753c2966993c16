"""Safe resolution of names from files and of links in folders: neither may leave its folder.

A path that the user gives is followed wherever it leads. A name that stands in a file (a shard in
an index, the data of an ONNX tensor) or in a folder that is copied whole is another's word: it is
resolved inside that folder, and no link may lead out of it. The Hugging Face cache is the one
exception, since the files of a snapshot there are links to `blobs` of the same repository.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lora_fx.errors import LoraFxError


def inside(folder: Path, name: str) -> Path | None:
    """Return the path for a name from another file; None if it leads out of the folder.

    Args:
        folder: Where the file lies in which the name stands.
        name: Relative, by `/`.

    Returns:
        Where it lies, without links; it may be missing.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", name):
        return None
    return within(folder, name)


def within(folder: Path, name: str) -> Path | None:
    """Return the target of a folder's entry, links resolved; None if it is outside the folder."""
    try:
        home = folder.resolve()
        file = (folder / name).resolve()
        if stat.S_ISLNK(file.lstat().st_mode):
            return None  # links in a circle, for which resolve raises no error from Python 3.13 on
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError):  # links in a circle; a name that is too long
        return None

    for root in (home, *_blobs(folder)):
        if root in file.parents:
            return file
    return None


def companion(folder: Path, name: str) -> Path:
    """Return a file of a folder, if its links stay in the folder.

    Raises:
        LoraFxError: It is a link that leads out.
    """
    if within(folder, name) is None:
        raise LoraFxError(
            f"{folder / name}: this link leads out of the folder",
            "replace it by a copy of the file that it points to (cp -L), or remove it",
        )
    return folder / name


def _blobs(folder: Path) -> Iterator[Path]:
    """Yield REPOSITORY/blobs, where the links of a Hugging Face snapshot lead."""
    absolute = Path(os.path.abspath(folder))
    resolved = folder.resolve()
    for snapshot in (absolute, *absolute.parents, resolved, *resolved.parents):
        blobs = snapshot.parent.parent / "blobs"
        if snapshot.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            yield blobs.resolve()
