"""A graph of tensors as a program: the signature that names its state, inputs and outputs."""

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


def _sign(program: ExportedProgram) -> None:
    """Let the signature name the outputs as they are."""
    signature, (ends,) = program.graph_signature, program.graph.output_node().args
    signature.output_specs = [
        replace(s, arg=TensorArgument(n.name)) if isinstance(s.arg, TensorArgument) else s
        for s, n in zip(signature.output_specs, ends, strict=True)
    ]


def signed(
    graph: fx.Graph, inputs: Sequence[fx.Node], state: Mapping[str, torch.Tensor]
) -> ExportedProgram:
    """A graph of tensors as a program; the placeholders of its state stand before the inputs."""
    outputs: Any = graph.output_node().args[0]
    kinds = {True: InputKind.PARAMETER, False: InputKind.BUFFER}
    places = zip(graph.find_nodes(op="placeholder"), state.items(), strict=False)
    owned = [
        InputSpec(kinds[isinstance(t, nn.Parameter)], TensorArgument(p.name), name, True)
        for p, (name, t) in places
    ]
    given = [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in inputs]
    ends = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]
    spec = tree_structure((tuple(range(len(inputs))), {}))
    call = ModuleCallSignature([], [], spec, tree_structure(tuple(range(len(outputs)))))
    return ExportedProgram(
        nn.Module(),
        graph,
        ExportGraphSignature([*owned, *given], ends),
        dict(state),
        {},
        [ModuleCallEntry("", call)],
    )
