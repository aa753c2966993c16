"""Saving and loading adapters, whatever the format: `save_adapter` and `load_adapter`.

What a file is is told by its content. Output is written to a temporary sibling and renamed, so a
crash leaves the old adapter or none, never half of one. Inputs are never changed.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Literal

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Updates
from lora_fx.errors import LoraFxError, expect, expect_path, explained, near_path, one_line
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.hub import PREFIX, known_as, local
from lora_fx.files.read import trusting
from lora_fx.formats import diffusers, gguf, kohya, onnx_adapter, torchtune
from lora_fx.formats.base import FileHead, look
from lora_fx.formats.naming import ForeignNames, is_pipeline, names_of, one_model, split_component
from lora_fx.formats.peft import file as peft

FORMATS: dict[str, ModuleType] = {
    "peft": peft,
    "kohya": kohya,
    "diffusers": diffusers,
    "torchtune": torchtune,
    "onnx_adapter": onnx_adapter,
    "gguf": gguf,
}
"""Name → module with detect(seen), read(path), and write_file and perhaps write for a folder."""

WRITERS = tuple(name for name, module in FORMATS.items() if hasattr(module, "write_file"))
_NO_OUTPUT = (".bin", ".pt", ".pth", ".ckpt", ".onnx", ".pt2", ".json")
ADAPTER_FILES = (peft.CONFIG, peft.WEIGHTS, diffusers.WEIGHTS)
"""What a folder of an adapter can have, whatever its format."""
PICKLED = (peft.PICKLED, "pytorch_lora_weights.bin")
"""The same as pickles, which are never written."""
_ONE_MODEL = ("peft", "onnx_adapter", "gguf")
_OF_A_MODEL = ("torchtune", "gguf")
"""Their names or orders of rows depend on the model: `read` takes its folder, and so does
`write_file`."""
_LARGE = 64 << 20

Format = Literal["peft", "kohya", "diffusers", "onnx_adapter", "gguf"]
"""What an adapter is written as."""


def check_real(updates: Updates) -> None:
    """Raise for factors of complex numbers: every reader of these formats takes them for real."""
    for key, low in updates.items():
        if "c" in (low.a.dtype.kind, low.b.dtype.kind):
            raise LoraFxError(
                f"the update of {key!r} has complex A and B, and adapter files have real numbers",
                "lora_fx.fold puts it into the model; a .pt2 file keeps it beside the model",
            )


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    format: Format = "peft",
    *,
    force: bool = False,
    base: str | Path | None = None,
) -> tuple[str, ...]:
    """Write an adapter.

    Args:
        adapter: Bound, or as a loader returned it.
        path: A folder to create; or, where it ends in .safetensors, .onnx_adapter or .gguf, one
            file. kohya, onnx_adapter and gguf are always one file.
        format: peft, kohya, diffusers, onnx_adapter or gguf.
        force: Replace an adapter that is there already. A folder that holds anything else is
            never replaced.
        base: Folder of the model that it is for, of which gguf reads config.json.

    Returns:
        Notes: what other readers of the format will not see.

    Raises:
        LoraFxError: The output exists or cannot be written, the format is unknown, or it cannot
            say this adapter.
    """
    expect(adapter, Adapter, "adapter", "an Adapter", "save_adapter(adapter, path)")
    expect_path(path, "path", "save_adapter(adapter, path)")
    writer = FORMATS.get(format)
    if writer is None or format not in WRITERS:
        why = "torchtune's names are only read" if writer is torchtune else "no such format"
        raise LoraFxError(
            f"no adapter can be written as {format!r}: {why}", f"formats: {', '.join(WRITERS)}"
        )
    check_real(adapter.lowrank)
    if not adapter.entries and format != "peft":  # which says so in a note
        raise LoraFxError("the adapter has no update", "was it saved before training?")
    path = Path(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # replace what it is
    single = _is_file_of(writer, path, format)
    if format in _ONE_MODEL:
        adapter = one_model(adapter, f"format {format}")
    write = writer.write_file if single else writer.write
    if format in _OF_A_MODEL:
        write = partial(write, base=local(base) if base else None)
    with explained(path, itself=True):
        force = force or (path.is_dir() and not single and not any(path.iterdir()))
        if path.exists() or str(path).startswith(PREFIX):
            check_output(path, force=force, names=ADAPTER_FILES)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, force=force) as stage:
            notes: tuple[str, ...] = write(adapter, stage)
    return notes


def load_adapter(
    path: str | PathLike[str],
    trust: bool = False,
    *,
    base: str | Path | None = None,
    most: int | None = None,
    resolve: bool = True,
) -> Adapter:
    """Read an adapter: of PEFT, kohya, diffusers, torchtune, ONNX Runtime or llama.cpp.

    An .onnx file is one that `insert` wrote, with branches that were trained since.

    Args:
        path: A file or folder, or hf:ORG/NAME[/PART][@REVISION].
        trust: Also open pickles, with torch's unpickler that runs no code: adapter_model.bin, and
            the model's.
        base: Folder (or file) of the model that it is for, where the names or the rows of the
            file depend on it (kohya, diffusers, torchtune, gguf). Only names and config.json are
            read.
        resolve: Give names that only the model can tell as it has them.
        most: Elements that a file above 64 MiB may have, looked at before they are read.

    Returns:
        An Adapter with keys and layouts as the file knows them; `bind` fits it to a model.
        metadata["notes"] lists what should be said to the user.

    Raises:
        LoraFxError: No adapter there, a pickle, content that no format or several fit, or that
            the format's reader refuses.
    """
    if trust:
        with trusting():
            return load_adapter(path, base=base, most=most, resolve=resolve)
    expect_path(path, "path", "load_adapter(path)")
    path, base = tensor_file(Path(local(path))), local(base) if base else None
    if path.suffix == ".onnx":
        from lora_fx.onnx.manifest import adapter_in  # needs onnx_ir, which the others do without

        return adapter_in(path)
    if most is not None:
        check_elements(path, most)
    name = _sniffed(path, look(path))
    more = (base,) if name in _OF_A_MODEL else ()
    adapter: Adapter = FORMATS[name].read(path, *more)
    if not adapter.entries:
        raise LoraFxError(f"{path}: no update in it", "was the adapter saved before training?")
    if base is None or adapter.names is None or not resolve:
        return adapter
    resolved = adapter.resolved(names_of(base))
    parts = sorted({split_component(key)[0] for key in resolved} - {""})
    if parts and is_pipeline(base):
        return replace(resolved, names=ForeignNames("diffusers", tuple(parts)))
    return resolved


def check_elements(path: str | PathLike[str], most: int) -> None:
    """Refuse, before they are read, tensors of more elements than an adapter of a base can have.

    Files up to 64 MiB are read in any case.
    """
    if Path(path).is_file() and os.stat(path).st_size > _LARGE:
        count = look(Path(path)).elements
        if count > most:
            raise LoraFxError(
                f"{fspath(path)}: its tensors have {count} elements; at most {most} are read for "
                "this base, twice as many as that has",
                "is it an adapter of this model?",
            )


AdapterLike = str | PathLike[str] | Adapter


def adapter_name(path: str | PathLike[str]) -> str:
    """What an adapter is called in a file that holds several: its folder or file, without ending.

    >>> adapter_name("runs/french"), adapter_name("german.onnx_adapter")
    ('french', 'german')
    """
    name = Path(known_as(fspath(path))).resolve().name
    return name.removesuffix(".safetensors").removesuffix(".onnx_adapter")


def as_adapter(given: AdapterLike) -> Adapter:
    """An adapter, or that of a path."""
    return given if isinstance(given, Adapter) else load_adapter(given)


def tensor_file(path: Path) -> Path:
    """The one tensor file of an adapter; a pickle where there is no other."""
    if not path.exists():
        raise LoraFxError(f"{path}: no such file or folder", near_path(path, "is it right?"))
    if path.is_file():
        return tensor_file(path.parent) if path.name == peft.CONFIG else path
    for name in (peft.WEIGHTS, diffusers.WEIGHTS, *PICKLED):
        if (path / name).is_file():
            return path / name
    inside = sorted(p.parent.name for p in path.glob(f"*/{peft.WEIGHTS}"))
    hint = f"adapters lie in its folders {', '.join(inside[:5])}" if inside else "is it an adapter?"
    if files := sorted(path.glob("*.safetensors")):
        hint = f"name the file that is one: {files[0]}"
    raise LoraFxError(f"{path}: no {peft.WEIGHTS} in this folder", hint)


def format_of(path: str | Path) -> str:
    """The format of an adapter that is there, by its content; raises as load_adapter does."""
    path = tensor_file(Path(path))
    return "onnx" if path.suffix == ".onnx" else _sniffed(path, look(path))


def format_for(path: str | Path) -> str:
    """The format that an output's name asks for, where only one would be called so.

    >>> format_for("x.onnx_adapter"), format_for("folder")
    ('onnx_adapter', 'peft')
    """
    path = Path(path)
    for name in ("onnx_adapter", "gguf"):
        if path.suffix in FORMATS[name].SUFFIXES:
            return name
    if path.name == diffusers.WEIGHTS:
        return "diffusers"
    if path.suffix == ".safetensors" or path.suffix in _NO_OUTPUT:
        raise LoraFxError(
            f"{path}: the name does not tell the format", f"--format: {', '.join(WRITERS)}"
        )
    return "peft"


def _sniffed(path: Path, seen: FileHead) -> str:
    hits = [name for name, module in FORMATS.items() if module.detect(seen)]
    if not hits and (seen.config or any(".lora_A" in n or ".lora_B" in n for n in seen.names)):
        return "peft"  # whose reader says what is missing
    if len(hits) == 1:
        return hits[0]
    shown = ", ".join(one_line(n, 80) for n in seen.names[:3])
    raise LoraFxError(
        f"{path}: {'could be ' + ' or '.join(hits) if hits else 'no adapter that is known'}: its "
        f"{len(seen.names)} tensors are named {shown or 'nothing'} …",
        f"formats: {', '.join(FORMATS)}",
    )


def _is_file_of(writer: ModuleType, path: Path, format: str) -> bool:
    """True to write one file, False for a folder; raises where the format has no such thing."""
    if path.suffix in writer.SUFFIXES:
        return True
    of_files = {s for module in FORMATS.values() for s in module.SUFFIXES}
    folder = hasattr(writer, "write")
    if path.suffix in of_files or not folder:
        want = f"a name that ends in {writer.SUFFIXES[0]}"
        raise LoraFxError(
            f"{path}: format {format} needs {want}{' or a folder' if folder else ''}",
            "choose another name or another format",
        )
    return False


def is_adapter(path: str | PathLike[str]) -> bool:
    """True for what load_adapter would read: decided by files and headers, not by names."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (*ADAPTER_FILES, *PICKLED))
    if path.suffix not in (".safetensors", ".onnx_adapter", ".gguf") or not path.is_file():
        return path.name in PICKLED
    seen = look(path)
    return seen.config or any(module.detect(seen) for module in FORMATS.values())
