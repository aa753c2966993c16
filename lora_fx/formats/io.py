"""Saving and loading adapters, whatever the format: `save_adapter` and `load_adapter`.

What a file is is told by its content. Output is written to a temporary sibling and renamed, so a
crash leaves the old adapter or none, never half of one. Inputs are never changed.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from lora_fx.adapter import Adapter
from lora_fx.checkpoint.osfile import explain, replacing
from lora_fx.checkpoint.strict import read_header
from lora_fx.errors import LoraFxError
from lora_fx.formats import peft
from lora_fx.formats.tensorfile import refuse_other_kinds

FORMATS: dict[str, ModuleType] = {"peft": peft}
_REPLACEABLE = frozenset((peft.CONFIG, peft.WEIGHTS, peft.PICKLED, "README.md"))


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
        LoraFxError: The output exists or cannot be written, the format is unknown, or it cannot
            say this adapter.
    """
    writer = FORMATS.get(format)
    if writer is None:
        raise LoraFxError(f"no adapter format {format!r}", f"formats: {', '.join(FORMATS)}")
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # replace what it points to
    single = path.suffix == ".safetensors"
    _check_free(path, single, force)
    write = writer.write_file if single else writer.write
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, force=True) as stage:
            _check_free(path, single, force)  # another run may have ended since
            notes: tuple[str, ...] = write(adapter, stage)
    except OSError as error:
        raise explain(error, path) from error
    return notes


def load_adapter(path: str | Path, trust: bool = False) -> Adapter:
    """Read an adapter: a PEFT folder, or a .safetensors file with a config inside or beside it.

    Args:
        path: Local; nothing is downloaded.
        trust: Also open adapter_model.bin, a pickle, with torch's unpickler that runs no code.

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
            return load_adapter(path.parent, trust)
        if not trust or path.suffix != ".bin":
            refuse_other_kinds(path)
        return peft.read(path, trust)
    pickled = path / peft.PICKLED
    if (path / peft.WEIGHTS).is_file() or (trust and pickled.is_file()):
        return peft.read(path, trust)
    if pickled.is_file():
        raise LoraFxError(
            f"{pickled}: a pickle; expected {peft.WEIGHTS}. Unpickling can run any code",
            "--trust (trust=True) opens it with torch's unpickler that runs no code; better get "
            "the adapter as safetensors",
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


def is_adapter(path: str | Path) -> bool:
    """True for what load_adapter would read: decided by files and headers, not by names."""
    path = Path(path)
    if path.is_dir():
        return (path / peft.WEIGHTS).is_file() or (path / peft.CONFIG).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return "lora_fx" in read_header(path).metadata or (path.parent / peft.CONFIG).is_file()
