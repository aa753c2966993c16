"""Replacement of insert's factors by the factors of a switchable graph.

The new factors are inputs with defaults, or initialisers of a fixed rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.factor_tensors import slot_names, tensor_name
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.errors import LoraFxError
from lora_fx.ir.kinds import swap_last
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import MARK
from lora_fx.onnx.graph.values import delete_unread
from lora_fx.onnx.manifest import SwitchSlot
from lora_fx.targets.target import Target


def put_factors(
    graph: OnnxGraph, target: Target, rank: int, symbol: str, weight: str | None = None
) -> SwitchSlot:
    """Replace insert's factors by A and B in the form that the products read, and by D.

    Args:
        graph: A graph that has the branches of the target.
        target: The target.
        rank: The rank of the default, which is zeros.
        symbol: The name of the rank as a dynamic dimension of inputs; empty where A and B are
            initialisers and no inputs.
        weight: The hash of the weight, where the branches read factors of rows, which D holds.

    Raises:
        LoraFxError: The graph has a tensor of such a name.
    """
    layout = target.layout
    batch = layout.batch_shape
    free: int | str = symbol or rank
    slot = SwitchSlot(
        f"{target.key}.lora_A",
        f"{target.key}.lora_B",
        layout.in_size,
        layout.out_size,
        batch,
        tuple(target.parameter.shape),
        target.op,
        target.role,
        rank,
        d="" if weight is None else f"{target.key}.lora_D",
        weight=weight or "",
        layout=layout.to_json() if weight is not None else {},
    )
    inserted_names = [*slot_names(target.key)]
    shapes = [(*batch, layout.in_size, free), (*batch, free, layout.out_size)]
    if slot.d:
        inserted_names.append(tensor_name(target.key, GAINS))
        shapes.append((*batch, layout.out_size))
    owner = graph.model.graph
    for inserted_name, name, shape in zip(inserted_names, slot.names, shapes, strict=True):
        if name in owner.initializers or any(value.name == name for value in owner.inputs):
            raise LoraFxError(
                f"the graph already has a tensor {name!r}",
                f"pass --exclude {target.key} to leave it out",
            )
        inserted = owner.initializers[inserted_name]
        sizes = [size if isinstance(size, int) else rank for size in shape]
        zeros = np.zeros(sizes, np.float32)
        factor = add_initialiser(owner, name, zeros, inserted.metadata_props[MARK])
        factor.shape = ir.Shape(shape)
        if name == slot.d:
            inserted.replace_all_uses_with(factor)
        else:
            reread(graph, inserted, factor, swap_last(len(batch)))
        del owner.initializers[inserted_name]
        if symbol:
            owner.inputs.remove(inserted)
            owner.inputs.append(factor)
    return slot


def without_defaults(graph: OnnxGraph, slots: Iterable[SwitchSlot]) -> None:
    """Make A and B inputs that every run has to give.

    OpenVINO 2026.4.1 makes constants of inputs with a default, and onnxruntime-web 1.30.0 takes no
    value for them; onnxsim and onnxslim fold them.
    """
    initializers = graph.model.graph.initializers
    for slot in slots:
        for name in slot.names:
            value = initializers.pop(name)
            value.const_value = None


def reread(graph: OnnxGraph, value: ir.Value, transposed: ir.Value, perm: tuple[int, ...]) -> None:
    """Let users of a value read its transpose, with as few transposes as possible.

    By what reads the value:
    1. A product with 1, the scale that insert made, goes away, and its users read the transpose.
    2. A transpose by perm goes away.
    3. A Gather of matrices reads the transpose, and what it picks is transposed instead.
    4. Everything else reads a transpose of the transpose.

    Args:
        graph: The graph, edited in place.
        value: What is read now.
        transposed: What is read then: the value, transposed by perm.
        perm: The permutation.
    """
    for user, slot in list(value.uses()):
        body = user.graph
        assert body is not None
        result = user.outputs[0]
        if user.op_type == "Mul" and _is_one(user.inputs[1 - slot]):
            factor = user.inputs[1 - slot]
            reread(graph, result, transposed, perm)
            body.remove(user, safe=True)
            delete_unread(factor)
        elif user.op_type == "Transpose" and tuple(user.attributes["perm"].as_ints()) == perm:
            for reader, reader_slot in list(result.uses()):
                reader.replace_input_with(reader_slot, transposed)
            body.remove(user, safe=True)
        elif slot == 0 and perm[0] == 0 and _picks_matrices(user):
            # a transpose behind it would be fused into the product, and ONNX Runtime 1.31 leaves
            # one of rank 0 unwritten
            user.replace_input_with(0, transposed)
            result.shape = None
            reread(graph, result, result, perm)
        else:
            emitter = OnnxEmitter(graph, user, user.metadata_props.get(MARK, ""), before=True)
            back = emitter.call("Transpose", transposed, perm=list(perm))
            back.type = transposed.type
            user.replace_input_with(slot, back)


def _picks_matrices(node: ir.Node) -> bool:
    """Whether a node selects matrices of a stack, along its first axis."""
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


def _is_one(value: ir.Value | None) -> bool:
    """Whether a value is a constant 1 that a pass added."""
    if value is None or value.const_value is None or MARK not in value.metadata_props:
        return False
    return value.const_value.size == 1 and float(value.const_value.numpy().reshape(())) == 1.0
