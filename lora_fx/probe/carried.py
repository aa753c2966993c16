"""The probe that an adapter carries from file to file, as text in its metadata.

It is of one state of the adapter: a probe names the hash of that one, and where the adapter is
another by now, it is left behind.
"""

from __future__ import annotations

from dataclasses import replace

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.probe.probe import Probe
from lora_fx.text import Json, JsonView

FIELD = "probe"
"""The field of an adapter's metadata that has the text."""
MODE = "adapter"
OTHER_ADAPTER = (
    "the probe is not written: it is of the adapter as it was, before it was changed or renamed"
)


def without_probe(metadata: JsonView) -> Json:
    """Return metadata without a probe."""
    return {name: value for name, value in metadata.items() if name != FIELD}


def is_of(probe: Probe, digest: str) -> bool:
    """Whether a probe was made of one adapter, with this hash, and of nothing else."""
    hashes = probe.facts.get("adapters")
    return (
        probe.mode == MODE
        and isinstance(hashes, dict)
        and len(probe.adapters) == 1
        and list(hashes.values()) == [digest]
    )


def carried(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Return the adapter as it is written: with its probe where that is of it, and notes."""
    text = adapter.metadata.get(FIELD)
    if text is None:
        return adapter, []
    if isinstance(text, str) and is_of(Probe.from_text(text, "the adapter"), adapter_hash(adapter)):
        return adapter, []
    return replace(adapter, metadata=without_probe(adapter.metadata)), [OTHER_ADAPTER]
