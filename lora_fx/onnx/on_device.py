"""What a file does on a device, as commands report it: nodes, copies, and graphs of kernels.

The provider itself is asked where the command runs on it. Without, CUDA's answer is that of
cuda_obstacles.py; for WebGPU there is no such list.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from lora_fx.onnx.cuda_obstacles import Obstacle, cuda_fields, cuda_obstacles
from lora_fx.onnx.device_placement import placement_of
from lora_fx.onnx.load import load
from lora_fx.onnx.made_for import CPU, PROPERTY, is_device
from lora_fx.onnx.provider_nodes import NAMES
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    import onnx_ir as ir

SHOWN = 3
"""The most copies or obstacles that the line names."""


def of_model(
    path: str | PathLike[str], model: ir.Model, provider: str, target: str | None = None
) -> Json:
    """Return the fields of a model that lies in a file; see of_obstacles."""
    target = target or model.metadata_props.get(PROPERTY, CPU)
    return of_obstacles(path, cuda_obstacles(model), provider, target)


def of_files(paths: Sequence[str], provider: str) -> Json:
    """Return the fields of several files, each under their paths.

    The field `on_device` is a text, with a line for each file that has one.
    """
    fields: Json = {}
    lines = []
    for path in paths:
        for name, value in of_model(path, load(path), provider).items():
            if name == "on_device":
                lines.append(f"{path}: {value}")
            else:
                fields.setdefault(name, {})[path] = value
    if lines:
        fields["on_device"] = lines
    return fields


def of_obstacles(
    path: str | PathLike[str], obstacles: Sequence[Obstacle], provider: str, target: str
) -> Json:
    """Return the fields `cuda`, `webgpu` and `on_device` of docs/json.md.

    `webgpu` is there where the file runs on it, and `on_device`, a line of text, where the file
    runs on a device or is made for one.

    Args:
        path: The file.
        obstacles: Its nodes in CUDA's way.
        provider: What has run it: cpu, cuda or webgpu.
        target: What it is made for.
    """
    fields: Json = {"cuda": cuda_fields(obstacles)}
    if provider in NAMES.values():
        fields.setdefault(provider, {}).update(placement_of(path, provider).to_json())
        fields["on_device"] = _placed(provider, fields[provider])
    elif target == "cuda":
        fields["on_device"] = _listed(obstacles)
    elif is_device(target):
        fields["on_device"] = f"{target}: not asked; pass --provider {target}"
    return fields


def _placed(provider: str, fields: JsonView) -> str:
    """Return the provider's answer as a line."""
    counts = {name: sum(by_operator.values()) for name, by_operator in fields["nodes"].items()}
    on_cpu = counts.get(CPU, 0)
    parts = [f"{provider}: {counts.get(provider, 0)} nodes there, {on_cpu} on the CPU"]
    parts.append(_counted(fields["copies"], "copy", "copies"))
    if fields["capturable"]:
        parts.append("its graph can be captured")
    else:
        parts.append(f"its graph cannot be captured: {fields['why']}")
    return "; ".join(parts)


def _listed(obstacles: Sequence[Obstacle]) -> str:
    """Return what the list says about CUDA as a line."""
    if not obstacles:
        return "cuda, by the list of lora-fx: no copies; its graph can be captured"
    counted = _counted(list(map(str, obstacles)), "obstacle", "obstacles")
    return f"cuda, by the list of lora-fx: {counted}; its graph cannot be captured"


def _counted(items: Sequence[str], one: str, several: str) -> str:
    """Return how many there are, and the first of them."""
    if not items:
        return f"no {several}"
    more = ", …" if len(items) > SHOWN else ""
    name = one if len(items) == 1 else several
    return f"{len(items)} {name} ({', '.join(items[:SHOWN])}{more})"
