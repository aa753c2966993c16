"""A captured module's eval program through torch's ONNX exporter, as an onnx_ir model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import leaf_names, symbols_of
from lora_fx.fx.capture.trace import export_program
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.lowering.graph_program import program_of
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_export.flat_graph import flat_program
from lora_fx.fx.onnx_export.portable import make_portable
from lora_fx.fx.onnx_export.translation import OPSET, translated
from lora_fx.fx.tensor_names import named_tensors
from lora_fx.fx.tensors import from_numpy, has_values, to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.onnx.names import give_own_names, mark_data
from lora_fx.targets.target import Target


def to_onnx(
    module: CapturedModule,
    opset: int = OPSET,
    apart: Mapping[str, Target] | None = None,
    *,
    repeat: bool = True,
) -> Any:
    """The eval program of a module without branches as an onnx_ir.Model, by the model's own names.

    Args:
        module: A module in eval mode.
        opset: The opset of the file.
        apart: Weights that get an initialiser of their own, by its name: what the target's uses
            read, which the exporter would compute from, join, or store once for several uses.
        repeat: Do once what is the same for many nodes; the long way gives the same file.

    Raises:
        LoraFxError: The exporter cannot translate an op; its own words are in the message.
    """
    import onnx_ir as ir

    captured = execution_of(module).captured
    graph = module.graph(False, portable=True)
    captured.allows(False)
    if drawn := random_ops(graph.graph):
        raise LoraFxError(
            f"the model draws random numbers in eval mode, ONNX Runtime others: {', '.join(drawn)}",
            "let forward take the numbers as an input",
        )
    weights = {name: _lifted(graph, t) for name, t in (apart or {}).items()}
    make_portable(graph.graph)
    traced = captured.traced(False, captured.named, execution_of(module).base_dtype)
    flat, names, outputs = flat_program(module, graph.graph, traced, all_outputs=False)
    free = traced.door.free(captured.requested)
    tensors = _representative(module, free)
    dims = (*({d: Dim.AUTO for d in s} or None for s in free.values()), *(None for _ in weights))
    own = {n for n, _ in captured.model.named_parameters(remove_duplicate=False)}
    if execution_of(module).base_dtype is torch.bfloat16:
        own |= set(getattr(module, "unrounded", ()))  # which are still to become float32

    def program() -> ExportedProgram:
        given = (*tensors, *weights.values())
        known = program_of(flat, given, dims) if repeat else None
        return known or export_program(flat, given, dims)

    model = translated(program, [*names, *weights], outputs, own, opset, repeat=repeat)
    mark_data(model, own)
    owner = model.graph
    for place, weight in zip(owner.inputs[len(names) :], weights.values(), strict=True):
        place.const_value = ir.tensor(to_numpy(weight), name=place.name)
        owner.inputs.remove(place)
        owner.register_initializer(place)
    give_own_names(model, named_tensors(captured.model)[0], symbols_of(free))
    return model


def _representative(module: CapturedModule, free: Mapping[str, Collection[int]]) -> list[Tensor]:
    """The tensors whose sizes a program is traced again with: the example's, where they will do.

    The capture knows what is true at those sizes. At smaller ones an inner size, a length after
    strides, may be 1: torch then takes it for one that is repeated, and writes shapes into the file
    that no other length has.
    """
    example = execution_of(module).in_own_dtype()
    tensors = [x for x in tree_leaves(example) if isinstance(x, Tensor)]
    sizes = dict(zip(leaf_names(example), tree_leaves(example), strict=True))
    single = any(sizes[name].shape[d] == 1 for name, dims in free.items() for d in dims)
    if single or not all(map(has_values, tensors)):
        return [x for x in tree_leaves(execution_of(module).sample()) if isinstance(x, Tensor)]
    return tensors


def _lifted(graph: FxGraph, target: Target) -> Tensor:
    """Let the uses of a weight read an input in its place; returns its value."""
    # a copy: an export takes one tensor for one value, wherever it meets it
    weight = from_numpy(graph.read(target.parameter.name).copy())
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(places[-1]):
        place = graph.graph.placeholder(f"weight_{len(places)}")
    for site in target.sites:
        graph.rebase(site, place)
    return weight
