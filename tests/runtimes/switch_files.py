"""Portable switch files with two adapters, beside what torch gives: read by tests of any runtime.

A folder has for each NAME the file NAME.onnx or NAME.pt2, its adapters NAME.a.safetensors,
NAME.b.safetensors and NAME.base.safetensors, whose tensors have the names of the file's inputs, and
NAME.npz with arrays `SIZE/KIND/TENSOR`: SIZE is 0, 1 …, KIND is `in` for the file's inputs, or
`base`, `a`, `b` for the outputs of the model's own code, on W and on W + s·BA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import rel
from lora_fx.dtypes import Array

ADAPTERS = ("a", "b")
SEEN = 1e-3
"""An adapter changes some output by more than this: equality without an effect proves nothing."""

Outputs = Callable[[Adapter | None, Mapping[str, Array]], Mapping[str, Array]]
"""(an adapter or None, inputs by name) → outputs by name, of the model's own code."""


def write(
    folder: Path,
    name: str,
    model: object,
    adapters: Mapping[str, Adapter],
    sizes: Iterable[Mapping[str, Array]],
    outputs: Outputs,
    *,
    suffix: str = ".onnx",
    **options: Any,
) -> None:
    """Export a model with its adapters a and b, and store what torch gives for each.

    Args:
        folder: Where the files go.
        name: What they are called.
        model: What export takes.
        adapters: a and b.
        sizes: Inputs by the names of the file, at one or more sizes.
        outputs: The reference.
        suffix: That of the file, .onnx or .pt2.
        options: Further ones of export.
    """
    path = folder / f"{name}{suffix}"
    by_file = {f"{name}.{which}": adapters[which] for which in ADAPTERS}
    options = {"mode": "switch", **options}
    if suffix == ".onnx":
        options.update(target="portable", provider="cpu")
    lora_fx.export(model, path, adapters=by_file, **options)

    arrays: dict[str, Array] = {}
    for number, inputs in enumerate(sizes):
        kinds = {"in": inputs, "base": outputs(None, inputs)}
        for which in ADAPTERS:
            kinds[which] = outputs(adapters[which], inputs)
            assert changes(kinds[which], kinds["base"]), f"{name}: {which} has no effect"
        assert changes(kinds["a"], kinds["b"]), f"{name}: a and b are alike"
        for kind, tensors in kinds.items():
            for tensor, array in tensors.items():
                arrays[f"{number}/{kind}/{tensor}"] = array
    np.savez(folder / f"{name}.npz", **arrays)


def changes(outputs: Mapping[str, Array], base: Mapping[str, Array]) -> bool:
    """Whether some output differs from the base's."""
    return max(rel(outputs[name], base[name]) for name in base) > SEEN


def stored(folder: Path, name: str) -> list[dict[str, dict[str, Array]]]:
    """What `write` stored: for each size, arrays by kind and name."""
    sizes: list[dict[str, dict[str, Array]]] = []
    with np.load(folder / f"{name}.npz") as arrays:
        for key in arrays:
            number, kind, tensor = key.split("/", 2)
            while len(sizes) <= int(number):
                sizes.append({})
            sizes[int(number)].setdefault(kind, {})[tensor] = arrays[key]
    return sizes


def worst(outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest max|a − b| / max|b| of all outputs; infinite for another shape."""
    largest = 0.0
    for name, array in expected.items():
        same_shape = outputs[name].shape == array.shape
        largest = max(largest, rel(outputs[name], array) if same_shape else np.inf)
    return largest
