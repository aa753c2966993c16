"""Reports the saved state after an interrupted training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.output import say
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.fx.train.settings import Saving


@contextlib.contextmanager
def stateful(saving: Saving) -> Iterator[None]:
    """Add the saved state to the message if this block is interrupted or fails."""
    from lora_fx.fx.train.state_folder import step_of

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
    """A value that changes with every state saved in a folder; None without a folder."""
    if not folder or not Path(folder).is_dir():
        return None
    found = Path(folder).stat()
    return found.st_ino, found.st_mtime_ns
