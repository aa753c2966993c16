"""lora-fx truncate: reduce the ranks of an adapter, and report the exact error."""

from __future__ import annotations

from dataclasses import dataclass

import click

from lora_fx.cli.adapter_arguments import adapter_of
from lora_fx.cli.data_arguments import loss_of, refuse_row_labels, training_data
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import ModelOptions
from lora_fx.cli.options import (
    Rules,
    force_option,
    label_option,
    names_of,
    option,
    option_group,
    trust_option,
)
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import Json

NO_SAY: Rules = (
    NoSay(
        ("model", "label", "loss", "weights"),
        lambda asked: not asked["table"],
        "without --table DATA",
    ),
)


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """Options for the goal of a truncation; the user gives one of them."""

    rank: int | None = option(
        "--rank", "-r", type=int, help="Cut every update to at most this rank."
    )
    params: int | None = option(
        "--params", type=int, help="Keep at most this many elements of all A and B together."
    )
    energy: float | None = option(
        "--energy", type=float, help="Keep at least this share of Σσ² over all updates."
    )
    max_error: float | None = option(
        "--max-error",
        type=float,
        help="Accept at most this error ‖ΔW − ΔW'‖/‖ΔW‖ over all updates.",
    )
    max_abs_error: float | None = option(
        "--max-abs-error", type=float, help="Accept at most this error ‖ΔW − ΔW'‖ over all updates."
    )


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options for the data and the model that measure every rank."""

    table: str | None = option(
        "--table",
        metavar="DATA",
        help="Print the loss on this data at every rank, and write nothing.",
    )
    model: str | None = option(
        "--model", metavar="MODEL", help="Name the base model of ADAPTER, for --table."
    )
    label: str = label_option("Name the column of labels, for --table.")
    loss: str = option(
        "--loss", default="ce", help="Choose the loss, for --table: ce, mse or module:function."
    )
    weights: str | None = option(
        "--weights",
        metavar="FILE",
        help="Load these weights into --model, if it is built from code.",
    )


@click.command("truncate", cls=ReportCommand, no_say=NO_SAY)
@click.argument("adapter")
@click.option(
    "-o", "--output", metavar="OUT", help="Write an adapter folder or a .safetensors file."
)
@option_group("goal", GoalOptions)
@option_group("of_table", TableOptions)
@trust_option
@force_option
def command(
    adapter: str,
    output: str | None,
    goal: GoalOptions,
    of_table: TableOptions,
    trust: bool,
    force: bool,
) -> None:
    r"""Remove the ranks of ADAPTER that change its updates least.

    Give one goal: --rank, --params, --energy, --max-error or --max-abs-error. The ranks are chosen
    over all updates together, and the error is computed exactly, without a model. --table needs a
    model and data, and prints the loss at every rank.

    \b
    lora-fx truncate ./adapter -o small --rank 8
    lora-fx truncate ./adapter -o small --max-error 0.05
    lora-fx truncate ./adapter --table held-out.npz --model model.py:build
    """
    from lora_fx.adapter.truncate import truncation
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter

    inputs = [{"adapter": adapter}]
    if of_table.table:
        _refuse_beside_table(goal, output)
        text, fields = _table(adapter, of_table.table, of_table, trust)
        emit(text, inputs=inputs, **fields)
        return
    if not output:
        raise LoraFxError(
            "no output is given", "pass -o OUT, or --table DATA to see the losses first"
        )
    check_output(output, force=force, names=FORMATS.default.folder_files)
    result = truncation(
        adapter_of(adapter),
        rank=goal.rank,
        params=goal.params,
        energy=goal.energy,
        max_error=goal.max_error,
        max_abs_error=goal.max_abs_error,
    )
    if not result.dropped:
        note("no rank was dropped: the adapter is within the goal as it is")
    note(*save_adapter(result.adapter, output, force=force))
    text = f"{result}\nwrote {output}"
    emit(text, inputs=inputs, outputs=[output], **result.to_json())


def _refuse_beside_table(goal: GoalOptions, output: str | None) -> None:
    """Raise for a goal or an output if only a table is printed."""
    given = [name for name in names_of(GoalOptions) if getattr(goal, name) is not None]
    if output:
        given.append("output")
    if given:
        raise LoraFxError(
            f"--{given[0].replace('_', '-')} has no effect with --table, which writes nothing",
            "leave it out",
        )


def _table(adapter: str, data: str, options: TableOptions, trust: bool) -> tuple[str, Json]:
    """The losses on DATA at lower ranks, as text and for --json; no file is written."""
    from lora_fx.passes.verbs.held_out_loss import held_out

    if not options.model:
        raise LoraFxError("--table needs the base model", "pass --model MODEL")
    capture = ModelOptions(weights=options.weights, trust=trust)
    cap = captured(options.model, capture)
    table = training_data(data, cap, options.label)
    refuse_row_labels(table, cap, data, options.loss)
    result = held_out(cap, adapter_of(adapter), table, loss_of(options.loss))
    note(*result.notes)
    rows = [vars(row) for row in result.rows]
    return str(result), {"table": rows, "examples": result.examples}
