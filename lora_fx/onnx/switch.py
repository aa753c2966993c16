"""The factors of a switchable graph, in the place of what insert made.

They are inputs with defaults, or initialisers of a fixed rank.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.base import slot_names
from lora_fx.errors import LoraFxError
from lora_fx.ir.kinds import swap_last
from lora_fx.onnx.graph.flow import MARK
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph, add_initialiser
from lora_fx.onnx.manifest import SwitchSlot
from lora_fx.targets.target import Target


def settle(graph: OnnxGraph, target: Target, rank: int, symbol: str) -> SwitchSlot:
    """Put A and B, as they are read, in the place of what insert made.

    Args:
        graph: A graph that has the branches of the target.
        target: The target.
        rank: The rank of the default, which is zeros.
        symbol: The name of the rank as a dynamic dimension of inputs; empty where A and B are
            initialisers and no inputs.
    """
    layout = target.layout
    batch = layout.batch_shape
    names = (f"{target.key}.lora_A", f"{target.key}.lora_B")
    free: int | str = symbol or rank
    shapes = ((*batch, layout.in_size, free), (*batch, free, layout.out_size))
    owner = graph.model.graph
    for old, name, shape in zip(slot_names(target.key), names, shapes, strict=True):
        if name in owner.initializers or any(v.name == name for v in owner.inputs):
            raise LoraFxError(f"the graph has a tensor {name!r} already", f"--exclude {target.key}")
        was = owner.initializers[old]
        zeros = np.zeros([n if isinstance(n, int) else rank for n in shape], np.float32)
        new = add_initialiser(owner, name, zeros, was.metadata_props[MARK])
        new.shape = ir.Shape(shape)
        reread(graph, was, new, swap_last(len(batch)))
        del owner.initializers[old]
        if symbol:
            owner.inputs.remove(was)
            owner.inputs.append(new)
    stored = tuple(target.parameter.shape)
    return SwitchSlot(
        *names, layout.in_size, layout.out_size, batch, stored, target.op, target.role, rank
    )


def reread(graph: OnnxGraph, was: ir.Value, new: ir.Value, perm: tuple[int, ...]) -> None:
    """Let users of `was` read `new`, its transpose, with as few transposes as there can be."""
    made = graph.model.graph.initializers
    for user, i in list(was.uses()):
        body = user.graph
        assert body is not None
        if user.op_type == "Mul" and _is_one(one := user.inputs[1 - i]):
            reread(graph, user.outputs[0], new, perm)
            body.remove(user, safe=True)
            if one is not None and not one.uses() and one.name in made:
                del made[str(one.name)]
        elif user.op_type == "Transpose" and tuple(user.attributes["perm"].as_ints()) == perm:
            for reader, j in list(user.outputs[0].uses()):
                reader.replace_input_with(j, new)
            body.remove(user, safe=True)
        elif user.op_type == "Gather" and i == perm[0] == user.attributes.get_int("axis", 0) == 0:
            # matrices that data picks: a transpose behind it would be fused into the product, and
            # ONNX Runtime 1.31 leaves one of rank 0 unwritten
            user.replace_input_with(0, new)
            user.outputs[0].shape = None
            reread(graph, user.outputs[0], user.outputs[0], perm)
        else:
            e = OnnxEmitter(graph, user, user.metadata_props.get(MARK, ""), before=True)
            turned = e.call("Transpose", new, perm=list(perm))
            turned.type = new.type
            user.replace_input_with(i, turned)


def _is_one(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or MARK not in value.metadata_props:
        return False
    return value.const_value.size == 1 and float(value.const_value.numpy().reshape(())) == 1.0
