"""The rules on what --force may replace, and what an output may never replace.

--force takes the place of what lora-fx made. That is a file of the same kind as the new one, told
by its ending where no other program has that, else by its content; a folder whose `lora_fx.json`
lists every file in it by name and size; or, without that list, a folder that has no other files
than the new one. Anything else is somebody's work. An input of the run is never replaced, with
--force or without it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.adapter_formats import adapter_files
from lora_fx.files.run_files import Remembered, run_of_files
from lora_fx.files.strict_json import MAX_JSON, json_object
from lora_fx.text import some

CONTENTS = "lora_fx.json"
"""The name of the file that lists a written folder's files by name and size."""
PROBE = "lora_fx_probe.json"
"""The name of the file in an adapter's folder that holds its probe; made later than the list."""
CURVE = "step,loss,validation"
"""The first line of the CSV file with a training's losses."""
_HEAD_BYTES = 1 << 16
_MOVE_AWAY = "move it away yourself, or choose another output"
_ENDINGS = (".onnx", ".pt2", ".safetensors")


def write_contents(folder: Path) -> None:
    """Write the list of a new folder's files into the folder."""
    files = {name: size for name, size in sorted(_files(folder)) if name != CONTENTS}
    text = json.dumps({**stamp(), "files": files}, indent=1)
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")


def check_apart(target: Path) -> None:
    """Raise if an existing output is, contains or hard-links an input of this run.

    Raises:
        LoraFxError: Names the input.
    """
    run = run_of_files()
    if run is None or not os.path.lexists(target):
        return
    status = target.lstat()
    linked_input = _linked_input(run, (status.st_dev, status.st_ino))
    inputs = {Path(os.path.realpath(path)): name for path, name in run.paths.items()}
    inputs |= run.paths
    for place in (Path(os.path.abspath(target)), Path(os.path.realpath(target))):
        same_input = linked_input or inputs.get(place)
        if same_input is not None:
            raise _would_replace(target, same_input)
        for path, name in inputs.items():
            if place in path.parents:
                raise _would_replace(target, f"{name}, which is inside it")


def _linked_input(run: Remembered, inode: tuple[int, int]) -> str | None:
    """Return the input that a file is a hard link of.

    The inode of an input that the run has replaced is free, and another file may have it.
    """
    linked_input = run.inodes.get(inode)
    for path, name in run.paths.items():
        if name == linked_input and path.exists():
            status = path.stat()
            if (status.st_dev, status.st_ino) == inode:
                return name
    return None


def _would_replace(target: Path, replaced_input: str) -> LoraFxError:
    """Return the error for an output that is or contains an input."""
    return LoraFxError(
        f"{target}: the output would replace the input {replaced_input}",
        "inputs are never changed: choose another output",
    )


def check_replaceable(target: Path, new: Path | None, names: Collection[str] | None) -> None:
    """Raise if files would be replaced that lora-fx did not write.

    Args:
        target: An output that exists.
        new: What takes its place; None while that is not written yet.
        names: The files that a new folder will have, where that is known before it is written.

    Raises:
        LoraFxError: The output must not be replaced; says what it is.
    """
    is_link = target.is_symlink()
    if is_link and not target.exists():
        return
    mode = target.stat().st_mode
    replaces_folder = stat.S_ISDIR(mode)
    if target.name == ".git" or (replaces_folder and ".git" in os.listdir(target)):
        raise LoraFxError(f"{target}: lora-fx does not replace a git repository", _MOVE_AWAY)
    if not (replaces_folder or stat.S_ISREG(mode)):
        raise LoraFxError(f"{target}: not a regular file or folder", "choose another output")
    if new is not None:
        _check_both_folders_or_files(target, replaces_folder, new.is_dir())
    if not replaces_folder:
        _check_file(target, new)
    elif not is_link:  # a link to a folder goes alone
        _check_folder(target, new, names)


def _check_both_folders_or_files(target: Path, replaces_folder: bool, is_folder: bool) -> None:
    """Raise if a file would replace a folder, or a folder a file."""
    if replaces_folder and not is_folder:
        raise LoraFxError(f"{target} is a folder, and a file would replace it", _MOVE_AWAY)
    if is_folder and not replaces_folder:
        raise LoraFxError(f"{target} is a file, and a folder would replace it", _MOVE_AWAY)


