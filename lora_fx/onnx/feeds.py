"""Checks of a session's feeds: arrays of inputs, and tensors of adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import BASE_NUMBER
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect, one_line, retold
from lora_fx.onnx.device_values import value_on
from lora_fx.onnx.manifest import Manifest
from lora_fx.onnx.runtime_adapter import read_file
from lora_fx.onnx.stored_weights import for_file
from lora_fx.text import Json, near


def tensors_of(
    adapter: Adapter | str | PathLike[str], manifest: Manifest, path: str | PathLike[str]
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """Return an adapter's tensors, checked against a manifest, and its invocation tokens.

    Args:
        adapter: An Adapter, or its file; what reads its base is evaluated on the weights in the
            model's file. An .onnx_adapter file says nothing of invocation tokens: the manifest has
            those of the adapters that were exported with the file, by name.
        manifest: That of the model.
        path: The model's file.

    Raises:
        LoraFxError: It does not fit; or it is an .onnx_adapter file of a name that the manifest
            of a file with `adapter_starts` does not have.
    """
    if isinstance(adapter, Adapter):
        return manifest.tensors(for_file(adapter, manifest, path)), adapter.invocation
    from lora_fx.formats.io import load_adapter

    expected = "an Adapter, or the path of one"
    expect(
        adapter, (str, PathLike), "the adapter", expected, "pass adapter=None to run the base model"
    )
    where = fspath(adapter)
    if where.endswith(".onnx_adapter"):
        tensors, versions = read_file(Path(where))
        manifest.check(tensors, where)
        manifest.check_base(tensors, versions[BASE_NUMBER], where)
        return tensors, _exported_invocation(where, manifest)
    loaded = load_adapter(where)
    if where.endswith(".safetensors") and manifest.required and not loaded.invocation:
        _refuse_without_tokens(where, manifest)
    return manifest.tensors(for_file(loaded, manifest, path), where), loaded.invocation


def _refuse_without_tokens(where: str, manifest: Manifest) -> None:
    """Raise for a file of an aLoRA's name that says nothing of invocation tokens."""
    invocations = {} if manifest.starts is None else manifest.starts.invocations
    tokens = invocations.get(Path(where).stem)
    if tokens:
        raise LoraFxError(
            f"{where}: it says nothing of invocation tokens, and would act on every token, while "
            f"the adapter of this name was exported with the tokens {[*tokens]}",
            "export the adapter again; or rename the file, if it is a plain LoRA",
        )


def _exported_invocation(where: str, manifest: Manifest) -> tuple[int, ...]:
    """Return the tokens of an .onnx_adapter file, by its name, as the manifest has them."""
    if manifest.starts is None:
        return ()
    name = Path(where).stem
    if name not in manifest.starts.invocations:
        raise LoraFxError(
            f"{where}: an .onnx_adapter file does not say from which tokens on it acts, and no "
            f"adapter {name!r} was exported with this file",
            "load the adapter from its folder, or keep the file name that export gave",
        )
    return manifest.starts.invocations[name]


def arrays_of(inputs: object) -> dict[str, Array]:
    """Return inputs by name as arrays; lists of numbers and torch CPU tensors are accepted.

    Raises:
        LoraFxError: No mapping by name, or a value that is no array of numbers.
    """
    hint = "call session.run({'x': array}), with the names of the model's inputs"
    expect(inputs, Mapping, "inputs", "arrays by the names of the model's inputs", hint)
    assert isinstance(inputs, Mapping)
    arrays = {}
    for name, value in inputs.items():
        expect(name, str, f"the input {one_line(repr(name), 60)}", "the name of one", hint)
        with retold(f"input {name!r} is not an array", "make one with numpy.asarray"):
            arrays[name] = np.asarray(value)
        if arrays[name].dtype.kind == "O":
            kind = type(value).__name__
            raise LoraFxError(f"input {name!r} is a {kind}, not an array of numbers", hint)
    return arrays


def check_inputs(
    inputs: Mapping[str, Array], names: Collection[str], ranges: Sequence[Condition]
) -> None:
    """Raise for an input that is missing or unknown, and for sizes that the file does not allow.

    Args:
        inputs: Arrays by input name.
        names: The names of the file's inputs.
        ranges: The sizes that the file is true for.
    """
    for name in inputs:
        if name not in names:
            hint = near(name, [*names], f"inputs: {sorted(names)}")
            raise LoraFxError(f"the model has no input {name!r}", hint)
    missing_names = sorted(set(names) - set(inputs))
    if missing_names:
        raise LoraFxError(f"input {missing_names[0]!r} is missing", f"inputs: {sorted(names)}")

    # The dimensions of all conditions come first: no condition is asked where one is lacking.
    for condition in ranges:
        for _, name, axis in condition.sizes:
            _check_dimension(name, inputs[name], axis)
    for condition in ranges:
        sizes = {(name, axis): inputs[name].shape[axis] for _, name, axis in condition.sizes}
        if not condition.holds(sizes):
            raise condition.refusal(sizes)


def _check_dimension(name: str, array: Array, axis: int) -> None:
    """Raise if an input lacks a dimension."""
    if array.ndim <= axis:
        dimensions = f"{array.ndim} dimensions; expected {axis + 1} at least"
        raise LoraFxError(
            f"input {name!r} has {dimensions}",
            "pass arrays with the dimensions of the model's inputs",
        )


def ort_values(tensors: Mapping[str, Array], device: str = "cpu") -> Json:
    """Return the arrays as OrtValues on a device, by name."""
    return {name: value_on(np.ascontiguousarray(array), device) for name, array in tensors.items()}
