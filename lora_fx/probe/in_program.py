"""The probe of a .pt2 file, as a member of the archive."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.files.program_manifest import add_member, program_member
from lora_fx.probe.probe import MOST_BYTES, Probe

MEMBER = "data/extra/lora_fx_probe.json"
"""The member of the archive, below its root folder; torch.export.load passes over it."""


def add_to_program(path: Path, probe: Probe) -> None:
    """Add a probe to a .pt2 file that was just written."""
    add_member(path, MEMBER, probe.to_text().encode())


def probe_of_program(path: str | PathLike[str]) -> Probe:
    """Return the probe of a .pt2 file, read without its weights.

    Raises:
        LoraFxError: The file cannot be read, has no probe, or a damaged one.
    """
    data = program_member(Path(path), MEMBER, MOST_BYTES)
    if data is None:
        raise LoraFxError(
            f"{fspath(path)}: it has no probe",
            "a .pt2 file of lora-fx export --mode switch has one, unless --probe none is given; or "
            f"compare it with the model: lora-fx verify {fspath(path)} MODEL",
        )
    return Probe.from_text(data, fspath(path))
