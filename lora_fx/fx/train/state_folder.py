"""The folder of a run's state: state.json and state.safetensors, replaced together.

Numbers that JSON would round are tensors; floats in JSON are written so that they come back the
same. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, check_format
from lora_fx.files.atomic import check_output
from lora_fx.files.strict_json import read_json
from lora_fx.files.tensor_files import read_tensors

WORDS = "state.json"
TENSORS = "state.safetensors"


STEP = re.compile(r"checkpoint-\d+")


def check_folder(folder: str, *, force: bool, own: bool = False, limit: int | None = None) -> None:
    """Raise, before any work, for a folder that no state can be written to.

    Args:
        folder: To be made.
        force: Replace a state that is there; a folder that holds anything else never is.
        own: The state of this run, which goes on from it.
        limit: As in Saving; states of another run are not mixed with those of this one.
    """
    path = Path(folder)
    several = checkpoints(path)
    if several and not (limit and own):
        hint = f"choose another folder, or --resume {folder} --save-total-limit N"
        raise LoraFxError(
            f"{folder} already holds states of a run, the last is {several[-1].name}", hint
        )
    if not several:
        check_output(folder, force=force, own=own, names=(WORDS, TENSORS))
    if (path / WORDS).exists() and (limit or STEP.fullmatch(path.name)):
        raise LoraFxError(
            f"{folder} is a single state, which is not overwritten",
            "pass another folder with --save-state DIR",
        )


def checkpoints(folder: Path) -> list[Path]:
    """Return the states in a folder of checkpoints, the oldest first."""
    states = [
        path for path in folder.glob("*") if STEP.fullmatch(path.name) and (path / WORDS).is_file()
    ]
    return sorted(states, key=lambda path: int(path.name.rpartition("-")[2]))


def step_of(folder: str) -> int | None:
    """Return the step of a state; None if there is no state."""
    try:
        return int(read_folder(folder)[0]["step"])
    except (LoraFxError, LookupError, TypeError, ValueError):
        return None


def run_of_state(folder: str) -> str | None:
    """Return the digest of the run that a state is of; None if there is no state."""
    try:
        return run_digest(_words(last_state(folder))["facts"])
    except (LoraFxError, LookupError):
        return None


def run_digest(facts: object) -> str:
    """Return a sha256 of a run's facts, which are equal before and after a resume."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_folder(folder: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a state's JSON and tensors; of several states in a folder, the last.

    Raises:
        LoraFxError: There is none, or it is damaged or of another version.
    """
    path = last_state(folder)
    return _words(path), read_tensors(path / TENSORS)[0]


def last_state(folder: str) -> Path:
    """Return the folder of a state, or of the last one in a folder of several.

    Raises:
        LoraFxError: There is none.
    """
    path = [Path(folder), *checkpoints(Path(folder))][-1]
    if not (path / WORDS).is_file() or not (path / TENSORS).is_file():
        raise LoraFxError(
            f"{folder} is not a training state: it needs both {WORDS} and {TENSORS}",
            "pass a folder that train --save-state wrote",
        )
    return path


def _words(path: Path) -> dict[str, Any]:
    """Read the JSON of a state."""
    words = read_json(path / WORDS, hint="start again")
    check_format(words, str(path / WORDS))
    return words
