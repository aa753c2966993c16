"""lora-fx merge: adapters folded into the weights of a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note, progress_bar
from lora_fx.errors import NoSay
from lora_fx.text import Json

ONNX = {"names": "map", "delta": "delta", "run": "run"}
"""Options that .onnx files alone have: argument → option."""


NO_SAY: shared.Rules = (
    NoSay(
        ("threads", "link"), lambda asked: asked["base"].endswith(".onnx"),
        "for {0[base]}, a graph, of which one thread writes a file",
    ),
)  # fmt: skip


@click.command("merge", cls=ReportCommand, no_say=NO_SAY)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("-o", "--out", required=True, metavar="OUT", help="The folder or file to write.")
@shared.flag_option("--dry-run", "Check everything, print the plan, write nothing.")
@click.option(
    "--how",
    default="sum",
    type=click.Choice(["sum", "cat", "linear", "svd"]),
    help="Several adapters: their exact sum, or a mix of their factors.",
)
@click.option("--rank", type=int, help="Of an svd mix.")
@shared.merge_options
@click.option("--map", "names", metavar="FILE", help="Of .onnx: JSON, key to tensor.")
@shared.flag_option("--delta", "Of .onnx: write what changes, share the rest.")
@shared.flag_option("--run", "Of .onnx: run it too, against branches.")
@click.option("--threads", type=shared.FROM_1, help="Worker threads.  [default: one a core]")
@shared.force_option
def command(base: str, adapters: tuple[str, ...], out: str, **options: Any) -> None:
    r"""Fold adapters into the weights of BASE and write OUT: the same kind of file or folder.

    BASE is a Hugging Face folder, a .safetensors or an .onnx file; it and ADAPTER may be of the
    Hub, hf:ORG/NAME[@REVISION]. It is streamed: memory does not grow with it. Untouched tensors
    are copied byte for byte, names and shards stay. ADAPTER:W weights one.

    \b
    lora-fx merge ./llama ./adapter -o ./merged
    lora-fx merge ./llama style:0.7 task -o ./merged --dry-run
    lora-fx merge bert.onnx ./adapter -o merged.onnx
    """
    if options["how"] != "svd":
        shared.load_numpy()
    from lora_fx.checkpoint.merge import lines, plan_merge, report_json, run
    from lora_fx.checkpoint.merge_plan import MergeOptions
    from lora_fx.errors import LoraFxError
    from lora_fx.files.atomic import check_output

    threads = options.pop("threads")
    if base.endswith(".onnx"):
        _onnx(base, adapters, out, options)
        return
    of_onnx = {option: options.pop(name) for name, option in ONNX.items()}
    if wrong := [option for option, value in of_onnx.items() if value]:
        raise LoraFxError(f"--{wrong[0]} is of .onnx files", "leave it out")
    dry_run, link, force = (options.pop(name) for name in ("dry_run", "link", "force"))
    if not dry_run:
        check_output(out, force=force)
    plan = plan_merge(base, [shared.split_weight(a) for a in adapters], MergeOptions(**options))
    inputs = [{"base": base, "adapters": list(adapters)}]
    if dry_run:
        note(*plan.notes)
        emit(str(plan), inputs=inputs, **plan.to_json())
        return
    with progress_bar() as progress:
        report = run(plan, out, link=link, force=force, threads=threads, progress=progress)
    note(*report.warnings, warns=True)
    outputs = list(report.outputs)
    emit(lines(report), inputs=inputs, outputs=outputs, **report_json(report))


def _onnx(base: str, adapters: tuple[str, ...], out: str, options: Json) -> None:
    """Merge into an .onnx file, or print its plan."""
    from lora_fx.onnx.match import read_map
    from lora_fx.passes.verbs.merge import OnnxMergeOptions, lines, merge, plan_onnx

    given = [shared.split_weight(a) for a in adapters]
    inputs = [{"base": base, "adapters": list(adapters)}]
    dry_run, options["names"] = options.pop("dry_run"), read_map(options["names"])
    if dry_run:
        plan = plan_onnx(base, given, OnnxMergeOptions.of(options))
        note(*plan.graph.notes)
        emit(str(plan), inputs=inputs, **plan.to_json())
        return
    report = merge(base, given, out, **options)
    note(*report.warnings, warns=True)
    emit(lines(report), **{**report.to_json(), "inputs": inputs})
