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


def read_codes(graph: fx.Graph, names: dict[str, str], held: dict[str, Stored]) -> bool:
    """Let a graph read, by the op, what the tree stores as codes; returns whether any was new.

    Every user has an op of its own, just before it and in its module, so that no more than one
    weight is there as numbers at a time.
    """
    new = False
    for node in graph.find_nodes(op="get_attr"):
        name = names.get(str(node.target), "")
        stored = held.get(name)
        if stored is None:
            continue
        rest = arguments(stored, dtype_of(node) or stored.dtype)
        for user in [u for u in node.users if u.target is not DEQUANTISE]:
            with graph.inserting_before(user):
                parts = {p: graph.get_attr(f"{name}_{p}") for p in stored.parts}
                made = graph.call_function(DEQUANTISE, (node, *map(parts.get, PARTS), *rest))
            made.meta["val"] = node.meta["val"]
            if "nn_module_stack" in user.meta:
                made.meta["nn_module_stack"] = user.meta["nn_module_stack"]
            user.replace_input_with(node, made)
            new = True
    return new


def learn(root: nn.Module, graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Let a tree say what its codes stand for, as the ops of a program from a file do.

    Args:
        root: The tree of the file's tensors.
        graph: The program's.
        names: Placeholder → the tensor's name.

    Raises:
        LoraFxError: What an op says and what its tensors are differ, or what two ops say of them.
    """
    for node in graph.find_nodes(op="call_function", target=DEQUANTISE):
        codes, *beside, shape, kind, block, turned, dtype = node.args
        given = {p: names[n.name] for p, n in zip(PARTS, beside, strict=True) if n is not None}
        name, said = names[codes.name], (kind, shape, block, turned, dtype)
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        stored = Stored(kind, sizes, block, dtype, turned, tuple(given))
        own = given == {p: f"{name}_{p}" for p in given}
        same = stored_of(root, name) in (None, stored)
        if not (own and same and _fits(stored, *tensors_of(root, name))):
            raise LoraFxError(
                f"{name}: its codes are not those of {said}", "the file is damaged: fetch it again"
            )
        declare(root, name, stored)


def _fits(stored: Stored, codes: torch.Tensor, *rest: torch.Tensor) -> bool:
    """Whether tensors are as the table at the top has them."""
    kinds = (*LEVELS, *(f"int{n}" for n in BITS))
    plain = all(type(n) is int and n > 0 for n in (*stored.shape, stored.block))
    dtype = isinstance(stored.dtype, torch.dtype) and stored.dtype.is_floating_point
    if not (plain and dtype and stored.format in kinds and len(stored.shape) > 1):
        return False
    count, bits = math.prod(stored.shape), stored.bits
    if stored.format in LEVELS:
        want: list[tuple[int, ...]] = [(-(-count * bits // 8),), (-(-count // stored.block),)]
    else:
        rows, blocks = codes.shape[0], -(-count // max(codes.shape[0], 1) // stored.block)
        width = blocks * bits
        want = [(rows, blocks, stored.block * bits // 8), (rows, blocks)]
        if "zero" in stored.parts:
            packed = rest[1].dtype == torch.uint8
            want.append((rows, -(-width // 8) if packed else blocks))
        if "order" in stored.parts:
            order, places = rest[-1], torch.arange(count // max(rows, 1))
            want.append(tuple(places.shape))
            if not order.is_meta and not torch.equal(order.long().sort()[0].cpu(), places):
                return False
    return [tuple(t.shape) for t in (codes, *rest)] == want
