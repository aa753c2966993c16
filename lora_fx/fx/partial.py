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
from lora_fx.fx.capture import Captured
from lora_fx.fx.export import _quiet
from lora_fx.fx.graph import FxGraph
from lora_fx.fx.tensors import owner
from lora_fx.ir.emitter import Parameter
from lora_fx.ir.graph import Site


class PartialGraphs:
    """The sites of several graphs of one model, as find reads them.

    Attributes:
        root: The model.
        count: Stretches that dynamo saw.
        failed: Why some of them could not be read.
    """

    def __init__(self, root: nn.Module, graphs: Sequence[FxGraph], failed: Sequence[str]) -> None:
        self.root = root
        self.graphs = tuple(graphs)
        self.failed = tuple(failed)
        self.count = len(graphs) + len(failed)

    def sites(self) -> Sequence[Site]:
        """Every use, in the order in which the stretches ran; none knows its module."""
        return [
            replace(site, id=f"{i}/{site.id}", scope="", module_class="")
            for i, graph in enumerate(self.graphs)
            for site in graph.sites()
        ]

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the model."""
        return FxGraph(fx.Graph(), self.root).parameters()

    def data_flops(self) -> int:
        """FLOPs between activations in all stretches."""
        return sum(g.data_flops() for g in self.graphs)


class _Stretch(nn.Module):
    """One partial graph as a module with the model's parameters; takes the other inputs."""

    def __init__(
        self, model: nn.Module, code: fx.GraphModule, names: Sequence[str | None], training: bool
    ) -> None:
        super().__init__()
        for part in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[part] = getattr(model, part)
        self.code: Callable[..., Any] = code.forward  # no child: its names are not the model's
        self.names = list(names)
        self.training = training

    def forward(self, *data: Any) -> Any:
        rest = iter(data)
        tensors = []
        for name in self.names:
            if name is None:
                tensors.append(next(rest))
            else:
                module, leaf = owner(self, name)
                tensors.append(module._parameters[leaf])
        return self.code(*tensors)


def partial_graphs(model: nn.Module, call: Callable[[], Any]) -> PartialGraphs:
    """Run `call` (the model on its example inputs) once through dynamo and read what it saw.

    Args:
        model: In the mode to look at; its parameters are recognised by identity.
        call: Calls the model.

    Raises:
        Exception: What the model itself raises on these inputs.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    stretches: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(code: fx.GraphModule, fakes: Any) -> Callable[..., Any]:
        once = [True]

        def run(*inputs: Any) -> Any:
            if once:
                once.clear()
                stretches.append((code, inputs))
            return code.forward(*inputs)

        return run

    from torch import _dynamo  # private, and slow to import

    _dynamo.reset()  # what was compiled before would not be shown to this backend
    try:
        with _quiet(), torch.no_grad(), _dynamo.config.patch(allow_rnn=True):
            torch.compile(call, backend=backend, dynamic=False)()
    finally:
        _dynamo.reset()
    graphs, failed = [], []
    for i, (code, inputs) in enumerate(stretches):
        kept = [names.get(id(x)) for x in inputs]
        if not any(kept):
            continue
        try:
            graphs.append(_read(model, code, inputs, kept))
        except (LoraFxError, RuntimeError, AssertionError) as e:
            failed.append(f"partial graph {i} cannot be read: {one_line(e, 120)}")
    return PartialGraphs(model, graphs, failed)


def _read(
    model: nn.Module, code: fx.GraphModule, inputs: Sequence[Any], names: Sequence[str | None]
) -> FxGraph:
    stretch = _Stretch(model, code, names, model.training)
    data = tuple(x for x, n in zip(inputs, names, strict=True) if n is None)
    captured = Captured(stretch, data)
    traced = captured.traced(False, captured.named)
    return FxGraph(traced.graph, model)
