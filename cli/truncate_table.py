"""truncate --table: held-out losses of one adapter at every rank; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError
from lora_fx.text import JsonView

TABLE = ("table", "model", "label", "loss", "weights")
"""What table_options give to print_table."""


def table_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a table of losses."""
    options = [
        click.option("--table", metavar="DATA", help="Print its loss at every rank, and no more."),
        click.option("--model", metavar="MODEL", help="Of --table: what ADAPTER was trained on."),
        click.option("--label", default="", metavar="COL", help="Of --table.  [default: labels]"),
        click.option("--loss", default="ce", show_default=True, help="Of --table, as for train."),
        click.option("--weights", metavar="FILE", help="Of --model, where it is built from code."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def print_table(
    path: str, output: str | None, goal: JsonView, trust: bool, as_json: bool,
    options: JsonView,
) -> None:  # fmt: skip
    """Losses of an adapter on DATA at lower ranks."""
    from lora_fx.cli.options import adapter_of, captured, training_data
    from lora_fx.fx.load.factory import load_function
    from lora_fx.passes.verbs.plan import held_out

    given = [f"--{k.replace('_', '-')}" for k, v in goal.items() if v is not None]
    if output or given:
        raise LoraFxError(
            f"{given[0] if given else '--output'} has no say beside --table, which writes nothing",
            "look at the table first",
        )
    if not options["model"]:
        raise LoraFxError("--table needs the model", "--model MODEL")
    loaded, cap = captured(options["model"], options["weights"], None, (), (), trust)
    data = training_data(options["table"], loaded, cap, options["label"], 128)
    loss = options["loss"]
    function = load_function(loss) if ":" in loss else loss
    result = held_out(cap, adapter_of(path, trust), data, function)
    for text in result.notes:
        note(text)
    emit(
        as_json,
        "truncate",
        str(result),
        inputs=[{"adapter": path}],
        table=[row.to_json() for row in result.rows],
        examples=result.examples,
    )
