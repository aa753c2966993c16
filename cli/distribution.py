"""The distribution whose command line runs: lora-fx, or lora-fx-light with some of its commands."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """A distribution, as its command line shows it.

    Attributes:
        name: Its name, which is also the name of its command.
        commands: The commands that it has; None for all.
        summary: The text of --help above the commands.
        epilog: The text of --help below them.
    """

    name: str
    commands: tuple[str, ...] | None
    summary: str
    epilog: str

    def has(self, command: str) -> bool:
        """Whether the distribution has a command."""
        return self.commands is None or command in self.commands

    def spelled(self, text: str) -> str:
        """Return a text in which this distribution's name stands before the commands it has.

        >>> light = Distribution("lora-fx-light", ("merge",), "", "")
        >>> light.spelled("run lora-fx merge; or lora-fx export, which keeps the base")
        'run lora-fx-light merge; or lora-fx export, which keeps the base'
        """
        if self.commands is None:
            return text
        words = "|".join([*self.commands, "--help"])
        text = re.sub(rf"\blora-fx (?=(?:{words})(?![\w-]))", f"{self.name} ", text)
        return re.sub(r"\blora-fx(?=\[\w)", self.name, text)  # lora-fx[hf]


WHOLE = Distribution(
    name="lora-fx",
    commands=None,
    summary="Insert, train, fold and export low-rank adapters by rewriting a model's graph; merge "
    "them into checkpoint files, extract them from two, and convert them, tensor by tensor.",
    epilog="MODEL is a Hugging Face folder, hf:ORG/NAME[@REVISION] of the Hub, a .safetensors, "
    ".onnx or .pt2 file, package.module:factory, file.py:factory, timm:NAME or torchvision:NAME. "
    "docs/ has a page for each command.",
)

running: ContextVar[Distribution] = ContextVar("running", default=WHOLE)
"""The distribution whose command line runs."""
