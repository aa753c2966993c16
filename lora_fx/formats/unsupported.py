"""Errors and notes for updates that a format cannot store."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError

KEEPS = "save it as peft, which keeps everything"


def refused(what: str, key: str, why: str, hint: str = KEEPS) -> LoraFxError:
    """An error for an update that a kind of file cannot store."""
    return LoraFxError(f"{what} cannot store the update of {key!r}: {why}", hint)


def turned_notes(adapter: Adapter, format: str) -> list[str]:
    """A note about weights that are stored [in, out], which a format cannot express."""
    if not adapter.metadata.get("fan_in_fan_out"):
        return []
    return [f"the model stores weights [in, out], but readers of {format} expect [out, in]"]
