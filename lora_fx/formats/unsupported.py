"""Errors and notes on what a format cannot say."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError

KEEPS = "save it as peft, which keeps everything"


def refused(what: str, key: str, why: str, hint: str = KEEPS) -> LoraFxError:
    """An error about an update that a kind of file cannot say."""
    return LoraFxError(f"{what} cannot say the update of {key!r}: {why}", hint)


def turned_notes(adapter: Adapter, format: str) -> list[str]:
    """A note on weights that are stored [in, out], of which a format has no word."""
    if not adapter.metadata.get("fan_in_fan_out"):
        return []
    return [f"the model stores weights [in, out], of which readers of {format} know nothing"]
