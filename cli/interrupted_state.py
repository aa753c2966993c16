"""The state that an interrupted training leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.output import say
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.fx.train.state import Saving


@contextlib.contextmanager
def stateful(saving: Saving) -> Iterator[None]:
    """What is stopped in this block says which state it leaves."""
    from lora_fx.fx.train.state import step_of

    before = None if saving.resume else _version(saving.folder)
    try:
        yield
    except (KeyboardInterrupt, LoraFxError) as stop:
        folder = saving.folder
        if folder and _version(folder) != before:
            step = step_of(folder)
            state = f"{folder} holds the state of step {step}"
            if step is not None and isinstance(stop, KeyboardInterrupt):
                stop.left = f"{state}: --resume {folder} goes on from there"  # type: ignore[attr-defined]
            elif step is not None and not saving.resume:
                say(state)
        raise


def _version(folder: str | None) -> tuple[int, int] | None:
    """What tells one state of a folder from the next; None where there is no state."""
    if not folder or not Path(folder).is_dir():
        return None
    found = Path(folder).stat()
    return found.st_ino, found.st_mtime_ns
