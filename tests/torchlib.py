"""What torch does anew for each model that it traces, exports or loads, done once a process.

That are onnxscript's functions of torch's ops, half a second each time; the dispatcher's ops, once
for each of 24 namespaces, and the annotations of 5,000 of their kernels, a quarter of the export of
a small model; and the annotations of a .pt2 file's schema, once a node. The tests export a thousand
files. While torch traces, nn.Module has other methods, and the slots of its 2,000 subclasses are
looked through for each, four times a trace; and of the stack of each node, 80 frames, it reads
every line to keep two. Where torch's own tables are others one day, it is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import traceback
import types
import typing
from collections import defaultdict
from functools import cache, partial
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


def keep_slots() -> None:
    """Let torch exchange methods of nn.Module in its namespace alone.

    The slots of a class and its subclasses, which setattr goes through, call whatever function
    stands there, before and after. What was looked up is dropped, as by setattr.
    """
    from torch.fx import _symbolic_trace
    from torch.nn import Module

    patched: Any = _symbolic_trace._PatchedFnSetAttr
    (names,) = (x for x in gc.get_referents(Module.__dict__) if isinstance(x, dict))
    modified = ctypes.pythonapi.PyType_Modified
    modified.argtypes, modified.restype = [ctypes.py_object], None

    def put(owner: Any, name: str, value: Any) -> None:
        if owner is Module and name in names:
            names[name] = value
            modified(owner)
        else:
            setattr(owner, name, value)

    patched.patch = lambda self: put(self.frame_dict, self.fn_name, self.new_fn)
    patched.revert = lambda self: put(self.frame_dict, self.fn_name, self.orig_fn)


def keep_lines() -> None:
    """Let torch read the lines of those frames alone that it keeps."""
    from torch.utils import _traceback

    late = partial(traceback.FrameSummary, lookup_line=False)
    vars(_traceback)["traceback"] = types.SimpleNamespace(
        **vars(traceback) | {"FrameSummary": late}
    )


for keep in (keep_torchlib, keep_ops, keep_annotations, keep_slots, keep_lines):
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        keep()
