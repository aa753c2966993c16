"""What export prints of what it wrote."""

from __future__ import annotations

from typing import Any


def table(report: Any) -> str:
    """The stages of an optimised export, a line each; empty without stages."""
    if "stages" not in report.details:
        return ""
    from lora_fx.onnx.stages import Stage

    rows = [f"  {Stage(**row)}" for row in report.details["stages"]]
    return "\n".join(["\nstages:", *(rows or ["  none changed anything"])])
