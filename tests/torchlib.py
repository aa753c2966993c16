"""What torch reads anew for each ONNX file that it exports, read once a process.

That are onnxscript's functions of torch's ops, half a second each time, and the dispatcher's ops,
once for each of 24 namespaces; the tests export a thousand files. Where torch's own tables are
others one day, they are read as torch does.
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


def keep_ops() -> None:
    """Let torch make its Python names of the dispatcher's ops again only where ops are new."""
    import torch
    from torch._export import utils

    make = utils._materialize_cpp_cia_ops
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    made: set[str] = set()

    def once() -> None:
        there = registered("CompositeImplicitAutograd")
        if not made.issuperset(there):
            make()
            made.update(there)

    utils._materialize_cpp_cia_ops = once


for keep in (keep_torchlib, keep_ops):
    with contextlib.suppress(ImportError, AttributeError):
        keep()
