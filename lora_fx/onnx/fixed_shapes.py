"""A graph at given sizes: the shapes of its inputs in numbers, and the shapes that follow.

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
from lora_fx.onnx.graph.values import tensor_dtype
from lora_fx.onnx.signature import IMAGE

Shapes = Mapping[str, tuple[int, ...]]


def with_fixed_shapes(model: ir.Model, arrays: Named, where: str) -> tuple[ir.Model, Shapes]:
    """A clone of a model whose inputs have numbers for sizes, and the shapes of these inputs.

    Args:
        model: The model; it stays as it is.
        arrays: A user's inputs by name; their sizes are taken, and inputs left out fit them.
        where: The file, for messages.

    Raises:
        LoraFxError: An array that is no input, or does not fit it.
    """
    clone = model.clone()
    inputs = {}
    for value in clone.graph.inputs:
        if value.name not in clone.graph.initializers:
            inputs[str(value.name)] = value
    symbols: dict[str, int] = {}
    for name, array in arrays.items():
        expect_input(name, inputs)
        _bind(inputs[name], tuple(array.shape), symbols, where)
    shapes = _shapes(inputs, symbols)
    shapes |= {name: tuple(array.shape) for name, array in arrays.items()}
    numbers = _numbers(inputs, shapes)
    for name, shape in shapes.items():
        inputs[name].shape = ir.Shape(shape)

    file_shapes = {}
    for node in clone.graph.all_nodes():
        for value in node.outputs:
            file_shapes[value] = value.shape
            value.shape = None
    with silenced(levels={"onnx_ir": logging.CRITICAL}):
        ShapeInferencePass()(clone)
    for value, file_shape in file_shapes.items():
        if value.shape is None and file_shape is not None:  # what the inference does not know
            value.shape = ir.Shape([_size(size, numbers) for size in file_shape])
    return clone, shapes


def _bind(value: ir.Value, shape: tuple[int, ...], symbols: dict[str, int], where: str) -> None:
    """Note which numbers an array gives to the names of an input's sizes."""
    expected = list(value.shape) if value.shape is not None else [None] * len(shape)
    pairs = zip(expected, shape, strict=False)
    if len(expected) == len(shape) and all(_fits(*pair, symbols) for pair in pairs):
        return
    sizes = ", ".join(str(size) for size in expected)
    raise LoraFxError(
        f"{where}: input {str(value.name)!r} takes [{sizes}], but --inputs has {list(shape)}",
        "give an array of this shape",
    )


def _fits(size: int | ir.SymbolicDim | None, number: int, symbols: dict[str, int]) -> bool:
    """Whether a size of the file may be a number; the first number of a name is noted."""
    if isinstance(size, int):
        return size in (number, -1)
    if size is not None and size.value:
        return symbols.setdefault(str(size.value), number) == number
    return True


def _shapes(
    inputs: Mapping[str, ir.Value], symbols: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shape of every input, its free sizes as they are known, or 1 for a batch and else 64."""
    specs = []
    for name, value in inputs.items():
        if value.shape is None:
            continue
        texts = [_text(size, symbols) for size in value.shape]
        if texts and not texts[0].isdigit():
            texts[0] = BATCH
        sizes = tuple(int(text) if text.isdigit() else IMAGE for text in texts)
        free = {axis: text for axis, text in enumerate(texts) if not text.isdigit()}
        dtype = tensor_dtype(value.dtype or ir.DataType.FLOAT)
        specs.append(Input(name, dtype, sizes, free))
    return Inputs(tuple(specs)).sizes((1, IMAGE))


def _text(size: int | ir.SymbolicDim, symbols: Mapping[str, int]) -> str:
    """A size as a number where it is known, else its name."""
    if isinstance(size, int) and size >= 0:
        return str(size)
    name = str(getattr(size, "value", "") or "") or "free"
    return str(symbols.get(name, name))


def _numbers(inputs: Mapping[str, ir.Value], shapes: Shapes) -> dict[str, int]:
    """The sizes by their names in the file."""
    numbers = {}
    for name, shape in shapes.items():
        for size, number in zip(inputs[name].shape or (), shape, strict=False):
            if isinstance(size, ir.SymbolicDim):
                numbers[str(size.value)] = number
    return numbers


def _size(size: int | ir.SymbolicDim, numbers: Mapping[str, int]) -> int | ir.SymbolicDim:
    return size if isinstance(size, int) else numbers.get(str(size.value), size)
