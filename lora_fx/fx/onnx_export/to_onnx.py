"""The export of a captured module's eval program to an onnx_ir model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.onnx_names import symbols_of
from lora_fx.fx.capture.trace import export_program
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops
from lora_fx.fx.lowering.graph_program import program_of
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_export.flat_graph import flat_program
from lora_fx.fx.onnx_export.portable import make_portable
from lora_fx.fx.onnx_export.translation import OPSET, translated
from lora_fx.fx.tensors import from_numpy, has_values, to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.onnx.constant_folding import mark_data
from lora_fx.onnx.names import give_own_names
from lora_fx.progress import stage
from lora_fx.targets.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir


def to_onnx(
    module: CapturedModule,
    opset: int = OPSET,
    apart: Mapping[str, Target] | None = None,
    *,
    whole: Collection[str] = (),
    repeat: bool = True,
) -> Any:
    """Export a module without branches to an onnx_ir.Model, with the model's own names.

    Args:
        module: A module in eval mode.
        opset: The opset of the file.
        apart: Weights that get an initialiser of their own, by its name: what the target's uses
            read, which the exporter would compute from, join, or store once for several uses.
        whole: First names of parameters that a run, a session or a row may replace: the file has
            each as it lies in the model, and nothing is computed of it beforehand.
        repeat: Do once what is the same for many nodes; the long way gives the same file.

    Raises:
        LoraFxError: The exporter cannot translate an op; its own words are in the message.
    """
    execution = execution_of(module)
    captured = execution.captured
    graph = module.graph(False, portable=True)
    captured.allows(False)
    _refuse_random_ops(graph)

    weights = {name: _lifted(graph, target) for name, target in (apart or {}).items()}
    weights |= {name: _lifted_parameter(graph, name) for name in whole}
    with stage("preparing the graph for ONNX"):
        make_portable(graph.graph)
        traced = captured.traced(False, captured.named, execution.base_dtype)
        flat, names, outputs = flat_program(module, graph.graph, traced, all_outputs=False)

    free = traced.door.free(captured.requested)
    examples = [*_representative(module, free), *weights.values()]
    free_axes = [dict.fromkeys(axes, Dim.AUTO) or None for axes in free.values()]
    free_axes += [None] * len(weights)

    def program() -> ExportedProgram:
        if repeat:
            without_a_run = program_of(flat, examples, free_axes)
            if without_a_run is not None:
                return without_a_run
        return export_program(flat, tuple(examples), tuple(free_axes))

    unchanged_names = {name for name, _ in captured.model.named_parameters(remove_duplicate=False)}
    if execution.base_dtype is torch.bfloat16:
        # the weights which are still to become float32
        unchanged_names |= set(getattr(module, "unrounded", ()))
    model = translated(program, [*names, *weights], outputs, unchanged_names, opset, repeat=repeat)

    mark_data(model, unchanged_names)
    _store_lifted(model, weights)
    give_own_names(model, named_tensors(captured.model)[0], symbols_of(free))
    return model


def _refuse_random_ops(graph: FxGraph) -> None:
    drawing = random_ops(graph.graph)
    if drawing:
        raise LoraFxError(
            "the model draws random numbers in eval mode, and ONNX Runtime would draw others: "
            f"{', '.join(drawing)}",
            "let forward take the numbers as an input",
        )


def _representative(module: CapturedModule, free: Mapping[str, Collection[int]]) -> list[Tensor]:
    """Return tensors of the sizes at which a program is traced again: the example's if possible.

    The capture knows what is true at those sizes. At smaller ones an inner size, a length after
    strides, may be 1: torch then takes it for one that is repeated, and writes shapes into the file
    that no other length has.
    """
    execution = execution_of(module)
    example = execution.in_own_dtype()
    leaves = tree_leaves(example)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    leaf_of = dict(zip(leaf_names(example), leaves, strict=True))
    if _has_free_size_of_one(leaf_of, free) or not all(map(has_values, tensors)):
        sample = tree_leaves(execution.sample())
        return [leaf for leaf in sample if isinstance(leaf, Tensor)]
    return tensors


def _has_free_size_of_one(leaf_of: Mapping[str, Any], free: Mapping[str, Collection[int]]) -> bool:
    sizes: list[int] = []
    for name, axes in free.items():
        sizes += [leaf_of[name].shape[axis] for axis in axes]
    return any(size == 1 for size in sizes)


def _lifted(graph: FxGraph, target: Target) -> Tensor:
    """Make the uses of a weight read a new input; return the weight's value."""
    value = _value_apart(graph, target.parameter.name)
    weight_input = _new_input(graph)
    for site in target.sites:
        graph.rebase(site, weight_input)
    return value


def _lifted_parameter(graph: FxGraph, name: str) -> Tensor:
    """Make everything that reads a parameter read a new input; return the parameter's value.

    Raises:
        LoraFxError: Nothing in the graph reads it.
    """
    readers = graph.nodes_of(name)
    if not readers:
        raise LoraFxError(
            f"{name!r}: an adapter replaces this tensor, which no output depends on",
            f"run lora-fx convert ADAPTER -o OUT --exclude {name} to leave it out",
        )
    whole_input = _new_input(graph)
    for node in readers:
        whole_input.meta.setdefault("val", node.meta.get("val"))
        node.replace_all_uses_with(whole_input)
        graph.graph.erase_node(node)
    graph.changed()
    return _value_apart(graph, name)


def _new_input(graph: FxGraph) -> fx.Node:
    """Add an input behind all others."""
    inputs = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(inputs[-1]):
        return graph.graph.placeholder(f"weight_{len(inputs)}")


def _value_apart(graph: FxGraph, name: str) -> Tensor:
    """Return a copy of a parameter: an export takes one tensor for one value, wherever it is."""
    return from_numpy(graph.read(name).copy())


def _store_lifted(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Turn the last inputs, which are lifted weights, into initialisers."""
    import onnx_ir as ir

    graph = model.graph
    first = len(graph.inputs) - len(weights)
    for weight_input, weight in zip(graph.inputs[first:], weights.values(), strict=True):
        weight_input.const_value = ir.tensor(to_numpy(weight), name=weight_input.name)
        graph.inputs.remove(weight_input)
        graph.register_initializer(weight_input)
