"""The one error that users see."""

from __future__ import annotations

import re
from collections.abc import Mapping


class LoraFxError(Exception):
    """Something the user can mend: one line that says what is wrong, and a hint.

    Args:
        message: What was found and what was expected, naming the file and the tensor.
        hint: What to do about it, one line; may be empty.
        exit_code: 2 for refused or misused input, 1 where the input was good and the answer is no.
    """

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.told = False  # True once a command has shown it in its JSON

    def __str__(self) -> str:
        """Message and hint, as a traceback prints them."""
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message


class CaptureError(LoraFxError):
    """The model could not be captured as a graph; the message names the line of the user's code."""


class NoEffectError(LoraFxError):
    """The inputs were good and the answer is no: nothing changed, or two models differ."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, exit_code=1)


class DeadTargetError(NoEffectError):
    """No gradient reaches a target."""


class MisfitError(LoraFxError):
    """An adapter does not fit a model: it was made for another, most likely."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "was the adapter trained on another model?")


def stamp(number: int = 1) -> dict[str, int]:
    """What the JSON of every file of ours begins with: the number of its format.

    lora-fx 0.1 reads `version`, and later ones `format` where it is there.
    """
    return {"version": number, "format": number}


def check_format(data: Mapping[str, object], where: str, known: int = 1) -> None:
    """Check the number of a file of ours.

    Args:
        data: Its JSON, with `format`, or with `version` as 0.1 wrote it.
        where: The file, for messages.
        known: The highest number that this lora-fx reads.

    Raises:
        LoraFxError: A later lora-fx wrote the file, or there is no such number.
    """
    number = data.get("format", data.get("version"))
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise LoraFxError(
            f"{where}: format {number!r}; expected a whole number from 1 to {known}",
            "was the file edited?",
        )
    if number > known:
        raise LoraFxError(
            f"{where}: format {number}; this lora-fx knows formats up to {known}",
            "a later lora-fx wrote the file: update lora-fx",
        )


def one_line(text: object, limit: int = 300) -> str:
    """`text` folded to one line of at most `limit` characters, without colours of a terminal."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
