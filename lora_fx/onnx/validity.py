"""Whose fault it is when an .onnx file makes something fail: the file's, or ours."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from lora_fx.errors import LoraFxError, one_line
from lora_fx.onnx.runtime_log import quiet_options

_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
"""Domains of the operators that the runtime has by itself."""
Verb = TypeVar("Verb", bound=Callable[..., Any])


def blaming(verb: Verb) -> Verb:
    """Wrap a verb of .onnx files: where it fails on an invalid file, the error says so.

    onnx_ir, the runtime and the passes raise whatever an invalid graph makes them raise. To check
    every file beforehand would cost time for every file, so a file is checked after a failure.
    """

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except (LoraFxError, OSError, MemoryError):  # no fault of the file
            raise
        except Exception as error:
            for name in _onnx_files((*args, *kwargs.values())):
                why = _invalid(name)
                if why:
                    hint = "run onnx.checker.check_model to see what is wrong with it"
                    raise LoraFxError(f"{name}: not a valid ONNX model: {why}", hint) from error
            raise

    return cast(Verb, call)


def _onnx_files(arguments: Iterable[object]) -> list[str]:
    """Those of a call's arguments that are paths of .onnx files."""
    paths = [os.fspath(path) for path in arguments if isinstance(path, (str, os.PathLike))]
    return [path for path in paths if path.endswith(".onnx") and os.path.isfile(path)]


def _invalid(file: str) -> str:
    """The fault that onnx's checker or shapes, the runtime or onnx_ir find; empty if none."""
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort

    def infer_shapes(name: str) -> None:
        onnx.shape_inference.infer_shapes(onnx.load(name), strict_mode=True)

    def open_in_runtime(name: str) -> None:
        opsets = onnx.load(name, load_external_data=False).opset_import
        if {opset.domain for opset in opsets} <= _DOMAINS:
            ort.InferenceSession(name, quiet_options(), providers=["CPUExecutionProvider"])
        # else the runtime would lack the library of somebody's own operators

    def serialise(name: str) -> None:
        ir.serde.serialize_model(ir.load(name))  # fails on texts that are not UTF-8

    for check in (onnx.checker.check_model, infer_shapes, open_in_runtime, serialise):
        try:
            check(file)
        except Exception as error:  # none of them has an error class of its own
            return one_line(error, 200)
    return ""
