"""Options that merge and merge-all share, and the arguments that pass them on."""

from __future__ import annotations

import os
import sys

import click

from lora_fx.cli.options import combined, split_weight
from lora_fx.cli.output import emit, note
from lora_fx.text import Json, JsonView

DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "float64"]),
    help="Of touched tensors.  [default: as stored]",
)
FLAGS = {
    "allow-unused": "Leave out updates that the base has no tensor for.",
    "allow-missing": "Accept an adapter that lacks layers its config has.",
    "any-base": "Merge into other weights than it was trained on.",
    "other-readers": "Merge where more than its products reads a weight.",
    "untie": "Give a tied output head a tensor of its own.",
    "add": "Add whole tensors that the base lacks: a new head.",
    "again": "Merge an adapter that is in the base already.",
    "link": "Hard links for untouched files, instead of copies.",
    "trust": "Read an adapter_model.bin, by torch's unpickler that runs no code.",
}


ONNX = {"names": "map", "delta": "delta", "run": "run"}
"""Options that .onnx files alone have: argument → option."""


onnx_options = combined(
    [
        click.option("--map", "names", metavar="FILE", help="Of .onnx: JSON, key to tensor."),
        click.option("--delta", is_flag=True, help="Of .onnx: write what changes, share the rest."),
        click.option("--run", is_flag=True, help="Of .onnx: run it too, against branches."),
    ]
)
"""Options of a merge into an .onnx file."""


merge_options = combined(
    [DTYPE, *(click.option(f"--{name}", is_flag=True, help=text) for name, text in FLAGS.items())]
)
"""Options of every command that merges."""


def arguments(options: JsonView) -> list[str]:
    """The command line that says these options."""
    given = [f"--{name}" for name in FLAGS if options[name.replace("-", "_")]]
    return [*given, "--dtype", options["dtype"]] if options["dtype"] else given


def load_numpy() -> None:
    """Import numpy with one BLAS thread, where nothing has imported it or said how many.

    A merge has threads of its own. BLAS's are started as it is loaded, and spin in wait for work:
    that is .1 s of a core on two cores.
    """
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]


def merge_file(
    base: str, adapters: tuple[str, ...], out: str, options: Json, as_json: bool
) -> None:
    """Merge into an .onnx file, or print its plan."""
    from lora_fx.onnx.match import read_map
    from lora_fx.passes.verbs.merge import OnnxMergeOptions, lines, merge, plan_onnx

    given = [split_weight(a) for a in adapters]
    inputs = [{"base": base, "adapters": list(adapters)}]
    dry_run, options["names"] = options.pop("dry_run"), read_map(options["names"])
    if dry_run:
        plan = plan_onnx(base, given, OnnxMergeOptions.of(options))
        for text in plan.graph.notes:
            note(text)
        emit(as_json, "merge", str(plan), inputs=inputs, **plan.to_json())
        return
    report = merge(base, given, out, **options)
    for text in report.warnings:
        note(text)
    fields = {**report.to_json(), "inputs": inputs}
    fields.pop("command")
    emit(as_json, "merge", lines(report), **fields)
