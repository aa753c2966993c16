"""lora-fx merge: adapters folded into the weights of a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli.common import emit, note, progress_bar
from lora_fx.cli.merging import load_numpy, merge_options
from lora_fx.cli.options import force_option, json_option, split_weight


@click.command("merge")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("-o", "--out", required=True, metavar="OUT", help="The folder or file to write.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@click.option(
    "--how",
    default="sum",
    show_default=True,
    type=click.Choice(["sum", "cat", "linear", "svd"]),
    help="Several adapters: their exact sum, or a mix of their factors.",
)
@click.option("--rank", type=int, help="Of an svd mix.")
@merge_options
@click.option("--threads", type=int, help="Worker threads.  [default: one a core]")
@click.option("--map", "names", metavar="FILE", help="Of .onnx: JSON, adapter key to tensor.")
@force_option
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    dry_run: bool,
    link: bool,
    threads: int | None,
    names: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Fold adapters into the weights of BASE and write OUT: the same kind of file or folder.

    BASE is a Hugging Face folder, a .safetensors or an .onnx file. It is streamed: memory does not
    grow with it. Untouched tensors are copied byte for byte, names and shards stay. ADAPTER:W
    weights one.

    \b
    lora-fx merge ./llama ./adapter -o ./merged
    lora-fx merge ./llama style:0.7 task -o ./merged --dry-run
    lora-fx merge bert.onnx ./adapter -o merged.onnx
    """
    if options["how"] != "svd":
        load_numpy()
    from lora_fx.checkpoint.merge import check_target, lines, plan_merge, report_json, run

    if base.endswith(".onnx"):
        _onnx(base, adapters, out, names, dry_run, {**options, "link": link}, force, as_json)
        return
    if not dry_run:
        check_target(out, force=force)
    plan = plan_merge(base, [split_weight(a) for a in adapters], **options)
    inputs = [{"base": base, "adapters": list(adapters)}]
    if dry_run:
        for text in plan.notes:
            note(text)
        emit(as_json, "merge", str(plan), inputs=inputs, **plan.to_json())
        return
    with progress_bar() as progress:
        report = run(plan, out, link=link, force=force, workers=threads, progress=progress)
    for text in report.warnings:
        note(text)
    outputs = list(report.outputs)
    emit(as_json, "merge", lines(report), inputs=inputs, outputs=outputs, **report_json(report))


def _onnx(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    names: str | None,
    dry_run: bool,
    options: dict[str, Any],
    force: bool,
    as_json: bool,
) -> None:
    from lora_fx.errors import LoraFxError
    from lora_fx.onnx.matching import read_map
    from lora_fx.passes.merge import merge
    from lora_fx.passes.merge_onnx import lines

    if dry_run:
        raise LoraFxError("--dry-run is of checkpoints", "lora-fx targets X.onnx lists the targets")
    given = [split_weight(a) for a in adapters]
    report = merge(base, given, out, names=read_map(names), force=force, **options)
    for text in report.warnings:
        note(text)
    fields = {**report.to_json(), "inputs": [{"base": base, "adapters": list(adapters)}]}
    fields.pop("command")
    emit(as_json, "merge", lines(report), **fields)
