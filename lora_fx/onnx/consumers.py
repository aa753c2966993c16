"""What a portable file may hold: what every runtime of docs/runtimes takes.

Everything else is refused by name, before a file is written. The bounds of the versions are what
was tried: OpenVINO 2026.4.1, onnxruntime-web 1.30.0 and onnxruntime 1.32.0 load a network with an
embedding, a convolution and linear layers in every opset from 20 to 26, with every IR version from
10 to 13.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lora_fx.errors import LoraFxError

NEWEST_OPSET = 26
NEWEST_IR = 13
ONNX = ("", "ai.onnx")
"""The names of the domain of ONNX's own operators."""
DTYPES = frozenset(
    ir.DataType[name]
    for name in (
        "FLOAT", "FLOAT16", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16",
        "UINT32", "UINT64",
    )
)  # fmt: skip
"""The dtypes of tensors that a file may hold; of others (bfloat16, codes of 4 bits), one runtime or
another has no arrays or no kernels."""


def require_portable(model: ir.Model) -> None:
    """Raise unless a model holds only what every runtime takes; drop imports that nothing uses.

    Raises:
        LoraFxError: An operator of another domain, a function, a dtype, an opset or an IR version
            that is not among those that were tried.
    """
    if model.functions:
        names = sorted(str(function.name) for function in model.functions.values())
        raise _not_portable(f"it has the function {names[0]!r}", "inline the functions first")
    for node in model.graph.all_nodes():
        if node.domain not in ONNX:
            raise _not_portable(
                f"{node.op_type} is an operator of {node.domain}, which only ONNX Runtime has",
                "export from a file or a model without it",
            )
    for name in [*model.opset_imports]:
        if name not in ONNX:
            del model.opset_imports[name]

    opset = max(model.opset_imports.values(), default=0)
    if opset > NEWEST_OPSET:
        raise _not_portable(
            f"it has opset {opset}; the newest that was tried is {NEWEST_OPSET}",
            "pass --opset 20, or convert the file with onnx.version_converter",
        )
    if model.ir_version > NEWEST_IR:
        raise _not_portable(
            f"it has IR version {model.ir_version}; the newest that was tried is {NEWEST_IR}",
            "write the file with an older version of the onnx package",
        )
    for value in _stored_and_passed(model.graph):
        if value.dtype is not None and value.dtype not in DTYPES:
            raise _not_portable(
                f"{value.name!r} is {value.dtype.name.lower()}, which not every runtime takes",
                "use a precision that they have: float32, float16 or int8",
            )


def _not_portable(message: str, hint: str) -> LoraFxError:
    return LoraFxError(f"a file for --target portable cannot be written: {message}", hint)


def _stored_and_passed(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield a graph's inputs, outputs and initialisers."""
    yield from graph.inputs
    yield from graph.outputs
    yield from graph.initializers.values()
