"""What torch reads anew for each file that it exports or loads, read once a process.

That are onnxscript's functions of torch's ops, half a second each time; the dispatcher's ops, once
for each of 24 namespaces, and the annotations of 5,000 of their kernels, a quarter of the export of
a small model; and the annotations of a .pt2 file's schema, once a node. The tests export a thousand
files. Where torch's own tables are others one day, they are read as torch does.
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections import defaultdict
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
    """Let torch go through the dispatcher's ops again only where ops are new."""
    import torch
    from torch._export import utils
    from torch.export import decomp_utils, exported_program

    collect = utils._collect_all_valid_cia_ops
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    made: dict[tuple[str, ...], Any] = {}

    def once() -> Any:
        there = (*torch.ops._dir, *registered("CompositeImplicitAutograd"))
        if there not in made:
            made.clear()
            made[there] = collect()
        return made[there]

    for module in (utils, exported_program, decomp_utils):
        vars(module)["_collect_all_valid_cia_ops"] = once


def keep_annotations() -> None:
    """Let torch evaluate none for a kernel that it registers, and those of a schema once."""
    from torch import _ops
    from torch._export.serde import schema, serialize

    register = _ops.OperatorBase.py_impl
    globals_ = {**vars(_ops), "Callable": defaultdict(lambda: None)}  # Callable[…] is None there
    _ops.OperatorBase.py_impl = types.FunctionType(register.__code__, globals_, "py_impl")

    hints = cache(lambda cls: typing.get_type_hints(cls, globalns=vars(schema)))
    kept = {**vars(typing), "get_type_hints": lambda cls, globalns: hints(cls)}
    vars(serialize)["typing"] = types.SimpleNamespace(**kept)


for keep in (keep_torchlib, keep_ops, keep_annotations):
    with contextlib.suppress(ImportError, AttributeError):
        keep()
