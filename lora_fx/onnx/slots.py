"""The factors of a switchable graph, in the place of what insert made.

They are inputs with defaults, or initialisers of a fixed rank.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.factors import slot_names
from lora_fx.errors import LoraFxError
from lora_fx.ir.kinds import swap_last
from lora_fx.manifest import Slot
from lora_fx.onnx.flow import MARK
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.targets.target import Target


def settle(graph: OnnxGraph, target: Target, rank: int, symbol: str) -> Slot:
    """Put A and B, as they are read, in the place of what insert made.

    Args:
        graph: It has the branches of the target.
        target: The target.
        rank: Of the default, zeros.
        symbol: Name of the rank of an input; empty: A and B are initialisers alone.
    """
    layout = target.layout
    batch = layout.batch_shape
    names = (f"{target.key}.lora_A", f"{target.key}.lora_B")
    sides: tuple[tuple[int, int], ...] = ((layout.in_size, rank), (rank, layout.out_size))
    shapes: tuple[tuple[int | str, ...], ...] = (
        (layout.in_size, symbol or rank),
        (symbol or rank, layout.out_size),
    )
    owner = graph.model.graph
    for old, name, side, shape in zip(slot_names(target.key), names, sides, shapes, strict=True):
        if name in owner.initializers or any(v.name == name for v in owner.inputs):
            raise LoraFxError(f"the graph has a tensor {name!r} already", f"--exclude {target.key}")
        was = owner.initializers[old]
        new = ir.Value(
            name=name,
            const_value=ir.tensor(np.zeros((*batch, *side), np.float32), name=name),
            shape=ir.Shape((*batch, *shape)),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        new.metadata_props[MARK] = was.metadata_props[MARK]
        _reread(graph, was, new, swap_last(len(batch)))
        del owner.initializers[old]
        owner.initializers[name] = new
        if symbol:
            owner.inputs.remove(was)
            owner.inputs.append(new)
    shape_ = tuple(target.parameter.shape)
    return Slot(
        *names, layout.in_size, layout.out_size, batch, shape_, target.op, target.role, rank
    )


def _reread(graph: OnnxGraph, was: ir.Value, new: ir.Value, perm: tuple[int, ...]) -> None:
    """Users of `was` read `new`, its transpose, with as few transposes as there can be."""
    made = graph.model.graph.initializers
    for user, i in list(was.uses()):
        body = user.graph
        assert body is not None
        if user.op_type == "Mul" and _is_one(user.inputs[1 - i]):
            one = user.inputs[1 - i]
            _reread(graph, user.outputs[0], new, perm)
            body.remove(user, safe=True)
            if one is not None and not one.uses() and one.name in made:
                del made[str(one.name)]
        elif user.op_type == "Transpose" and tuple(user.attributes["perm"].as_ints()) == perm:
            for reader, j in list(user.outputs[0].uses()):
                reader.replace_input_with(j, new)
            body.remove(user, safe=True)
        else:
            turned = ir.node("Transpose", (new,), {"perm": list(perm)})
            turned.metadata_props[MARK] = user.metadata_props.get(MARK, "")
            turned.outputs[0].name = graph.fresh(f"{new.name}_transposed")
            turned.outputs[0].type = new.type
            body.insert_before(user, turned)
            user.replace_input_with(i, turned.outputs[0])


def _is_one(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or MARK not in value.metadata_props:
        return False
    return value.const_value.size == 1 and float(value.const_value.numpy().reshape(())) == 1.0
