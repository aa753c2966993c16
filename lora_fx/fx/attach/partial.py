"""Targets of a model that cannot be captured whole: the partial graphs that dynamo sees.

torch.compile runs the model once on the example inputs and hands every stretch between two
breaks to a backend, with the live parameters among its inputs. Each stretch is captured like a
model of its own whose parameters have the model's names, so find reads it like any other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.root_module import OverTree
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.dynamo import compiling_afresh
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.ir.graph import Analysed, OtherReader, Parameter, Site


class PartialGraphs(Analysed):
    """The sites of several graphs of one model, as find reads them.

    Attributes:
        root: The model.
        graphs: The stretches that dynamo saw.
        failed: Why others of them could not be read.
    """

    def __init__(self, root: nn.Module, graphs: Sequence[FxGraph], failed: Sequence[str]) -> None:
        super().__init__()
        self.root = root
        self.graphs = tuple(graphs)
        self.failed = tuple(failed)

    def sites(self) -> Sequence[Site]:
        """Every use, in the order in which the stretches ran; none knows its module."""
        sites = []
        for i, graph in enumerate(self.graphs):
            for site in graph.sites():
                sites.append(replace(site, id=f"{i}/{site.id}", scope="", module_class=""))
        return sites

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the model."""
        return FxGraph(fx.Graph(), self.root).parameters()

    def other_readers(self) -> list[OtherReader]:
        """Readers of parameters other than their sites, in any of the stretches."""
        readers: list[OtherReader] = []
        for graph in self.graphs:
            readers += graph.other_readers()
        return readers

    def gathered_flops(self) -> dict[str, int]:
        """Implement `Graph.gathered_flops`."""
        flops: dict[str, int] = {}
        for graph in self.graphs:
            for name, count in graph.gathered_flops().items():
                flops[name] = flops.get(name, 0) + count
        return flops

    def data_flops(self) -> int:
        """FLOPs of the products of activations in all stretches."""
        return sum(g.data_flops() for g in self.graphs)


class _Stretch(OverTree):
    """One partial graph as a module with the model's parameters; takes the other inputs."""

    def __init__(self, model: nn.Module, code: fx.GraphModule, names: Sequence[str | None]) -> None:
        super().__init__(model)
        self.code: Callable[..., object] = code.forward  # no child: its names are not the model's
        self.names = list(names)

    def forward(self, *data: object) -> Any:
        inputs = iter(data)
        arguments = [
            next(inputs) if name is None else parameter_of(self, name) for name in self.names
        ]
        return self.code(*arguments)


def partial_graphs(model: nn.Module, call: Callable[[], object]) -> PartialGraphs:
    """Run `call` (the model on its example inputs) once through dynamo, and read its graphs.

    Args:
        model: The model, in the mode to look at; its parameters are recognised by identity.
        call: A function that calls the model.

    Raises:
        Exception: What the model itself raises on these inputs.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stretches: list[tuple[fx.GraphModule, tuple[object, ...]]] = []

    def backend(code: fx.GraphModule, _fakes: object) -> Callable[..., object]:
        def run(*inputs: object) -> Any:
            # dynamo may run a stretch again; one look at its inputs is enough
            if all(code is not seen_code for seen_code, _ in stretches):
                stretches.append((code, inputs))
            return code.forward(*inputs)

        return run

    with compiling_afresh(), quiet(), torch.no_grad():
        torch.compile(call, backend=backend, dynamic=False)()

    graphs: list[FxGraph] = []
    failures: list[str] = []
    for i, (code, inputs) in enumerate(stretches):
        input_names = [names.get(id(operand)) for operand in inputs]
        if not any(input_names):
            continue
        try:
            graphs.append(_graph_of(model, code, inputs, input_names))
        except (LoraFxError, RuntimeError, AssertionError) as e:
            failures.append(f"partial graph {i} cannot be read: {one_line(e, 120)}")
    return PartialGraphs(model, graphs, failures)


def _graph_of(
    model: nn.Module,
    code: fx.GraphModule,
    inputs: Sequence[object],
    names: Sequence[str | None],
) -> FxGraph:
    """The graph of one stretch; `names` are the names of the inputs that are parameters."""
    data = [operand for operand, name in zip(inputs, names, strict=True) if name is None]
    captured = Captured(_Stretch(model, code, names), tuple(data))
    return FxGraph(captured.traced(False, captured.named).graph, model)
