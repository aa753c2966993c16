"""lora-fx export: a model as an ONNX file, adapters folded in or switchable, proven equal."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli.common import emit, note
from lora_fx.cli.exported import table
from lora_fx.cli.options import (
    captured,
    force_option,
    json_option,
    load_npz,
    model_options,
    named_adapters,
    refuse_given,
)


@click.command("export")
@click.argument("model")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[:W]]...")
@click.option("-o", "--output", required=True, metavar="X.onnx", help="The file to write.")
@click.option("--mode", default="merged", show_default=True, help="merged, switch, load or batch.")
@click.option("--include", multiple=True, metavar="SELECTORS", help="Of switch, load: targets.")
@click.option("--exclude", multiple=True, metavar="SELECTORS", help="Of switch, load: leave out.")
@click.option("--rank", type=int, help="Of load: the largest that an adapter may have.")
@click.option("--scales", is_flag=True, help="Of batch: an input of weights by row.")
@click.option("--provider", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set.")
@click.option("--optimise", is_flag=True, help="Rewrite the graph for ONNX Runtime, proven equal.")
@click.option("--map", "names", metavar="FILE", help="Of .onnx: JSON, adapter key to tensor.")
@model_options
@force_option
@json_option
def command(
    model: str,
    adapters: tuple[str, ...],
    output: str,
    mode: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rank: int | None,
    scales: bool,
    names: str | None,
    provider: str,
    opset: int,
    optimise: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Write MODEL as an ONNX file, proven equal at three sizes.

    In mode merged ADAPTER is folded in. In mode switch adapters are chosen at run time, in mode
    load when a session is made, and every ADAPTER is written beside the file as
    NAME.onnx_adapter. In mode batch every row of a batch picks its own. MODEL may be an .onnx
    file too. ADAPTER may carry a weight, `my-adapter:0.5`. Without an adapter the base model
    is exported.

    \b
    lora-fx export ./my-bert ./adapter -o bert.onnx
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode switch
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode batch
    lora-fx export bert.onnx ./de ./fr -o switch.onnx --mode switch
    lora-fx export model.py:build ./adapter -o model.onnx --dynamic x:0=batch,2=height
    """
    from lora_fx.checkpoint.osfile import check_output
    from lora_fx.errors import LoraFxError
    from lora_fx.passes.export import export

    if not output.endswith(".onnx"):
        raise LoraFxError(f"{output} does not end in .onnx", "-o model.onnx")
    check_output(output, force=force)
    if mode == "merged" and len(adapters) > 1:
        raise LoraFxError(
            f"merged takes one adapter, not {len(adapters)}", "--mode switch or batch"
        )
    updates = named_adapters(adapters)
    one = next(iter(updates.values()), None)
    arrays = load_npz(options["inputs_file"]) or None
    chosen: dict[str, Any] = {
        "adapters": one if mode == "merged" else updates,
        "mode": mode,
        "include": include or None,
        "exclude": exclude or None,
        "rank": rank,
        "scales": scales,
        "provider": provider,
        "inputs": arrays,
        "force": force,
        "optimise": optimise,
    }
    if model.endswith(".onnx"):
        from lora_fx.onnx.matching import read_map

        refuse_given(model, ("opset", "weights", "dynamic", "static", "trust"))
        report = export(model, output, names=read_map(names), **chosen)
        for text in report.warnings:
            note(text)
        shown = {k: v for k, v in report.to_json().items() if k not in ("command", "warnings")}
        said = f"{report}{table(report)}\nwrote {output}"
        emit(as_json, "export", said, inputs=[{"model": model}], warnings=report.warnings, **shown)
        return
    if names:
        raise LoraFxError("--map is of .onnx files", "a model's own names tell")
    _, cap = captured(model, **options)
    report = export(cap, output, opset=opset, **chosen)
    fields = {**report.to_json(), "inputs": cap.inputs.to_json(), "outputs": list(report.outputs)}
    fields.pop("command")
    emit(as_json, "export", f"{report}{table(report)}\nwrote {output}", **fields)
