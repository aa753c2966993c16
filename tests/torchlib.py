"""onnxscript's functions of torch's ops, read once a process.

torch reads their source anew for each ONNX file that it exports, half a second each time, and the
tests export a thousand. Where torch's own table is another one day, it is read as torch does.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any


def keep_torchlib() -> None:
    """Let torch's exporter start from a copy of what it read first."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry
    once = cache(registry.from_torchlib)

    def from_torchlib(cls: Any, opset_version: int = registry().opset_version) -> Any:
        made, new = once(opset_version), cls()
        new._opset_version = opset_version
        new.functions = {target: list(ways) for target, ways in made.functions.items()}
        return new

    registry.from_torchlib = classmethod(from_torchlib)


with contextlib.suppress(ImportError, AttributeError):
    keep_torchlib()
