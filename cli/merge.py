"""lora-fx merge: fold adapters into the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import click

from lora_fx.cli.adapter_arguments import split_weight
from lora_fx.cli.blas import load_numpy
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.merge_options import CheckpointOptions
from lora_fx.cli.options import (
    FROM_1,
    Rules,
    flag,
    force_option,
    option,
    option_group,
    under_new_name,
)
from lora_fx.cli.output import emit, note, progress_bar
from lora_fx.errors import LoraFxError, NoSay

NO_SAY: Rules = (
    NoSay(
        ("threads", "link"),
        lambda asked: asked["base"].endswith(".onnx"),
        "for {0[base]}, a graph, which one thread writes",
    ),
)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Options for the mix of several adapters."""

    how: str = option(
        "--how",
        default="sum",
        type=click.Choice(["sum", "cat", "linear", "svd"]),
        help="Combine several adapters: as their exact sum, or by mixing their factors.",
    )
    rank: int | None = option("--rank", type=int, help="Set the rank of a mix by svd.")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Options for the output: an .onnx file, or a checkpoint that several threads write."""

    names: str | None = option(
        "--names",
        metavar="FILE",
        help="Read from a JSON file which tensor each adapter key names (an .onnx base).",
    )
    old_names: str | None = option("--map", metavar="FILE", hidden=True)
    delta: bool = flag(
        "--delta", "Write only what changes and share the rest with BASE (an .onnx base)."
    )
    run: bool = flag(
        "--run", "Run the merged file too, and compare it with branches (an .onnx base)."
    )
    threads: int | None = option(
        "--threads",
        type=FROM_1,
        help="Set the number of worker threads.  [default: one for each core]",
    )

    def names_file(self) -> str | None:
        """The file of --names, or of --map, the old name of --names."""
        return under_new_name("--map", self.old_names, "--names", self.names)

    def refuse_for_checkpoint(self) -> None:
        """Raise for an option of .onnx files."""
        of_onnx = {"--names": self.names_file(), "--delta": self.delta, "--run": self.run}
        for name, value in of_onnx.items():
            if value:
                raise LoraFxError(f"{name} is for .onnx bases only", "leave it out")


@click.command("merge", cls=ReportCommand, no_say=NO_SAY)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("-o", "--out", required=True, metavar="OUT", help="Name the folder or file to write.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@option_group("mix", MixOptions)
@option_group("checkpoint", CheckpointOptions)
@option_group("written", OutputOptions)
@force_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    dry_run: bool,
    mix: MixOptions,
    checkpoint: CheckpointOptions,
    written: OutputOptions,
    force: bool,
) -> None:
    r"""Fold adapters into the weights of BASE and write OUT: the same kind of file or folder.

    BASE is a Hugging Face folder, a .safetensors or an .onnx file. BASE and ADAPTER may also be
    hf:ORG/NAME[@REVISION]. ADAPTER:W multiplies the adapter by W. Tensors are streamed, so memory
    does not grow with the model. Unchanged tensors are copied byte for byte, and OUT has the same
    names and shards.

    \b
    lora-fx merge ./llama ./adapter -o ./merged
    lora-fx merge ./llama style:0.7 task -o ./merged --dry-run
    lora-fx merge bert.onnx ./adapter -o merged.onnx
    """
    if mix.how != "svd":
        load_numpy()
    if base.endswith(".onnx"):
        _merge_onnx(base, adapters, out, dry_run, mix, checkpoint, written, force)
        return

    from lora_fx.checkpoint.merge import plan_merge, run
    from lora_fx.checkpoint.merge_report import lines, report_json
    from lora_fx.files.atomic import check_output

    written.refuse_for_checkpoint()
    if not dry_run:
        check_output(out, force=force)
    weighted = [split_weight(text) for text in adapters]
    plan = plan_merge(base, weighted, checkpoint.merge(mix.how, mix.rank))
    inputs = [{"base": base, "adapters": list(adapters)}]
    if dry_run:
        note(*plan.notes)
        emit(str(plan), inputs=inputs, **plan.to_json())
        return

    with progress_bar() as progress:
        report = run(
            plan,
            out,
            link=checkpoint.link,
            force=force,
            threads=written.threads,
            progress=progress,
        )
    note(*report.warnings, warns=True)
    outputs = list(report.outputs)
    emit(lines(report), inputs=inputs, outputs=outputs, **report_json(report))


def _merge_onnx(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    dry_run: bool,
    mix: MixOptions,
    checkpoint: CheckpointOptions,
    written: OutputOptions,
    force: bool,
) -> None:
    """Merge into an .onnx file, or print its plan."""
    from lora_fx.onnx.match import read_map
    from lora_fx.passes.verbs.merge import refuse_other_kind
    from lora_fx.passes.verbs.merge_onnx import lines, merge_into_file
    from lora_fx.passes.verbs.merge_onnx_plan import OnnxMergeOptions, plan_onnx

    weighted = [split_weight(text) for text in adapters]
    names = read_map(written.names_file())
    if not dry_run:
        refuse_other_kind(base, out)
    OnnxMergeOptions.refuse_others(vars(checkpoint))
    options = OnnxMergeOptions(
        names=names,
        again=checkpoint.again,
        trust=checkpoint.trust,
        force=force,
        how=mix.how,
        rank=mix.rank,
        delta=written.delta,
        run=written.run,
    )
    inputs = [{"base": base, "adapters": list(adapters)}]
    if dry_run:
        plan = plan_onnx(base, weighted, options)
        note(*plan.graph.notes)
        emit(str(plan), inputs=inputs, **plan.to_json())
        return

    report = merge_into_file(base, weighted, out, options)
    note(*report.warnings, warns=True)
    emit(lines(report), **{**report.to_json(), "inputs": inputs})
