"""lora-fx verify: two models run and compared, or an adapter checked against a model."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli.common import emit
from lora_fx.cli.options import adapter_of, captured, json_option, load_npz, model_options


@click.command("verify")
@click.argument("a")
@click.argument("b")
@click.option("--adapter", metavar="ADAPTER", help="Applied to the model that is no .onnx file.")
@click.option(
    "--tol", type=float, default=2e-6, show_default=True, help="Gate on max|a - b| / max|b|."
)
@click.option("--provider", default="auto", show_default=True, help="auto, cpu or cuda.")
@model_options
@json_option
def command(
    a: str,
    b: str,
    adapter: str | None,
    tol: float,
    provider: str,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Run models A and B on the same inputs and compare; or check that adapter B fits model A.

    Exit code 0: equal within the gate. 1: they differ. 2: they cannot be compared.

    \b
    lora-fx verify bert.onnx ./my-bert --adapter ./adapter
    lora-fx verify ./my-bert ./adapter
    """
    from lora_fx.formats.io import is_adapter
    from lora_fx.passes.verify import verify

    def model(text: str) -> Any:
        return text if text.endswith(".onnx") else captured(text, **options)[1]

    arrays = load_npz(options["inputs_file"]) or None
    if is_adapter(b):
        report = verify(captured(a, meta=True, **options)[1], adapter_of(b))
    else:
        update = adapter_of(adapter) if adapter else None
        report = verify(model(a), model(b), arrays, adapter=update, tol=tol, provider=provider)
    fields = {**report.to_json(), "inputs": [{"a": a, "b": b}], "outputs": []}
    fields.pop("command")
    emit(as_json, "verify", str(report), **fields)
    click.get_current_context().exit(0 if report else 1)
