"""The processes that share a run of train."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lora_fx.cli.output import note
from lora_fx.errors import Terminated

if TYPE_CHECKING:
    from lora_fx.fx.train.processes import Processes


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """Start the processes of the run; only the first one prints, and each gets a device.

    Yields (Processes, device). A process that ends because another one failed prints nothing.
    """
    from lora_fx.fx.train.processes import (
        Elsewhere,
        one_by_accelerate,
        processes,
        refuse_sharded_launch,
    )

    try:
        with processes(device.startswith("cuda")) as world:
            if not world.first:
                click.get_current_context().find_root().obj["quiet"] = True
            refuse_sharded_launch(os.environ)
            if world.size > 1:
                note(f"{world.size} processes: each takes a share of every batch")
                if device == "cuda":
                    device = f"cuda:{world.local}"
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
                exit_code = 143 if isinstance(stop, Terminated) else 130
                raise click.exceptions.Exit(exit_code) from None
    except Elsewhere as error:
        raise click.exceptions.Exit(error.exit_code) from None
