"""The options of every command that loads and captures a model."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.cli.options import Rules, flag, option, repeatable
from lora_fx.errors import NoSay


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for loading and capturing a model."""

    weights: str | None = option(
        "--weights", metavar="FILE", help="Load these weights into a model that is built from code."
    )
    inputs_file: str | None = option(
        "--inputs",
        metavar="FILE.npz",
        help="Example inputs, an array for each argument of the model.",
    )
    dynamic: tuple[str, ...] = repeatable(
        "--dynamic",
        "NAME:0=batch,2=h",
        "Name dimensions that may have other sizes than in the example.",
    )
    static: tuple[str, ...] = repeatable(
        "--static", "NAME[:DIM]", "Fix dimensions to their sizes in the example."
    )
    trust: bool = flag(
        "--trust", "Read pickled tensors (.bin, or inside a .pt2), without running code from them."
    )
    no_repeat: bool = flag(
        "--no-repeat", "Trace every layer, even where layers are equal; slower, the same graph."
    )


PROGRAM: Rules = (
    NoSay(
        ("no_repeat",),
        lambda asked: str(asked["model"]).endswith(".pt2"),
        "for {0[model]}, which is traced already",
    ),
)
"""Combinations in which an option has no effect and is refused."""
