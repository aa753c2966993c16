"""Reads ADAPTER[:W] arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.adapter.adapter import Adapter


def split_weight(text: str) -> tuple[str, float]:
    """Split `ADAPTER:W` into (path, W) if ADAPTER exists or is on the Hub; else (text, 1).

    >>> split_weight("adapter"), split_weight("hf:org/name:0.5")
    (('adapter', 1.0), ('hf:org/name', 0.5))
    """
    path, _, number = text.rpartition(":")
    if not path or not (path.startswith("hf:") or Path(path).exists()):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError as error:
        if path.endswith(".py"):
            raise LoraFxError(
                f"{text} is a model, not an adapter", "give the model first, then the adapters"
            ) from error
        raise LoraFxError(
            f"{text}: {number!r} is not a number", f"give a weight, such as {path}:0.5"
        ) from error


def adapter_of(path: str) -> Adapter:
    """Load an adapter and print the notes of its reader."""
    from lora_fx.formats.io import load_adapter

    adapter = load_adapter(path)
    note(*adapter.metadata.get("notes", []))
    return adapter


def named_adapters(texts: Sequence[str]) -> dict[str, Adapter]:
    """The adapters of `ADAPTER[:W]` arguments, by the name of the folder or file."""
    from lora_fx.formats.io import adapter_name

    adapters: dict[str, Adapter] = {}
    for path, weight in map(split_weight, texts):
        name = adapter_name(path)
        if name in adapters:
            raise LoraFxError(f"two adapters are called {name!r}", "rename one of them")
        adapters[name] = adapter_of(path).weighted(weight)
    return adapters
