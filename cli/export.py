"""lora-fx export: a model with an adapter folded in, as an ONNX file that was proven equal."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli.common import emit
from lora_fx.cli.options import (
    adapter_of,
    captured,
    force_option,
    json_option,
    load_npz,
    model_options,
    split_weight,
)


@click.command("export")
@click.argument("model")
@click.argument("adapter", required=False)
@click.option("-o", "--output", required=True, metavar="X.onnx", help="The file to write.")
@click.option("--mode", default="merged", show_default=True, help="merged.")
@click.option("--provider", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set.")
@model_options
@force_option
@json_option
def command(
    model: str,
    adapter: str | None,
    output: str,
    mode: str,
    provider: str,
    opset: int,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Fold ADAPTER into MODEL and write an ONNX file, proven equal at three sizes.

    ADAPTER may carry a weight, `my-adapter:0.5`. Without an adapter the base model is exported.

    \b
    lora-fx export ./my-bert ./adapter -o bert.onnx
    lora-fx export model.py:build ./adapter -o model.onnx --dynamic x:0=batch,2=height
    """
    from lora_fx.checkpoint.osfile import check_output
    from lora_fx.errors import LoraFxError
    from lora_fx.passes.export import export

    if not output.endswith(".onnx"):
        raise LoraFxError(f"{output} does not end in .onnx", "-o model.onnx")
    check_output(output, force=force)
    update = None
    if adapter is not None:
        path, weight = split_weight(adapter)
        update = adapter_of(path).weighted(weight)
    arrays = load_npz(options["inputs_file"]) or None
    _, cap = captured(model, **options)
    report = export(
        cap,
        output,
        adapters=update,
        mode=mode,
        provider=provider,
        opset=opset,
        inputs=arrays,
        force=force,
    )
    fields = {**report.to_json(), "inputs": cap.inputs.to_json(), "outputs": list(report.outputs)}
    fields.pop("command")
    emit(as_json, "export", f"{report}\nwrote {output}", **fields)
