"""A graph of tensors as a program, with the signature of its state, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from lora_fx.fx.trees import tree_structure


def name_outputs(program: ExportedProgram) -> None:
    """Rename the outputs in a program's signature as the graph names them."""
    (outputs,) = program.graph.output_node().args
    signature = program.graph_signature
    named = []
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        if isinstance(spec.arg, TensorArgument):
            spec = replace(spec, arg=TensorArgument(node.name))
        named.append(spec)
    signature.output_specs = named


def signed(
    graph: fx.Graph, inputs: Sequence[fx.Node], state: Mapping[str, torch.Tensor]
) -> ExportedProgram:
    """Return a graph as a program; the placeholders of its state come before its inputs."""
    outputs: Any = graph.output_node().args[0]
    state_specs = []
    placeholders = graph.find_nodes(op="placeholder")
    for placeholder, (name, tensor) in zip(placeholders, state.items(), strict=False):
        kind = InputKind.PARAMETER if isinstance(tensor, nn.Parameter) else InputKind.BUFFER
        state_specs.append(InputSpec(kind, TensorArgument(placeholder.name), name, True))
    input_specs = [
        InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs
    ]
    output_specs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs
    ]
    arguments = tree_structure((tuple(range(len(inputs))), {}))
    results = tree_structure(tuple(range(len(outputs))))
    call = ModuleCallSignature([], [], arguments, results)
    return ExportedProgram(
        nn.Module(),
        graph,
        ExportGraphSignature([*state_specs, *input_specs], output_specs),
        dict(state),
        {},
        [ModuleCallEntry("", call)],
    )
