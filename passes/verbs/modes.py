"""The export modes other than `merged`, each with its own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.options import Selectors, is_given
from lora_fx.spellings import warn_caller
from lora_fx.text import Json

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Adapters are chosen run by run; see `lora_fx.onnx.Session`.

    Attributes:
        include: Targets instead of the adapters', or of the default plan's without adapters.
        exclude: Targets to leave out.
        rank: Of a .pt2 file: the rank that A and B have in every run, to which adapters of lower
            ranks are padded; None where each may have any.
        largest: Of a .pt2 file: the largest sizes of free dimensions by name (batch, length …), and
            `rank` for free ranks; what compiles the program may plan memory for them.
        variant: dora: every slot takes adapters that are DoRA too, by an input for factors of rows.
            lora, or None: only slots of `adapters` that are DoRA do.
    """

    name: ClassVar[str] = "switch"
    include: Selectors = None
    exclude: Selectors = None
    rank: int | None = None
    largest: Mapping[str, int] | None = None
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """An adapter is chosen when a session is made.

    Attributes:
        include: Targets instead of the adapters', or of the default plan's without adapters.
        exclude: Targets to leave out.
        rank: The largest rank that an adapter may have; the largest of `adapters`, or 16, where
            None.
        variant: As of Switch.
    """

    name: ClassVar[str] = "load"
    include: Selectors = None
    exclude: Selectors = None
    rank: int | None = None
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Every row of a batch chooses its own adapter.

    Attributes:
        scales: Add an input of weights by row.
    """

    name: ClassVar[str] = "batch"
    scales: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A training step for ONNX Runtime, written with the forward; see docs/train-onnx.md.

    Attributes:
        include: Targets instead of the adapter's, or of the default plan's without one.
        exclude: Targets to leave out.
        rank: The rank of a new adapter; 8 where None.
        loss: ce, mse, or a function of (output, labels) that torch can trace, with labels as ce
            has them. Where None the model's own, if its forward takes `labels`, else ce.
        optimizer: adamw or sgd; adamw where None.
        weight_decay: That of the optimizer; 0.01 where None.
        clip: The longest gradient, as the norm of all together; 1 where None, 0 for any.
    """

    name: ClassVar[str] = "train"
    include: Selectors = None
    exclude: Selectors = None
    rank: int | None = None
    loss: str | Loss | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    clip: float | None = None


ModeOptions = Switch | Load | Batch | TrainStep
BY_NAME: Mapping[str, type[ModeOptions]] = {
    kind.name: kind for kind in (Switch, Load, Batch, TrainStep)
}


def options_of_mode(mode: str | ModeOptions, keywords: Json) -> tuple[str, Json]:
    """Return the name of a mode, and the options that only modes have.

    Args:
        mode: A name, or one of the classes above.
        keywords: The same options as keywords of `export`. Beside a name they go on working.

    Raises:
        LoraFxError: A keyword beside an object that has it as a field.

    Warns:
        FutureWarning: A keyword beside the name of a mode whose class has it as a field.
    """
    if not isinstance(mode, (str, ModeOptions)):
        classes = ", ".join(f"lora_fx.{kind.__name__}(…)" for kind in BY_NAME.values())
        raise LoraFxError(
            f"mode is of type {type(mode).__name__}; expected a name or one of {classes}",
            'pass mode="switch", for example',
        )
    if isinstance(mode, str):
        if mode in BY_NAME:
            _warn_of_keywords(BY_NAME[mode], keywords)
        return mode, keywords

    kind = type(mode)
    options = dict(keywords)
    for name in field_names(kind):
        if is_given(keywords.get(name)):
            raise LoraFxError(
                f"{name}= with mode=lora_fx.{kind.__name__}(…), which has this option too",
                f"pass it to the mode only: {kind.__name__}({name}=…)",
            )
        options[name] = getattr(mode, name)
    return mode.name, options


def _warn_of_keywords(kind: type[ModeOptions], keywords: Json) -> None:
    """Warn of keywords that are now fields of a mode's class."""
    names = [name for name in field_names(kind) if is_given(keywords.get(name))]
    if names:
        fields_of_mode = ", ".join(f"{name}=…" for name in names)
        spelling = f"mode=lora_fx.{kind.__name__}({fields_of_mode})"
        warn_caller(f"options of mode {kind.name} are written {spelling} now")


def field_names(kind: type[ModeOptions]) -> tuple[str, ...]:
    """Return the names of a mode's options."""
    return tuple(field.name for field in fields(kind))
