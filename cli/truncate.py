"""lora-fx truncate: an adapter of fewer ranks, with the exact error that it costs."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import Json, JsonView

TABLE = ("table", "model", "label", "loss", "weights")


NO_SAY: shared.Rules = (
    NoSay(
        ("model", "label", "loss", "weights"), lambda asked: not asked["table"],
        "without --table DATA",
    ),
)  # fmt: skip


@click.command("truncate", cls=ReportCommand, no_say=NO_SAY)
@click.argument("adapter")
@click.option("-o", "--output", metavar="OUT", help="Folder or .safetensors.")
@click.option("--rank", "-r", type=int, help="No update has a higher one.")
@click.option("--params", type=int, help="Elements of all A and B together, at most.")
@click.option("--energy", type=float, help="Share of Σσ² over all updates to keep, at least.")
@click.option("--max-error", type=float, help="‖ΔW − ΔW'‖/‖ΔW‖ over all updates, at most.")
@click.option("--max-abs-error", type=float, help="‖ΔW − ΔW'‖ over all updates, at most.")
@shared.text_option("--table", "DATA", "Print its loss at every rank, and no more.")
@shared.text_option("--model", "MODEL", "Of --table: what ADAPTER was trained on.")
@shared.label_option("Of --table.")
@click.option("--loss", default="ce", help="Of --table, as for train.")
@shared.text_option("--weights", "FILE", "Of --model, where it is built from code.")
@shared.trust_option
@shared.force_option
def command(adapter: str, output: str | None, trust: bool, force: bool, **goal: Any) -> None:
    r"""Drop the ranks of ADAPTER that matter least, over all its updates at once.

    Give one goal. No model is needed; the error is exact. --table needs a model and data, and says
    what every rank is worth on them.

    \b
    lora-fx truncate ./adapter -o small --rank 8
    lora-fx truncate ./adapter -o small --max-error 0.05
    lora-fx truncate ./adapter --table held-out.npz --model model.py:build
    """
    from lora_fx.adapter.truncate import truncation
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter

    options = {k: goal.pop(k) for k in TABLE}
    inputs = [{"adapter": adapter}]
    if options["table"]:
        given = [k for k, v in {**goal, "output": output or None}.items() if v is not None]
        said, fields = _table(adapter, given, trust, options)
        emit(said, inputs=inputs, **fields)
        return
    if not output:
        raise LoraFxError("nothing to write to", "-o OUT, or --table DATA to look first")
    check_output(output, force=force, names=FORMATS.default.folder_files)
    result = truncation(shared.adapter_of(adapter), **goal)
    if not result.dropped:
        note("no rank was dropped: the adapter is within the goal as it is")
    note(*save_adapter(result.adapter, output, force=force))
    said, fields = f"{result}\nwrote {output}", result.to_json()
    emit(said, inputs=inputs, outputs=[output], **fields)


def _table(adapter: str, given: list[str], trust: bool, options: JsonView) -> tuple[str, Json]:
    """Losses on DATA at lower ranks, as text and for --json; nothing is written."""
    from lora_fx.passes.verbs.plan import held_out

    if given:
        raise LoraFxError(
            f"--{given[0].replace('_', '-')} has no say beside --table, which writes nothing",
            "look at the table first",
        )
    if not options["model"]:
        raise LoraFxError("--table needs the model", "--model MODEL")
    asked: Json = {"weights": options["weights"], "dynamic": (), "static": (), "trust": trust}
    loaded, cap = shared.captured(options["model"], asked)
    data = shared.training_data(options["table"], loaded, cap, options["label"])
    shared.refuse_row_labels(data, loaded, options["table"], options["loss"])
    result = held_out(cap, shared.adapter_of(adapter), data, shared.loss_of(options["loss"]))
    note(*result.notes)
    rows = [vars(row) for row in result.rows]
    return str(result), {"table": rows, "examples": result.examples}
