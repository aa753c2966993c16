"""Saving and loading of adapters in any format: `save_adapter` and `load_adapter`.

The content of a file tells its format. Output is written to a temporary sibling and renamed, so a
crash leaves the old adapter or none, never half of one. Inputs are never changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

from lora_fx.adapter.adapter import Adapter, check_entries
from lora_fx.adapter.evaluated import refuse_evaluated
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import is_lora_or_dora, variant_of
from lora_fx.adapter.vera import refuse_unknown_inputs
from lora_fx.errors import LoraFxError, expect, expect_path, explained
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.hub import PREFIX, known_as, local
from lora_fx.files.read import trusting
from lora_fx.formats.components import is_pipeline, names_of, split_component
from lora_fx.formats.detect import (
    check_elements,
    format_for,
    format_in,
    format_of,
    is_adapter,
    look,
    tensor_file,
)
from lora_fx.formats.format import Format as AdapterFormat
from lora_fx.formats.installed import InstalledFormat
from lora_fx.formats.naming import ForeignNames, one_model
from lora_fx.formats.probe_beside import with_probe
from lora_fx.formats.registry import FORMATS, FormatName
from lora_fx.formats.unsupported import refused
from lora_fx.probe.carried import FIELD, carried, without_probe

__all__ = [
    "FORMATS", "AdapterLike", "Format", "adapter_name", "as_adapter", "check_elements",
    "check_real", "format_for", "format_of", "is_adapter", "load_adapter", "save_adapter",
    "save_for", "tensor_file", "without_ending",
]  # fmt: skip

Format = FormatName


def check_real(updates: Updates) -> None:
    """Raise for complex factors: every reader of these formats would read them as real."""
    for key, update in updates.items():
        if "c" in (update.a.dtype.kind, update.b.dtype.kind):
            raise LoraFxError(
                f"the update of {key!r} has complex A and B, but adapter files hold real numbers",
                "fold it into the model with lora_fx.fold, or save both as a .pt2 file",
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
        path: A folder to create, or one file if its suffix is one of the format's. Some formats
            are always one file.
        format: The name of a format (docs/convert.md describes them), also of one that another
            installed package brings.
        force: Replace an adapter that is there already. A folder that holds anything else is
            never replaced.
        base: Folder of the adapter's model, whose config.json gguf reads.

    Returns:
        Notes: what other readers of the format will not see.

    Raises:
        LoraFxError: The output exists or cannot be written, or the format is unknown or cannot
            store this adapter.
    """
    expect(adapter, Adapter, "adapter", "an Adapter", "call save_adapter(adapter, path)")
    check_entries(adapter)
    expect_path(path, "path", "call save_adapter(adapter, path)")
    writer = _writer(format)
    check_real(adapter.lowrank)
    refuse_evaluated(adapter, "the adapter", f"a file of format {format}")
    _check_variants(adapter, writer)
    _check_invocation(adapter, writer)
    if not writer.keeps_variants:
        refuse_unknown_inputs(adapter.entries, adapter.metadata, f"format {format}")
    if not adapter.entries and not writer.takes_empty:
        raise LoraFxError("the adapter has no update", "check that it was saved after training")
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))  # replace the file, and not the link
    single = _is_one_file(writer, target)
    if writer.one_model:
        adapter = one_model(adapter, f"format {format}")
    home = Path(local(base)) if writer.takes_base and base else None
    adapter, notes_on_probe = carried(adapter)
    if FIELD in adapter.metadata and not writer.keeps_probe:
        adapter = replace(adapter, metadata=without_probe(adapter.metadata))
        notes_on_probe = [f"the probe is not written: format {format} has no place for it"]
    with explained(target, itself=True):
        is_empty_folder = target.is_dir() and not single and not any(target.iterdir())
        with _output(target, writer, force or is_empty_folder) as stage:
            notes = writer.write(adapter, stage, home)
            _check_readable(stage, writer)
    return (*notes, *notes_on_probe, *_notes_on_variants(adapter, writer))


