"""What a session on an .onnx file is fed: arrays of inputs and tensors of adapters, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect, one_line, retold
from lora_fx.onnx.manifest import Manifest, read_file
from lora_fx.text import Json, near


def tensors_of(adapter: Adapter | str | PathLike[str], manifest: Manifest) -> dict[str, Array]:
    """The tensors of an adapter, or of its file in any format, checked against a manifest."""
    if isinstance(adapter, Adapter):
        return manifest.tensors(adapter)
    from lora_fx.formats.io import load_adapter

    wanted = "an Adapter, or the path of one"
    expect(adapter, (str, PathLike), "the adapter", wanted, "adapter=None runs the base model")
    where = fspath(adapter)
    if where.endswith(".onnx_adapter"):
        found = read_file(Path(where))[0]
        manifest.check(found, where)
        return found
    return manifest.tensors(load_adapter(where), where)


def arrays_of(inputs: object) -> dict[str, Array]:
    """Inputs by name as arrays; lists of numbers, and tensors of torch on the CPU, are taken.

    Raises:
        LoraFxError: No mapping by name, or a value that is no array of numbers.
    """
    hint = "session.run({'x': array}), with the names of the model's inputs"
    expect(inputs, Mapping, "inputs", "arrays by the names of the model's inputs", hint)
    assert isinstance(inputs, Mapping)
    arrays = {}
    for name, value in inputs.items():
        expect(name, str, f"the input {one_line(repr(name), 60)}", "the name of one", hint)
        with retold(f"input {name!r} is no array", "numpy.asarray makes one"):
            arrays[name] = np.asarray(value)
        if arrays[name].dtype.kind == "O":
            kind = type(value).__name__
            raise LoraFxError(f"input {name!r} is a {kind}, not an array of numbers", hint)
    return arrays


def check_inputs(
    inputs: Mapping[str, Array], known: Collection[str], ranges: Sequence[Condition]
) -> None:
    """Raise for an input that is missing or unknown, and for sizes that a file is not true for."""
    for name in inputs:
        if name not in known:
            hint = near(name, [*known], f"inputs: {sorted(known)}")
            raise LoraFxError(f"the model has no input {name!r}", hint)
    missing = sorted(set(known) - set(inputs))
    if missing:
        raise LoraFxError(f"input {missing[0]!r} is missing", f"inputs: {sorted(known)}")
    for _, name, d in (size for condition in ranges for size in condition.sizes):
        if inputs[name].ndim <= d:
            found = f"{inputs[name].ndim} dimensions; expected {d + 1} at least"
            raise LoraFxError(f"input {name!r} has {found}", "give arrays as the model takes them")
    for condition in ranges:
        given = {(n, d): inputs[n].shape[d] for _, n, d in condition.sizes}
        if not condition.holds(given):
            raise condition.refusal(given)


def ort_values(tensors: Mapping[str, Array], device: str = "cpu") -> Json:
    """The arrays as OrtValues on a device, by name."""
    from onnxruntime import OrtValue

    return {
        n: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), device, 0)
        for n, x in tensors.items()
    }
