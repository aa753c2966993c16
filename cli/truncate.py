"""lora-fx truncate: an adapter of fewer ranks, with the exact error that it costs."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli.options import adapter_of, force_option, json_option, trust_option
from lora_fx.cli.output import emit, note
from lora_fx.cli.report_option import report_option
from lora_fx.cli.truncate_table import TABLE, print_table, table_options
from lora_fx.errors import LoraFxError


@click.command("truncate")
@report_option
@click.argument("adapter")
@click.option("-o", "--output", metavar="OUT", help="Folder or .safetensors.")
@click.option("--rank", "-r", type=int, help="No update has a higher one.")
@click.option("--params", type=int, help="Elements of all A and B together, at most.")
@click.option("--energy", type=float, help="Share of Σσ² over all updates to keep, at least.")
@click.option("--max-error", type=float, help="‖ΔW − ΔW'‖/‖ΔW‖ over all updates, at most.")
@click.option("--max-abs-error", type=float, help="‖ΔW − ΔW'‖ over all updates, at most.")
@table_options
@trust_option
@force_option
@json_option
def command(
    adapter: str, output: str | None, trust: bool, force: bool, as_json: bool, **goal: Any
) -> None:
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
    from lora_fx.formats.io import save_adapter

    options = {k: goal.pop(k) for k in TABLE}
    if options["table"]:
        print_table(adapter, output, goal, trust, as_json, options)
        return
    if not output:
        raise LoraFxError("nothing to write to", "-o OUT, or --table DATA to look first")
    for name in ("model", "weights", "label"):
        if options[name]:
            raise LoraFxError(f"--{name} has no say without --table DATA", "leave it out")
    check_output(output, force=force)
    result = truncation(adapter_of(adapter, trust), **goal)
    if not result.dropped:
        note("no rank was dropped: the adapter is within the goal as it is")
    for text in save_adapter(result.adapter, output, force=force):
        note(text)
    emit(
        as_json,
        "truncate",
        f"{result}\nwrote {output}",
        inputs=[{"adapter": adapter}],
        outputs=[output],
        **result.to_json(),
    )
