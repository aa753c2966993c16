"""The modes of export: which options each has, and what all of them share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.onnx.save import EXTERNAL_OVER, Output, output
from lora_fx.onnx.triton import Repository


@dataclass(frozen=True)
class Writing:
    """How a file is written; the options that every mode has."""

    target: Path
    provider: str = "auto"
    external_over: int = EXTERNAL_OVER
    force: bool = False
    repository: Repository | None = None

    def output(self) -> AbstractContextManager[Output]:
        """The file, and its copy for Triton, which get their names when the block ends."""
        return output(self.target, force=self.force, repository=self.repository)


OPTIONS = {
    "switch": "include and exclude",
    "batch": "scales",
    "merged": "optimise and precision",
    "load": "rank",
}


def meant(mode: str, **given: Any) -> None:
    """Raise for an option that the mode would ignore."""
    if mode not in OPTIONS:
        raise LoraFxError(f"no mode {mode!r}", "merged, switch, load or batch")
    for name, value in given.items():
        if value and name != mode and (name, mode) != ("switch", "load"):
            raise LoraFxError(
                f"mode {mode} would ignore what is for mode {name}: {OPTIONS[name]}", "leave it out"
            )
