"""The model that a user named, as a module with example inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode and inputs that it can be called with.

    Attributes:
        module: The model.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: What was asked for.
        notes: What has to be said: random weights, casts, code that was not run.
        tokenizer_folder: The folder that holds a tokenizer for it, if one does.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    notes: tuple[str, ...] = ()
    tokenizer_folder: Path | None = None


FORMS = (
    "MODEL is a Hugging Face folder, hf:ORG/NAME, package.module:FACTORY, path/file.py:FACTORY, "
    "timm:NAME or torchvision:NAME"
)
"""The forms in which a user can give a model, for hints."""