def save_for(
    graph: str, adapter: Adapter, path: str | Path, format: FormatName, *, force: bool = False
) -> tuple[str, ...]:
    """Write a file for a switchable .onnx file, with the names and shapes of the file's inputs.

    Args:
        graph: The .onnx file.
        adapter: What `save_adapter` takes.
        path: The file to write.
        format: One that has such files.
        force: Replace an adapter that is there already.

    Raises:
        LoraFxError: The format has no such files, or the adapter does not fit the graph.
    """
    writer = FORMATS.get(format) or _writer(format)
    if not writer.fits_graphs:
        fitting = [candidate for candidate in FORMATS.importable() if candidate.fits_graphs]
        names = " or ".join(candidate.name for candidate in fitting)
        hint = "pass -o " + " or ".join(f"X{candidate.suffixes[0]}" for candidate in fitting)
        raise LoraFxError(f"--for works with {names}, not with {format}", hint)
    target = Path(path)
    check_output(target, force=force)
    if target.name.endswith(".onnx_adapter"):
        from lora_fx.formats.onnx_adapter import check_name

        check_name(graph, adapter, target)
    with replacing(target, force=force) as stage:
        notes = writer.write_for(graph, adapter, stage)
    return (*notes, *_notes_on_variants(adapter, writer))


def _check_variants(adapter: Adapter, writer: AdapterFormat) -> None:
    """Raise for an update that is no sum W + s·b·a, if the format stores only A and B."""
    if writer.keeps_variants:
        return
    for key, update in adapter.lowrank.items():
        if not is_lora_or_dora(update):
            why = f"variant {update.variant} does not add s·B A to the weight"
            raise refused(f"a file of format {writer.name}", key, why)


def _check_invocation(adapter: Adapter, writer: AdapterFormat) -> None:
    """Raise for an aLoRA, if the format has no place for the tokens that invoke it."""
    if not adapter.invocation or writer.keeps_invocation:
        return
    keeping = [name for name in FORMATS.writers() if FORMATS[name].keeps_invocation]
    raise LoraFxError(
        f"format {writer.name} has no place for invocation tokens: whoever reads the file would "
        "apply the aLoRA to every token",
        f"write format {' or '.join(keeping)}",
    )


def _notes_on_variants(adapter: Adapter, writer: AdapterFormat) -> list[str]:
    """Return a note on each variant that the format stores only as ΔW, without its own tensors."""
    if writer.keeps_variants:
        return []
    variants = {variant_of(update).name: variant_of(update) for update in adapter.lowrank.values()}
    return [
        f"updates of variant {name} are written as plain LoRA with the same ΔW"
        for name, variant in variants.items()
        if not variant.peft_type
    ]


def _writer(format: str) -> AdapterFormat:
    """Return the format of this name; raise if it cannot be written."""
    writer = FORMATS.get(format)
    if writer is None or writer.only_read:
        why = "lora-fx only reads this format" if writer else "the format is unknown"
        raise LoraFxError(
            f"an adapter cannot be written as {format!r}: {why}",
            f"use one of the formats {', '.join(FORMATS.writers())}",
        )
    return writer


@contextlib.contextmanager
def _output(target: Path, writer: AdapterFormat, force: bool) -> Iterator[Path]:
    """A block with a temporary path that becomes the output; raise if it may not be replaced."""
    if target.exists() or str(target).startswith(PREFIX):
        check_output(target, force=force, names=writer.folder_files)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, force=force) as stage:
        yield stage


def _check_readable(written: Path, writer: AdapterFormat) -> None:
    """Raise if load_adapter would not read the written file as its (installed) format."""
    if not isinstance(writer, InstalledFormat):
        return
    detecting: list[str] = []
    with contextlib.suppress(LoraFxError):  # which names the temporary file
        head = look(tensor_file(written))
        detecting = [format.name for format in FORMATS.detecting(head)]
    if detecting != [writer.name]:
        readers = " and ".join(detecting) or "no format"
        raise LoraFxError(
            f"{written.name}: not written: {writer} made a file that {readers} would read",
            f"report it to the authors of {writer.package}",
        )


