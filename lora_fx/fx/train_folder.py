"""A run's state on disk: a folder of state.json and state.safetensors, replaced as a whole.

Numbers that JSON would round are tensors; floats in JSON are written so that they come back the
same. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.safetensors import read_tensors, write_tensors

VERSION = 1
WORDS, TENSORS = "state.json", "state.safetensors"


def check_folder(folder: str, *, force: bool) -> None:
    """Refuse, before any work, a folder that no state can be written to.

    Args:
        folder: To be made.
        force: Replace a state that is there; a folder that holds anything else never is.
    """
    check_output(folder, force=force)
    path = Path(folder)
    if path.exists() and not (
        path.is_dir() and {p.name for p in path.iterdir()} <= {WORDS, TENSORS}
    ):
        raise LoraFxError(f"{folder} holds other things than a training state", "choose another")


def write_folder(folder: str, words: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Write a state; the old one stands until the new one is whole and on disk."""
    with replacing(folder, force=True) as stage:
        check_folder(folder, force=True)
        stage.mkdir()
        text = json.dumps({"version": VERSION, **words}, indent=1, allow_nan=False)
        (stage / WORDS).write_text(text + "\n", encoding="utf-8")
        write_tensors(stage / TENSORS, tensors, {})


def step_of(folder: str) -> int | None:
    """The step of a state; None where there is none."""
    try:
        return int(read_folder(folder)[0]["step"])
    except (LoraFxError, LookupError, TypeError, ValueError):
        return None


def read_folder(folder: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """A state's JSON and tensors.

    Raises:
        LoraFxError: There is none, or it is damaged or of another version.
    """
    path = Path(folder)
    if not (path / WORDS).is_file() or not (path / TENSORS).is_file():
        raise LoraFxError(
            f"{folder}: no training state: {WORDS} and {TENSORS} are not both there",
            "train --save-state writes one",
        )
    try:
        words = json.loads((path / WORDS).read_text(encoding="utf-8"))
        if not isinstance(words, dict):
            raise TypeError("no object")
    except (ValueError, TypeError, OSError) as e:
        raise LoraFxError(f"{path / WORDS}: damaged: {one_line(e)}", "start anew") from e
    if words.get("version") != VERSION:
        raise LoraFxError(
            f"{path / WORDS}: a state of version {words.get('version')!r}; expected {VERSION}",
            "go on with the version of lora-fx that wrote it",
        )
    return words, read_tensors(path / TENSORS)[0]
