"""truncate --table: held-out losses of one adapter at every rank; nothing is written."""

from __future__ import annotations

import click

from lora_fx.cli.options import adapter_of, captured, combined, loss_of, training_data
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError
from lora_fx.text import JsonView

TABLE = ("table", "model", "label", "loss", "weights")
"""What table_options give to print_table."""


table_options = combined(
    [
        click.option("--table", metavar="DATA", help="Print its loss at every rank, and no more."),
        click.option("--model", metavar="MODEL", help="Of --table: what ADAPTER was trained on."),
        click.option("--label", default="", metavar="COL", help="Of --table.  [default: labels]"),
        click.option("--loss", default="ce", show_default=True, help="Of --table, as for train."),
        click.option("--weights", metavar="FILE", help="Of --model, where it is built from code."),
    ]
)
"""Options of a table of losses."""


def print_table(
    path: str, output: str | None, goal: JsonView, trust: bool, as_json: bool,
    options: JsonView,
) -> None:  # fmt: skip
    """Losses of an adapter on DATA at lower ranks."""
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
    result = held_out(cap, adapter_of(path, trust), data, loss_of(options["loss"]))
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
