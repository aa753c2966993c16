"""What Triton checks when it loads a model with its ONNX Runtime backend, for tests.

Written after the sources of core (ValidateIOShape) and onnxruntime_backend (ValidateInputs,
ValidateOutputs, CompareDimsSupported), on the protobuf that tritonclient ships.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

DTYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16",
    "float": "FP32", "double": "FP64", "string": "STRING", "bfloat16": "BF16",
}  # fmt: skip


@cache
def proto() -> Any:
    """Triton's model_config_pb2, by its path: importing tritonclient.grpc would need grpcio."""
    found = importlib.util.find_spec("tritonclient")
    assert found and found.submodule_search_locations, "pip install -e .[dev]"
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loads(home: Path, version: str = "1") -> Any:
    """The ModelConfig of DIR/NAME; an AssertionError where the server would not load it."""
    from google.protobuf import text_format

    try:
        config = text_format.Parse(
            (home / "config.pbtxt").read_text("utf-8"), proto().ModelConfig()
        )
    except text_format.ParseError as error:
        raise AssertionError(str(error)) from error
    assert config.name == home.name
    assert config.backend == "onnxruntime"
    assert config.max_batch_size >= 0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        home / version / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    required = {v.name: v for v in session.get_inputs()}
    free = {v.name: v for v in session.get_overridable_initializers()}
    outputs = {v.name: v for v in session.get_outputs()}
    assert {p.name for p in config.input if not p.optional} == set(required)
    assert {p.name for p in config.input if p.optional} <= set(free)
    assert {p.name for p in config.output} == set(outputs)
    for p in config.input:
        assert not (p.optional and config.max_batch_size), p.name
        _fits(p, {**required, **free}[p.name], config.max_batch_size, exact=False)
    for p in config.output:
        _fits(p, outputs[p.name], config.max_batch_size, exact=True)
    return config


def _fits(p: Any, value: Any, max_batch: int, *, exact: bool) -> None:
    kind = proto().DataType.Name(p.data_type)
    assert kind == "TYPE_" + DTYPES[value.type.removeprefix("tensor(").removesuffix(")")], p.name
    assert p.dims, f"{p.name}: must specify dims"
    assert all(d >= 1 or d == -1 for d in p.dims), p.name
    dims = list(p.dims)
    if p.HasField("reshape"):
        dims = list(p.reshape.shape)
        assert dims or max_batch, f"{p.name}: cannot have empty reshape"
        assert dims or list(p.dims) == [1], p.name
    model = [d if isinstance(d, int) else -1 for d in value.shape]
    if max_batch:
        assert model and model[0] == -1, p.name
        dims = [-1, *dims]
    elif not model:
        assert all(d == 1 for d in dims), p.name
        return
    assert len(model) == len(dims), (p.name, model, dims)
    for there, here in zip(model, dims, strict=True):
        assert there == here or (not exact and there == -1), (p.name, model, dims)
