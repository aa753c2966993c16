"""The probe of an adapter: in the header of its file, or beside the file in its folder."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError, type_of
from lora_fx.files.atomic import replacing
from lora_fx.files.permissions import copy_file
from lora_fx.files.read import read_bytes
from lora_fx.files.replaceable import PROBE
from lora_fx.files.tensor_files import copy_with_text
from lora_fx.formats.detect import format_in, look, tensor_file
from lora_fx.formats.format import FileHead
from lora_fx.formats.registry import FORMATS
from lora_fx.probe.carried import FIELD, without_probe
from lora_fx.probe.probe import MOST_BYTES, PROPERTY, Probe


def with_probe(adapter: Adapter, file: Path, head: FileHead) -> Adapter:
    """Return an adapter with the text of its file's probe in its metadata.

    A damaged one is left out, and the notes say so.

    Args:
        adapter: As its format read it; its metadata has the text where that is in the file.
        file: The file of its tensors.
        head: That file's.
    """
    metadata = without_probe(adapter.metadata)
    try:
        text = _text_of(adapter, file, head)
        if text is None:
            return replace(adapter, metadata=metadata) if FIELD in adapter.metadata else adapter
        Probe.from_text(text, str(file))
    except LoraFxError as e:
        notes = [*metadata.get("notes", []), f"the probe is not read: {e.message}"]
        return replace(adapter, metadata={**metadata, "notes": notes})
    return replace(adapter, metadata={**metadata, FIELD: text})


def check_probe(path: str | PathLike[str]) -> None:
    """Raise if an adapter's probe is damaged; an adapter without one passes."""
    file = tensor_file(Path(path))
    adapter = format_in(file, look(file)).read(file)
    text = _text_of(adapter, file, look(file))
    if text is not None:
        Probe.from_text(text, str(file))


def add_probe(path: Path, probe: Probe) -> None:
    """Put a probe into an adapter that was written before; its other bytes stay.

    Args:
        path: A folder, or one .safetensors file.
        probe: Of this adapter.

    Raises:
        LoraFxError: A file of another format, which has no place for one.
    """
    if path.is_file() and path.suffix != ".safetensors":
        raise LoraFxError(
            f"{path}: a probe is added to adapter folders and .safetensors files",
            "convert the adapter: lora-fx convert",
        )
    with replacing(path, force=True, own=True) as stage:
        if path.is_file():
            copy_with_text(path, stage, PROPERTY, probe.to_text())
            return
        stage.mkdir()
        for name in FORMATS.names_of_input():
            if name != PROBE and (path / name).is_file():
                copy_file(path / name, stage / name)
        (stage / PROBE).write_text(probe.to_text(), encoding="utf-8")


def _text_of(adapter: Adapter, file: Path, head: FileHead) -> str | None:
    """Return the text of the probe that belongs to a file; None where there is none."""
    text = adapter.metadata.get(FIELD, head.metadata.get(PROPERTY))
    if isinstance(text, str):
        return text
    if text is not None:
        raise LoraFxError(f"{file}: its probe is {type_of(text)}, not a text", "leave it")
    beside = file.with_name(PROBE)
    if file.name not in FORMATS.names_of_input() or not beside.is_file():
        return None
    data = read_bytes(beside, most=MOST_BYTES)
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise LoraFxError(f"{beside}: it is not text in UTF-8", "write the adapter again") from e