def load_adapter(
    path: str | PathLike[str],
    trust: bool = False,
    *,
    base: str | Path | None = None,
    most: int | None = None,
    resolve: bool = True,
) -> Adapter:
    """Read an adapter in any format (docs/convert.md describes them).

    Formats that other installed packages bring are read too. An .onnx file is one that `insert`
    wrote, with branches that were trained since.

    Args:
        path: A file or folder, or hf:ORG/NAME[/PART][@REVISION].
        trust: Also open pickles, with torch's unpickler that runs no code: adapter_model.bin, and
            the model's.
        base: Folder (or file) of the model that it is for, where the names or the rows of the
            file depend on it. Only names and config.json are read.
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
    expect_path(path, "path", "call load_adapter(path)")
    file = tensor_file(Path(local(path, files=FORMATS.files_of_folders)))
    base = local(base) if base else None
    if file.suffix == ".onnx":
        # needs onnx_ir, which the others do without
        from lora_fx.onnx.inserted_branches import adapter_in

        return adapter_in(file)
    if most is not None:
        check_elements(file, most)
    head = look(file)
    format = format_in(file, head)
    home = Path(base) if format.takes_base and base else None
    adapter = format.read(file, home)
    if isinstance(format, InstalledFormat):
        adapter = _with_failures(adapter)
    adapter = with_probe(adapter, file, head)
    if not adapter.entries:
        raise LoraFxError(
            f"{file}: the adapter has no update", "check that the adapter was saved after training"
        )
    if base is None or adapter.names is None or not resolve:
        return adapter
    return _resolved(adapter, base)


def _resolved(adapter: Adapter, base: str | Path) -> Adapter:
    """Return the adapter with a model's names as keys; in a pipeline, with the component first."""
    resolved = adapter.resolved(names_of(base))
    components = {split_component(key)[0] for key in resolved} - {""}
    if components and is_pipeline(base):
        return replace(resolved, names=ForeignNames("diffusers", tuple(sorted(components))))
    return resolved


def _with_failures(adapter: Adapter) -> Adapter:
    """Return the adapter with a note on each format that could not be tried on the file."""
    failures = FORMATS.failures()
    if not failures:
        return adapter
    unasked = [f"this format was not tried on the file: {error.message}" for error in failures]
    notes = [*adapter.metadata.get("notes", []), *unasked]
    return replace(adapter, metadata={**adapter.metadata, "notes": notes})


AdapterLike = str | PathLike[str] | Adapter


def adapter_name(path: str | PathLike[str]) -> str:
    """Return an adapter's name in a file that holds several: its folder or file, without suffix.

    >>> adapter_name("runs/french"), adapter_name("german.onnx_adapter")
    ('french', 'german')
    """
    return without_ending(Path(known_as(fspath(path))).resolve().name)


def without_ending(name: str) -> str:
    """Return the name of an adapter's file without its format's suffix."""
    return name.removesuffix(FORMATS.suffix_of(name))


def as_adapter(given: AdapterLike) -> Adapter:
    """Return the given adapter, or load it if a path is given."""
    if isinstance(given, Adapter):
        check_entries(given)
        return given
    return load_adapter(given)


def _is_one_file(writer: AdapterFormat, path: Path) -> bool:
    """Whether to write one file and not a folder; raise if the format has no such output."""
    if path.suffix in writer.suffixes:
        return True
    has_ending_of_another = FORMATS.suffix_of(path.suffix)
    if has_ending_of_another or not writer.folder_files:
        possible_names = [f"a name that ends in {suffix}" for suffix in writer.suffixes[:1]]
        if writer.folder_files:
            possible_names.append("a folder")
        raise LoraFxError(
            f"{path}: format {writer.name} needs {' or '.join(possible_names)}",
            f"choose another name, and lora-fx convert it afterwards to {path.name}",
        )
    return False
