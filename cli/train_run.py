"""A run of train: the processes that share it, and the states that it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.output import note, say
from lora_fx.errors import LoraFxError, Terminated

if TYPE_CHECKING:
    from lora_fx.fx.train.processes import Processes
    from lora_fx.fx.train.settings import Saving


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes of the run, of which the first alone prints; a place for each on `device`.

    Yields (Processes, device). A process that ends because another one failed says nothing.
    """
    from lora_fx.fx.train.processes import Elsewhere, one_by_accelerate, processes

    try:
        with processes(device.startswith("cuda")) as world:
            if not world.first:
                click.get_current_context().find_root().obj["quiet"] = True
            if world.size > 1:
                note(f"{world.size} processes: each takes a share of every batch")
                device = f"cuda:{world.local}" if device == "cuda" else device
            elif one_by_accelerate():
                note(
                    "accelerate launch --cpu started one process: it starts several by MPI alone "
                    "(--mpirun_hostfile); --multi_gpu or torchrun starts them"
                )
            try:
                yield world, device
            except KeyboardInterrupt as stop:  # which came to all of them
                if world.first:
                    raise
                raise click.exceptions.Exit(143 if isinstance(stop, Terminated) else 130) from None
    except Elsewhere as e:
        raise click.exceptions.Exit(e.exit_code) from None


@contextlib.contextmanager
def stateful(saving: Saving) -> Iterator[None]:
    """What is stopped in this block says which state it leaves."""
    from lora_fx.fx.train.state_folder import step_of

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
