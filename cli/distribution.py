"""The distribution whose command line runs: lora-fx, or lora-fx-light with some of its commands."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

MESSAGES = ("error", "hint", "message", "notes", "problems", "warnings")
"""The fields of JSON results that hold messages."""


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

        A path in the text stays as it is.

        >>> light = Distribution("lora-fx-light", ("merge",), "", "")
        >>> light.spelled("run lora-fx merge; or lora-fx export, which keeps the base")
        'run lora-fx-light merge; or lora-fx export, which keeps the base'
        >>> light.spelled("/home/lora-fx merge/out and lora-fx[v1]/out")
        '/home/lora-fx merge/out and lora-fx[v1]/out'
        """
        if self.commands is None:
            return text
        words = "|".join([*self.commands, "--help"])
        text = re.sub(rf"(?<![\w./-])lora-fx (?=(?:{words})(?![\w/-]))", f"{self.name} ", text)
        return re.sub(r"(?<![\w./-])lora-fx(?=\[(?:hf|gguf)\](?!/))", self.name, text)

    def spelled_messages(self, value: Any) -> Any:
        """Return a value of JSON in which the messages are spelled so, and no path or name is."""
        if isinstance(value, dict):
            return {
                key: self._spelled_texts(item) if key in MESSAGES else self.spelled_messages(item)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.spelled_messages(item) for item in value]
        return value

    def _spelled_texts(self, value: Any) -> Any:
        """Return a message, or a list of them, in this distribution's spelling."""
        if isinstance(value, str):
            return self.spelled(value)
        if isinstance(value, (list, tuple)):
            return [self._spelled_texts(item) for item in value]
        return self.spelled_messages(value)


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
