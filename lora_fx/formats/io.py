"""Saving and loading adapters, whatever the format: `save_adapter` and `load_adapter`.

What a file is is told by its content. Output is written to a temporary sibling and renamed, so a
crash leaves the old adapter or none, never half of one. Inputs are never changed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lora_fx.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.formats import peft
from lora_fx.formats.tensorfile import refuse_other_kinds

FORMATS: dict[str, ModuleType] = {"peft": peft}
_REPLACEABLE = frozenset((peft.CONFIG, peft.WEIGHTS, "adapter_model.bin", "README.md"))


def save_adapter(
    adapter: Adapter, path: str | Path, format: str = "peft", *, force: bool = False
) -> tuple[str, ...]:
    """Write an adapter.

    Args:
        adapter: Bound, or as a loader returned it.
        path: A folder to create; or, where it ends in .safetensors, one file that also holds the
            config.
        format: peft.
        force: Replace an adapter that is there already. A folder that holds anything else is
            never replaced.

    Returns:
        Notes: what other readers of the format will not see.

    Raises:
        LoraFxError: The output exists, the format is unknown, or it cannot say this adapter.
    """
    writer = FORMATS.get(format)
    if writer is None:
        raise LoraFxError(f"no adapter format {format!r}", f"formats: {', '.join(FORMATS)}")
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # replace what it points to
    single = path.suffix == ".safetensors"
    _check_free(path, single, force)
    with _stage(path) as stage:
        write = writer.write_file if single else writer.write
        notes: tuple[str, ...] = write(adapter, stage)
    return notes


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter: a PEFT folder, or a .safetensors file with a config inside or beside it.

    Args:
        path: Local; nothing is downloaded.

    Returns:
        An Adapter with keys and layouts as the file knows them; `bind` fits it to a model.
        metadata["notes"] lists what should be said to the user.

    Raises:
        LoraFxError: No adapter there, a pickle, or content that `formats.peft.read` refuses.
    """
    path = Path(path)
    if not path.exists():
        raise LoraFxError(f"{path}: no such file or folder", "nothing is downloaded; give a path")
    if path.is_file():
        if path.name == peft.CONFIG:
            path = path.parent / peft.WEIGHTS
        refuse_other_kinds(path)
        return peft.read(path)
    if (path / peft.WEIGHTS).is_file():
        return peft.read(path)
    pickled = path / "adapter_model.bin"
    if pickled.is_file():
        raise LoraFxError(
            f"{pickled}: a pickle; expected {peft.WEIGHTS}. Unpickling can run any code",
            "load it with PEFT where it is trusted, and save_pretrained it as safetensors",
        )
    inside = sorted(p.parent.name for p in path.glob(f"*/{peft.WEIGHTS}"))
    raise LoraFxError(
        f"{path}: no {peft.WEIGHTS} in this folder",
        f"adapters lie in its folders {', '.join(inside[:5])}" if inside else "is it an adapter?",
    )


def _check_free(path: Path, single: bool, force: bool) -> None:
    """Raise unless `path` may be written."""
    if not path.exists() or (path.is_dir() and not single and not any(path.iterdir())):
        return
    if not force:
        raise LoraFxError(f"{path}: output exists", "--force (force=True) replaces it")
    if path.is_dir() == single:
        kind, want = ("folder", "file") if single else ("file", "folder")
        raise LoraFxError(
            f"{path}: output exists and is a {kind}; expected a {want} to replace",
            "choose another name",
        )
    others = [] if single else sorted({p.name for p in path.iterdir()} - _REPLACEABLE)
    if others:
        raise LoraFxError(
            f"{path}: output exists and holds more than an adapter: {', '.join(others[:5])}",
            "choose another folder, or remove it yourself",
        )


@contextlib.contextmanager
def _stage(path: Path) -> Iterator[Path]:
    """A sibling to write to, which takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.{secrets.token_hex(4)}"
    stage, old = path.with_name(f"{mark}.tmp"), path.with_name(f"{mark}.old")
    try:
        yield stage
        for file in sorted(stage.iterdir()) if stage.is_dir() else [stage]:
            _sync(file)
        if stage.is_dir():
            _sync(stage)
        if path.is_dir() and any(path.iterdir()):
            path.rename(old)  # a folder with content cannot be renamed over
            try:
                stage.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(stage, path)
        _sync(path.parent)
    finally:
        if stage.is_dir():
            shutil.rmtree(stage, ignore_errors=True)
        else:
            stage.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Fsync a file or a folder; folders cannot be synced on every system."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
