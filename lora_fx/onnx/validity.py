"""Whose fault it is when an .onnx file makes something fail: the file's, or ours."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lora_fx.errors import LoraFxError, one_line
from lora_fx.onnx.runtime_log import quiet_options

_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
"""Whose operators the runtime has by itself."""
Verb = TypeVar("Verb", bound=Callable[..., Any])


def blaming(verb: Verb) -> Verb:
    """A verb of .onnx files: what fails on an invalid one is said to be that file's fault.

    onnx_ir, the runtime and the passes raise whatever an invalid graph makes them raise. To check
    every file before would cost every file; this looks only at one that something failed on.
    """

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except (LoraFxError, OSError, MemoryError):  # no fault of the file
            raise
        except Exception as error:
            given = (*args, *kwargs.values())
            paths = [os.fspath(x) for x in given if isinstance(x, (str, os.PathLike))]
            for name in (p for p in paths if p.endswith(".onnx") and os.path.isfile(p)):
                if why := _invalid(name):
                    hint = "onnx.checker.check_model says what is wrong with it"
                    raise LoraFxError(f"{name}: no valid ONNX model: {why}", hint) from error
            raise

    return cast(Verb, call)


def _invalid(file: str) -> str:
    """What onnx's checker, its shapes, the runtime or onnx_ir find wrong; empty for nothing."""
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort

    def runtime(name: str) -> object:
        domains = {o.domain for o in onnx.load(name, load_external_data=False).opset_import}
        if not domains <= _DOMAINS:
            return None  # it lacks the library of somebody's own operators
        return ort.InferenceSession(name, quiet_options(), providers=["CPUExecutionProvider"])

    for check in (
        onnx.checker.check_model,
        lambda name: onnx.shape_inference.infer_shapes(onnx.load(name), strict_mode=True),
        runtime,
        lambda name: ir.serde.serialize_model(ir.load(name)),  # texts that are not UTF-8
    ):
        try:
            check(file)
        except Exception as error:  # none of them has an error class of its own
            return one_line(error, 200)
    return ""
