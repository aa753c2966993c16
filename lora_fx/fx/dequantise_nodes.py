"""The op that makes numbers of codes, as nodes of a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.onnx import BITS
from lora_fx.fx.codes import DEQUANTISE, LEVELS, PARTS, Stored, arguments
from lora_fx.fx.graph.nodes import dtype_of
from lora_fx.fx.quantised_parameters import declare, stored_of, tensors_of


def read_codes(graph: fx.Graph, names: dict[str, str], stored_by_name: dict[str, Stored]) -> bool:
    """Let a graph read the tree's codes with the op; returns whether it changed.

    Every user has an op of its own, just before it and in its module, so that no more than one
    weight is there as numbers at a time.
    """
    changed = False
    for node in graph.find_nodes(op="get_attr"):
        name = names.get(str(node.target), "")
        stored = stored_by_name.get(name)
        if stored is None:
            continue
        form = arguments(stored, dtype_of(node) or stored.dtype)
        for user in [user for user in node.users if user.target is not DEQUANTISE]:
            with graph.inserting_before(user):
                buffers = {part: graph.get_attr(f"{name}_{part}") for part in stored.parts}
                operands = (node, *map(buffers.get, PARTS), *form)
                weight = graph.call_function(DEQUANTISE, operands)
            weight.meta["val"] = node.meta["val"]
            if "nn_module_stack" in user.meta:
                weight.meta["nn_module_stack"] = user.meta["nn_module_stack"]
            user.replace_input_with(node, weight)
            changed = True
    return changed


def declare_codes(root: nn.Module, graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Record in a tree the meaning of its codes, from the ops of a program from a file.

    Args:
        root: The tree of the file's tensors.
        graph: The program's.
        names: Placeholder → the tensor's name.

    Raises:
        LoraFxError: What an op says and what its tensors are differ, or what two ops say of them.
    """
    for node in graph.find_nodes(op="call_function", target=DEQUANTISE):
        codes, *buffers, shape, kind, block, turned, dtype = node.args
        buffer_names = {
            part: names[buffer.name]
            for part, buffer in zip(PARTS, buffers, strict=True)
            if buffer is not None
        }
        name = names[codes.name]
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        stored = Stored(kind, sizes, block, dtype, turned, tuple(buffer_names))

        beside_codes = buffer_names == {part: f"{name}_{part}" for part in buffer_names}
        agrees = stored_of(root, name) in (None, stored)
        if not (beside_codes and agrees and _fits(stored, *tensors_of(root, name))):
            form = (kind, shape, block, turned, dtype)
            raise LoraFxError(
                f"{name}: its codes are not those of {form}",
                "the file is damaged: download it again",
            )
        declare(root, name, stored)


def _fits(stored: Stored, codes: torch.Tensor, *buffers: torch.Tensor) -> bool:
    """Whether tensors are as the table at the top of lora_fx.fx.codes has them."""
    if not _is_known_form(stored):
        return False
    if stored.format in LEVELS:
        count = math.prod(stored.shape)
        bytes_shape: tuple[int, ...] = (_ceil(count * stored.bits, 8),)
        shapes = [bytes_shape, (_ceil(count, stored.block),)]
    else:
        shapes = _shapes_of_rows(stored, codes.shape[0], buffers)
        if "order" in stored.parts and not _is_order(buffers[-1], shapes[-1][0]):
            return False
    return [tuple(tensor.shape) for tensor in (codes, *buffers)] == shapes


def _is_known_form(stored: Stored) -> bool:
    """Whether there are codes of such a format, shape, block and dtype."""
    formats = (*LEVELS, *(f"int{bits}" for bits in BITS))
    sizes = (*stored.shape, stored.block)
    if not all(type(size) is int and size > 0 for size in sizes):
        return False
    if not isinstance(stored.dtype, torch.dtype) or not stored.dtype.is_floating_point:
        return False
    return stored.format in formats and len(stored.shape) > 1


def _shapes_of_rows(
    stored: Stored, rows: int, buffers: Sequence[torch.Tensor]
) -> list[tuple[int, ...]]:
    """The shapes of codes that are stored row by row, and of their parts."""
    columns = math.prod(stored.shape) // max(rows, 1)
    blocks = -(-math.prod(stored.shape) // max(rows, 1) // stored.block)
    shapes: list[tuple[int, ...]] = [
        (rows, blocks, stored.block * stored.bits // 8),
        (rows, blocks),
    ]
    if "zero" in stored.parts:
        in_bytes = buffers[1].dtype == torch.uint8
        shapes.append((rows, _ceil(blocks * stored.bits, 8) if in_bytes else blocks))
    if "order" in stored.parts:
        shapes.append((columns,))
    return shapes


def _is_order(order: torch.Tensor, columns: int) -> bool:
    """Whether every column has a place; a tensor without values may."""
    if order.is_meta:
        return True
    return torch.equal(order.long().sort()[0].cpu(), torch.arange(columns))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
