"""lora-fx plan: a rank for every target under one budget, from one pass over data."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note
from lora_fx.errors import NoSay
from lora_fx.text import Json, JsonView


def _reads(asked: JsonView, *statistics: str) -> bool:
    """Whether the method takes any of these from DATA, or anything where none is named."""
    from lora_fx.targets.budget import METHODS

    wanted = METHODS[asked["method"]].wanted
    return bool(set(wanted) & set(statistics)) if statistics else bool(wanted)


NO_SAY: shared.Rules = (
    NoSay(
        ("label", "loss", "examples", "max_length", "seed"),
        lambda asked: not _reads(asked),
        "for --method {0[method]}, which reads no data",
        "leave it out, or --method importance, kfac or eva",
    ),
    NoSay(
        ("loss",),
        lambda asked: not _reads(asked, "outputs", "gradient"),
        "for --method {0[method]}, which reads no gradient",
    ),
    *shared.PROGRAM,
)


@click.command("plan", cls=ReportCommand, no_say=NO_SAY)
@click.argument("model")
@click.argument("data", required=False)
@shared.output_option("PLAN", "A .json file.")
@click.option(
    "--budget",
    default="uniform:8",
    metavar="BUDGET",
    help="params:N, flops:N, flops:F% or uniform:R, what rank R would take everywhere.",
)
@click.option(
    "--method",
    type=click.Choice(["uniform", "importance", "kfac", "eva"]),
    default="uniform",
    help="What a rank is worth; all but uniform read DATA.",
)
@click.option("--scale", type=float, default=2.0, help="alpha/rank everywhere.")
@shared.label_option("Column to predict.")
@click.option("--loss", default="ce", help="ce, mse or module:function.")
@click.option("--examples", type=shared.FROM_1, default=1024, help="Of DATA, at most.")
@shared.max_length_option
@shared.selectors_option("--include", "Targets to choose from.")
@shared.selectors_option("--exclude", "Targets to leave out.")
@shared.seed_option("Of the choice of examples.")
@shared.model_options
@shared.force_option
def command(model: str, data: str | None, output: str, force: bool, **options: Any) -> None:
    r"""Plan a rank for every target of MODEL under one budget, and write it.

    One pass over DATA (as for train) says where low rank is worth its cost. insert and train take
    the file with --plan; adapters made from it carry PEFT's rank_pattern.

    \b
    lora-fx plan model.py:build data.npz -o plan.json --method kfac --budget uniform:4
    lora-fx train model.py:build data.npz -o adapter --plan plan.json
    """
    from lora_fx.errors import LoraFxError
    from lora_fx.files.atomic import check_output
    from lora_fx.passes.verbs.adapt import find
    from lora_fx.passes.verbs.plan import plan
    from lora_fx.targets.budget import METHODS

    check_output(output, force=force)
    if not output.endswith(".json"):
        raise LoraFxError(f"{output} does not end in .json", "-o plan.json")
    if METHODS[options["method"]].wanted and not data:
        raise LoraFxError(f"--method {options['method']} reads data", "lora-fx plan MODEL DATA …")
    loaded, cap = shared.captured(model, options)
    batches = shared.some_batches(data, loaded, cap, options)
    loss = shared.loss_of(options.pop("loss")) if shared.first_given("loss") else None
    options.pop("loss", None)
    made = plan(cap, data=batches, loss=loss, name=model, **options)
    made.save(output, force=force)
    note(*made.notes)
    found = find(cap)
    whole = made.to_json()
    rows = [found[r.key].to_json(r.rank, r.alpha) for r in made.rows]
    fields: Json = {"inputs": cap.inputs.to_json(), "outputs": [output], "targets": rows}
    fields |= {k: whole[k] for k in ("method", "budget", "unit", "limit", "used", "examples")}
    emit(f"{made}\nwrote {output}", **fields)
