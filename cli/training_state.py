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

    before = None if saving.resume else _written(saving.folder)
    try:
        yield
    except (KeyboardInterrupt, LoraFxError) as stop:
        folder = saving.folder if _written(saving.folder) != before else None
        step = step_of(folder) if folder else None
        said = f"{folder} holds the state of step {step}"
        if step is not None and isinstance(stop, KeyboardInterrupt):
            stop.left = f"{said}: --resume {folder} goes on from there"  # type: ignore[attr-defined]
        elif step is not None and not saving.resume:
            say(said)
        raise


def _written(folder: str | None) -> tuple[int, int] | None:
    """Tells one state from the next; None where there is none."""
    path = Path(folder or "")
    return (path.stat().st_ino, path.stat().st_mtime_ns) if folder and path.is_dir() else None
