"""Options of a start that reads data (--init eva, lora-ga), and the batches that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from lora_fx.errors import LoraFxError

START = ("data", "label", "loss")
"""What start_options give to start_from."""
BATCH = 32
"""Examples that run at a time."""


def start_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that inserts and trains nothing."""
    options = [
        click.option("--data", metavar="DATA", help="Data that --init eva or lora-ga reads."),
        click.option("--label", default="", metavar="COL", help="Its labels.  [default: labels]"),
        click.option("--loss", default="ce", show_default=True, help="ce, mse or module:function."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def start_from(
    loaded: Any, cap: Any, init: str, data: str | None, label: str, loss: str
) -> dict[str, Any]:
    """Keyword arguments of insert; empty for a start that reads no data."""
    from lora_fx.adapter.initial import OF_DATA
    from lora_fx.fx.load.factory import load_function

    if init not in OF_DATA:
        if data:
            raise LoraFxError(f"--init {init} reads no data", f"--init {' or '.join(OF_DATA)}")
        return {}
    if not data:
        raise LoraFxError(f"--init {init} reads data", "--data FILE, as train takes it")
    from lora_fx.cli.options import training_data

    computed = load_function(loss) if ":" in loss else loss
    return of_training(training_data(data, loaded, cap, label, 128), init, computed)


def of_training(table: Any, init: str, loss: Any) -> dict[str, Any]:
    """Keyword arguments of insert for a start from the data that is trained on.

    Args:
        table: The data.
        init: The start; {} for one that reads no data.
        loss: ce, mse, or a function.
    """
    from lora_fx.adapter.initial import OF_DATA

    return {"data": batches_of(table), "loss": loss} if init in OF_DATA else {}


def batches_of(table: Any, seed: int = 0) -> Iterator[Mapping[str, Any]]:
    """The columns of one pass over the data."""
    for batch in table.batches(BATCH, seed):
        yield batch.columns


def some_batches(
    data: str | None, loaded: Any, cap: Any, options: dict[str, Any]
) -> Iterator[Mapping[str, Any]] | None:
    """Batches of at most --examples of DATA, drawn by --seed; takes its options out."""
    import numpy as np

    from lora_fx.cli.options import training_data

    label, longest = options.pop("label"), options.pop("max_length")
    most, seed = options.pop("examples"), options.pop("seed")
    if not data:
        return None
    table = training_data(data, loaded, cap, label, longest)
    some = np.random.default_rng(seed).permutation(len(table))[:most]
    return batches_of(table.rows(some), seed)
