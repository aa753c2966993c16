"""What export prints of what it wrote."""

from __future__ import annotations

from typing import Any


def table(report: Any) -> str:
    """The stages of an optimised export, a line each; empty without stages."""
    if "stages" not in report.details:
        return ""
    from lora_fx.onnx.optimise.stages import Stage

    rows = [f"  {Stage(**row)}" for row in report.details["stages"]]
    return "\n".join(["\nstages:", *(rows or ["  none changed anything"])])


def wrote(report: Any) -> str:
    """The file, and its copy for Triton."""
    copies = [f for f in report.outputs[1:] if f.endswith("model.onnx")]
    return "\n".join(f"wrote {f}" for f in [report.outputs[0], *copies])


def emit_file(as_json: bool, model: str, report: Any) -> None:
    """What became of an .onnx file."""
    from lora_fx.cli.common import emit, note

    for text in report.warnings:
        note(text)
    shown = {k: v for k, v in report.to_json().items() if k not in ("command", "warnings")}
    said = f"{report}{table(report)}\n{wrote(report)}"
    emit(as_json, "export", said, inputs=[{"model": model}], warnings=report.warnings, **shown)
