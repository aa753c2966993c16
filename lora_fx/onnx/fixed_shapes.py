"""A graph at given sizes: the shapes of its inputs in numbers, and what follows from them.

Names of sizes in a file are free, and FLOPs need numbers: where nobody gives any, a batch is of one
row, and every other free size, an image's height and width with it, is 64.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from lora_fx.errors import LoraFxError, silenced
from lora_fx.inputs import BATCH, Input, Inputs, Named, expect_input
from lora_fx.onnx.graph.flow import tensor_dtype
from lora_fx.onnx.session import IMAGE

Shapes = Mapping[str, tuple[int, ...]]


def with_fixed_shapes(model: ir.Model, arrays: Named, where: str) -> tuple[ir.Model, Shapes]:
    """A clone of a model whose inputs have sizes, and these.

    Args:
        model: The model; it stays as it is.
        arrays: A user's inputs by name, whose sizes they are; any that are not given fit them.
        where: The file, for messages.

    Raises:
        LoraFxError: An array that is no input, or does not fit it.
    """
    clone = model.clone()
    inputs = {str(v.name): v for v in clone.graph.inputs if v.name not in clone.graph.initializers}
    symbols: dict[str, int] = {}
    for name, array in arrays.items():
        expect_input(name, inputs)
        _bind(inputs[name], tuple(array.shape), symbols, where)
    shapes = _shapes(inputs, symbols) | {n: tuple(a.shape) for n, a in arrays.items()}
    free = _symbols(inputs, shapes)
    for name, shape in shapes.items():
        inputs[name].shape = ir.Shape(shape)
    before = {v: v.shape for node in clone.graph.all_nodes() for v in node.outputs}
    for value in before:
        value.shape = None
    with silenced(levels={"onnx_ir": logging.CRITICAL}):
        ShapeInferencePass()(clone)
    for value, shape in before.items():
        if value.shape is None and shape is not None:  # what the inference does not know
            value.shape = ir.Shape([_size(d, free) for d in shape])
    return clone, shapes


def _bind(value: ir.Value, shape: tuple[int, ...], symbols: dict[str, int], where: str) -> None:
    """Note what an array says of the names of an input's sizes."""
    expected = list(value.shape) if value.shape is not None else [None] * len(shape)
    fits = len(expected) == len(shape)
    for d, n in zip(expected, shape, strict=False):
        fits = fits and (not isinstance(d, int) or d in (n, -1))
        if isinstance(d, ir.SymbolicDim) and d.value:
            fits = fits and symbols.setdefault(str(d.value), n) == n
    if not fits:
        sizes = ", ".join(str(d) for d in expected)
        raise LoraFxError(
            f"{where}: input {str(value.name)!r} takes [{sizes}], and --inputs has {list(shape)}",
            "give an array of such a shape",
        )


def _shapes(
    inputs: Mapping[str, ir.Value], symbols: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shape of every input, its free sizes as they are known, or 1 for a batch and else 64."""
    specs = []
    for name, value in inputs.items():
        if value.shape is None:
            continue
        texts = [_text(d, symbols) for d in value.shape]
        dims = {k: t if k or t.isdigit() else BATCH for k, t in enumerate(texts)}
        sizes = tuple(int(t) if t.isdigit() else IMAGE for t in texts)
        dtype = tensor_dtype(value.dtype or ir.DataType.FLOAT)
        free = {k: t for k, t in dims.items() if not t.isdigit()}
        specs.append(Input(name, dtype, sizes, free))
    return Inputs(tuple(specs)).sizes((1, IMAGE))


def _text(size: int | ir.SymbolicDim, symbols: Mapping[str, int]) -> str:
    """A size as a number where it is known, else its name."""
    if isinstance(size, int) and size >= 0:
        return str(size)
    name = str(getattr(size, "value", "") or "") or "free"
    return str(symbols.get(name, name))


def _symbols(inputs: Mapping[str, ir.Value], shapes: Shapes) -> dict[str, int]:
    """The sizes by their names in the file."""
    pairs = (p for n, s in shapes.items() for p in zip(inputs[n].shape or (), s, strict=False))
    return {str(d.value): n for d, n in pairs if isinstance(d, ir.SymbolicDim)}


def _size(size: int | ir.SymbolicDim, symbols: Mapping[str, int]) -> int | ir.SymbolicDim:
    return size if isinstance(size, int) else symbols.get(str(size.value), size)
