"""What --force may replace, and what no output may touch.

--force takes the place of what lora-fx made. That is a file of the same kind as the new one, told
by its ending where no other program has that, else by its content; a folder whose `lora_fx.json`
lists every file in it by name and size; or, without that list, a folder that has no other files
than the new one. Anything else is somebody's work. An input of the run is never replaced, with
--force or without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.adapter_formats import adapter_files
from lora_fx.files.run_files import run_of_files
from lora_fx.files.strict_json import MAX_JSON, json_object
from lora_fx.text import some

CONTENTS = "lora_fx.json"
"""In a folder that is ours: its files by name and size."""


CURVE = "step,loss,validation"
"""The first line of a training's losses as CSV."""


_HEAD = 1 << 16


_AWAY = "move it away yourself, or choose another output"


_ENDINGS = (".onnx", ".pt2", ".safetensors")


def write_contents(folder: Path) -> None:
    """Write the list of a new folder's files into it."""
    files = {name: size for name, size in sorted(_files(folder)) if name != CONTENTS}
    text = json.dumps({**stamp(), "files": files}, indent=1)
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")


def check_apart(target: Path) -> None:
    """Refuse an output that exists and is, holds or hard-links an input of this run.

    Raises:
        LoraFxError: Names the input.
    """
    run = run_of_files()
    if run is None or not os.path.lexists(target):
        return
    found = target.lstat()
    name = run.inodes.get((found.st_dev, found.st_ino))
    inputs = {Path(os.path.realpath(path)): name for path, name in run.paths.items()} | run.paths
    for place in (Path(os.path.abspath(target)), Path(os.path.realpath(target))):
        name = name or inputs.get(place)
        held = name or next((n for p, n in inputs.items() if place in p.parents), None)
        if held is not None:
            inside = "" if held == name else ", which lies in it"
            raise LoraFxError(
                f"{target}: the output would replace the input {held}{inside}",
                "inputs are never changed: choose another output",
            )


def check_replaceable(target: Path, new: Path | None, names: Collection[str] | None) -> None:
    """Refuse to replace what is not of lora-fx's making.

    Args:
        target: What is there.
        new: What takes its place; None while that is not written yet.
        names: The files that a new folder will have, where that is known before it is written.

    Raises:
        LoraFxError: Says what is there.
    """
    link = target.is_symlink()
    if link and not target.exists():
        return
    mode = target.stat().st_mode
    folder = stat.S_ISDIR(mode)
    if target.name == ".git" or (folder and ".git" in os.listdir(target)):
        raise LoraFxError(f"{target}: a git repository is not replaced", _AWAY)
    if not (folder or stat.S_ISREG(mode)):
        raise LoraFxError(f"{target}: not a regular file or folder", "choose another output")
    if new is not None and new.is_dir() != folder:
        there, made = ("folder", "file") if folder else ("file", "folder")
        raise LoraFxError(f"{target} is a {there}, and a {made} would replace it", _AWAY)
    if not folder:
        _check_file(target, new)
    elif not link:  # a link to a folder goes alone
        known = {n for n, _ in _files(new)} if new is not None else names
        if foreign := _foreign(target, known):
            raise LoraFxError(
                f"{target}: the folder holds more than lora-fx wrote: {some(foreign, 5)}", _AWAY
            )


def _check_file(target: Path, new: Path | None) -> None:
    if not target.stat().st_size:
        return
    there = kind_of(target)
    made = there if new is None else kind_of(new)
    if there is None or there != made:
        known = f"it is {there}" if there else "it is no file that lora-fx writes"
        wanted = f", and {made} would replace it" if made and new is not None else ""
        raise LoraFxError(f"{target}: --force does not replace it: {known}{wanted}", _AWAY)


def kind_of(file: Path) -> str | None:
    """What a file of a kind that lora-fx writes is; None for any other."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if (adapters := adapter_files()) is not None:
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
    with contextlib.suppress(LoraFxError):
        found = json_object(file.read_bytes(), str(file)) if head.lstrip()[:1] == b"{" else {}
        if isinstance(found.get("version"), int) and "format" in found:
            return "JSON of lora-fx"
    return None


def _begins_as_safetensors(file: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 8 + length <= file.stat().st_size


def _foreign(folder: Path, names: Collection[str] | None) -> list[str]:
    """Names of a folder's files that lora-fx did not write, or that were changed since."""
    there = {n: size for n, size in _files(folder) if not _is_clutter(n.rpartition("/")[2])}
    if not 0 <= there.get(CONTENTS, -1) <= MAX_JSON:
        return [] if names is None else [n for n in there if n not in names]
    text = (folder / CONTENTS).read_bytes()
    try:
        listed = json_object(text, CONTENTS).get("files")
    except LoraFxError:
        return [CONTENTS]
    known = listed if isinstance(listed, dict) else {}
    return [n for n, size in there.items() if n != CONTENTS and known.get(n) != size]


def _is_clutter(name: str) -> bool:
    """True for what desktops and network file systems leave in a folder."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith(".nfs")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """(name, size) of every file below a folder; of a link, pipe or device the size is -1."""
    for path in sorted(folder.iterdir()):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            yield from ((f"{path.name}/{name}", size) for name, size in _files(path))
        else:
            yield path.name, found.st_size if stat.S_ISREG(found.st_mode) else -1
