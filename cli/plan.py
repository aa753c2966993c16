"""lora-fx plan: choose the rank of every target under one budget, from one pass over data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import click

from lora_fx.cli.data_arguments import batches_of, loss_of, refuse_row_labels, training_data
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import PROGRAM, ModelOptions
from lora_fx.cli.options import (
    FINITE,
    FROM_1,
    Rules,
    first_given,
    force_option,
    label_option,
    loss_option,
    max_length_option,
    option,
    option_group,
    output_option,
    seed_option,
    selectors,
)
from lora_fx.cli.output import emit, note
from lora_fx.errors import NoSay
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    from lora_fx.fx.capture.capture import Captured


def _reads(asked: JsonView, *statistics: str) -> bool:
    """True if the method reads one of these statistics from DATA, or, without names, any."""
    from lora_fx.targets.rank_methods import METHODS

    wanted_statistics = set(METHODS[asked["method"]].wanted)
    if statistics:
        wanted_statistics &= set(statistics)
    return bool(wanted_statistics)


NO_SAY: Rules = (
    NoSay(
        ("label", "loss", "examples", "max_length", "seed"),
        lambda asked: not _reads(asked),
        "for --method {0[method]}, which reads no data",
        "leave it out, or pass --method importance, kfac or eva",
    ),
    NoSay(
        ("loss",),
        lambda asked: not _reads(asked, "outputs", "gradient"),
        "for --method {0[method]}, which reads no gradient",
    ),
    *PROGRAM,
)


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Options for the budget, its targets, and the data that rate a rank."""

    budget: str = option(
        "--budget",
        default="uniform:8",
        metavar="BUDGET",
        help="Limit the parameters (params:N), the FLOPs (flops:N, flops:F%), or both to "
        "those of rank R everywhere (uniform:R).",
    )
    method: Literal["uniform", "importance", "kfac", "eva"] = option(
        "--method",
        type=click.Choice(["uniform", "importance", "kfac", "eva"]),
        default="uniform",
        help="Choose how ranks are valued; all but uniform read DATA. On text, none was better "
        "than uniform in two measurements, and all were worse in one of them.",
    )
    scale: float = option(
        "--scale", type=FINITE, default=2.0, help="Set alpha/rank of every target."
    )
    label: str = label_option("Name the column to predict.")
    loss: str = loss_option()
    examples: int = option(
        "--examples", type=FROM_1, default=1024, help="Read at most this many examples of DATA."
    )
    max_length: int | None = max_length_option()
    include: tuple[str, ...] | None = selectors("--include", "Plan only these targets.")
    exclude: tuple[str, ...] | None = selectors("--exclude", "Leave out these targets.")
    seed: int = seed_option("Seed the choice of examples.")


@click.command("plan", cls=ReportCommand, no_say=NO_SAY)
@click.argument("model")
@click.argument("data", required=False)
@output_option("PLAN", "Name the .json file to write.")
@option_group("options", BudgetOptions)
@option_group("capture", ModelOptions)
@force_option
def command(
    model: str,
    data: str | None,
    output: str,
    options: BudgetOptions,
    capture: ModelOptions,
    force: bool,
) -> None:
    r"""Choose a rank for every target of MODEL under one budget, and write the plan to a file.

    One pass over DATA (as for train) measures where ranks reduce the loss most for their cost.
    insert and train read the file with --plan, and write adapters with PEFT's rank_pattern.

    \b
    lora-fx plan model.py:build data.npz -o plan.json --method kfac --budget uniform:4
    lora-fx train model.py:build data.npz -o adapter --plan plan.json
    """
    from lora_fx.errors import LoraFxError
    from lora_fx.files.atomic import check_output
    from lora_fx.passes.verbs.adapt import find
    from lora_fx.passes.verbs.plan import plan
    from lora_fx.targets.rank_methods import METHODS

    check_output(output, force=force)
    if not output.endswith(".json"):
        raise LoraFxError(
            f"{output} does not end in .json", "pass a name that ends in .json: -o plan.json"
        )
    if METHODS[options.method].wanted and not data:
        raise LoraFxError(
            f"--method {options.method} needs data", "pass DATA: lora-fx plan MODEL DATA …"
        )
    cap = captured(model, capture)
    batches = _batches(data, cap, options)
    planned = plan(
        cap,
        data=batches,
        budget=options.budget,
        method=options.method,
        loss=loss_of(options.loss) if first_given("loss") else None,
        include=options.include,
        exclude=options.exclude,
        scale=options.scale,
    )
    planned = replace(planned, model=model)
    planned.save(output, force=force)
    note(*planned.notes)
    targets = find(cap)
    rows = [targets[row.key].to_json(row.rank, row.alpha) for row in planned.rows]
    fields: Json = {"inputs": cap.inputs.to_json(), "outputs": [output], "targets": rows}
    plan_json = planned.to_json()
    for field in ("method", "budget", "unit", "limit", "used", "examples"):
        fields[field] = plan_json[field]
    emit(f"{planned}\nwrote {output}", **fields)


def _batches(data: str | None, cap: Captured, options: BudgetOptions) -> Iterator[JsonView] | None:
    """The batches of at most --examples examples of DATA, drawn by --seed."""
    import numpy as np

    if not data:
        return None
    table = training_data(data, cap, options.label, options.max_length)
    if options.method not in ("uniform", "eva"):  # which compute no loss
        refuse_row_labels(table, cap, data, options.loss)
    drawn = np.random.default_rng(options.seed).permutation(len(table))[: options.examples]
    return batches_of(table.rows(drawn), options.seed)
