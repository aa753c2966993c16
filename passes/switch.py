"""switch: every branch of an ONNX graph reads its factors from inputs that have defaults.

    y' = y + (x A) B        A [*batch, in, rank], B [*batch, rank, out], rank a symbol of its own

The branches are those of insert. What is added here is what ONNX Runtime should see: A and B are
stored the way the two products read them, so no transpose and no scale is left at run time, and
the defaults change nothing: rank 0, or one rank of zeros in the weight form W + (A B)ᵀ, which
convolutions take (their branch would need the rank as a number; of rank 0, a runtime's convolution
may read memory that nobody wrote). This pass works on onnx_ir only: inputs with defaults are a
matter of ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.graph import Role
from lora_fx.kinds import Einsum, Embedding, swap_last
from lora_fx.lowrank import LowRank, slot_names
from lora_fx.manifest import PROPERTY, Manifest, Slot
from lora_fx.onnx.flow import MARK
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.target import Target

OLDEST_IR = 4
"""Since this version of the file format an initialiser need not be an input, so one that is has
a meaning: it can be overridden."""


@dataclass(frozen=True)
class Switch:
    """Make the targets of `keys` switchable, and write the manifest into the metadata.

    Attributes:
        keys: Targets of the graph, in its own names.
        made: Receives the manifest.
    """

    keys: Sequence[str]
    made: list[Manifest] = field(default_factory=list, compare=False)

    def __call__(self, graph: OnnxGraph) -> PassResult[ir.Value]:
        """Edit the graph; a graph that has a manifest is left alone.

        Raises:
            LoraFxError: A key that is no target, or a part of a tensor.
        """
        model = graph.model
        if PROPERTY in model.metadata_props:
            return PassResult(graph, False)
        found = find(graph)
        targets = []
        for key in self.keys:
            target = found.get(key)
            if target is None or "[" in target.key:
                raise LoraFxError(f"{key!r} is no target of the exported graph", "--exclude it")
            targets.append(target)
        if not targets:
            raise LoraFxError("no target to switch", "lora-fx targets MODEL lists them")
        for whole in (False, True):
            some = {t.key: _zero(t) for t in targets if _direct(t) is not whole}
            Insert(some, role=Role.OPTIONAL_INPUT, weight_form=whole)(graph)
        slots = {t.key: _settle(graph, t, f"rank_{i}") for i, t in enumerate(targets)}
        model.ir_version = max(model.ir_version, OLDEST_IR)
        manifest = Manifest(slots)
        model.metadata_props[PROPERTY] = manifest.to_text()
        self.made.append(manifest)
        graph.changed()
        graph.lint()
        return PassResult(graph, True)


def _direct(target: Target) -> bool:
    """True where every use has a branch that never needs the rank as a number."""
    return all(
        isinstance(s.kind, Embedding) or (isinstance(s.kind, Einsum) and bool(s.kind.form))
        for s in target.sites
    )


def _zero(target: Target) -> LowRank:
    """One rank of zeros, scale 1."""
    layout = target.layout
    a = np.zeros((*layout.batch_shape, 1, layout.in_size), np.float32)
    b = np.zeros((*layout.batch_shape, layout.out_size, 1), np.float32)
    return LowRank(a, b, 1.0, layout)


def _settle(graph: OnnxGraph, target: Target, symbol: str) -> Slot:
    """Put A and B, as they are read, in the place of what insert made."""
    layout, rank = target.layout, 0 if _direct(target) else 1
    batch = layout.batch_shape
    names = (f"{target.key}.lora_A", f"{target.key}.lora_B")
    sides: tuple[tuple[int, int], ...] = ((layout.in_size, rank), (rank, layout.out_size))
    shapes: tuple[tuple[int | str, ...], ...] = (
        (layout.in_size, symbol),
        (symbol, layout.out_size),
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
        owner.inputs.remove(was)
        del owner.initializers[old]
        owner.initializers[name] = new
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