def _check_file(target: Path, new: Path | None) -> None:
    """Raise if the replaced file is not written by lora-fx, or is of another kind.

    An empty file is replaced by any.
    """
    if not target.stat().st_size:
        return
    kind = kind_of(target)
    new_kind: str | None = None
    if new is not None:
        new_kind = kind_of(new)
    if kind is not None and (new is None or new_kind == kind):
        return

    reason = "lora-fx does not write files of this kind"
    if kind is not None:
        reason = f"it is {kind}"
    if new_kind is not None:
        reason += f", and {new_kind} would replace it"
    raise LoraFxError(f"{target}: --force does not replace it: {reason}", _MOVE_AWAY)


def _check_folder(target: Path, new: Path | None, names: Collection[str] | None) -> None:
    """Raise for a folder with files that lora-fx did not write; for `new` see check_replaceable."""
    if new is not None:
        names = {name for name, _size in _files(new)}
    foreign = _foreign_files(target, names)
    if foreign:
        raise LoraFxError(
            f"{target}: the folder holds files that lora-fx did not write: {some(foreign, 5)}",
            _MOVE_AWAY,
        )


def kind_of(file: Path) -> str | None:
    """Return the kind of a file that lora-fx may have written, for people; None for other files."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    adapters = adapter_files()
    if adapters is not None:
        kind = adapters.kind_of(file, head)
        if kind is not None:
            return kind or None
    is_safetensors = _begins_as_safetensors(file, head)
    if adapters is None and (is_safetensors or file.suffix == ".safetensors"):
        return None  # only the formats can tell an adapter from a checkpoint
    if file.suffix in _ENDINGS:
        return f"a {file.suffix} file"
    if is_safetensors:
        return "a .safetensors file"
    if b"<title>lora-fx " in head and head.lstrip()[:15].lower() == b"<!doctype html>":
        return "a page of lora-fx"
    if head.startswith(f"{CURVE}\n".encode()):
        return "a loss curve of lora-fx"
    if file.suffix == ".toml" and head.startswith(b"# lora-fx "):
        return "a config of lora-fx"
    return _kind_of_json(file, head)


def _begins_as_safetensors(file: Path, head: bytes) -> bool:
    """Whether the first bytes are a header length that fits the file, followed by `{`."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 8 + length <= file.stat().st_size


def _kind_of_json(file: Path, head: bytes) -> str | None:
    """Return the kind of a JSON object with lora-fx's version and format, or of a probe."""
    if not head.lstrip().startswith(b"{"):
        return None
    try:
        content = json_object(file.read_bytes(), str(file))
    except LoraFxError:
        return None
    if {"format", "mode", "points", "adapters"} <= content.keys():
        return "a probe of lora-fx"
    if isinstance(content.get("version"), int) and "format" in content:
        return "JSON of lora-fx"
    return None


def _foreign_files(folder: Path, names: Collection[str] | None) -> list[str]:
    """Return the names of a folder's files that lora-fx did not write, or that changed since.

    Args:
        folder: The folder, with or without the list of its files.
        names: The files of the new folder, which count where there is no list; None: any file may
            be in it then.
    """
    sizes = {
        name: size for name, size in _files(folder) if not _is_clutter(name.rpartition("/")[2])
    }
    has_list = 0 <= sizes.get(CONTENTS, -1) <= MAX_JSON
    if not has_list:
        if names is None:
            return []
        return [name for name in sizes if name not in names]

    text = (folder / CONTENTS).read_bytes()
    try:
        listed_sizes = json_object(text, CONTENTS).get("files")
    except LoraFxError:
        return [CONTENTS]
    if not isinstance(listed_sizes, dict):
        listed_sizes = {}
    return [
        name
        for name, size in sizes.items()
        if name not in (CONTENTS, PROBE) and listed_sizes.get(name) != size
    ]


def _is_clutter(name: str) -> bool:
    """Whether desktops or network file systems create a file with this name."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith(".nfs")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of every file below a folder; size −1 for links, pipes and devices."""
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            for name, size in _files(path):
                yield f"{path.name}/{name}", size
        elif stat.S_ISREG(status.st_mode):
            yield path.name, status.st_size
        else:
            yield path.name, -1
