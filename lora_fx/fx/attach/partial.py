"""Targets of a model that cannot be captured whole: the partial graphs that dynamo sees.

torch.compile runs the model once on the example inputs and hands every stretch between two
breaks to a backend, with the live parameters among its inputs. Each stretch is captured like a
model of its own whose parameters have the model's names, so find reads it like any other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.capture.call import Signature
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.root_module import OverTree
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.dynamo import compiling_afresh
from lora_fx.fx.graph.elementwise_chains import VIEWS
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.fx.tensors import parameter_of
from lora_fx.ir.einsum import Einsum
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
        return [
            replace(site, id=f"{i}/{site.id}", scope="", module_class="")
            for i, graph in enumerate(self.graphs)
            for site in graph.sites()
        ]

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the model."""
        return FxGraph(fx.Graph(), self.root).parameters()

    def other_readers(self) -> list[OtherReader]:
        """What reads a parameter beside its sites, in any of the stretches."""
        return [r for g in self.graphs for r in g.other_readers()]

    def gathered_flops(self) -> dict[str, int]:
        """See Graph."""
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
        rest = iter(data)
        return self.code(*(next(rest) if n is None else parameter_of(self, n) for n in self.names))


def partial_graphs(model: nn.Module, call: Callable[[], object]) -> PartialGraphs:
    """Run `call` (the model on its example inputs) once through dynamo and read what it saw.

    Args:
        model: The model, in the mode to look at; its parameters are recognised by identity.
        call: A function that calls the model.

    Raises:
        Exception: What the model itself raises on these inputs.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    stretches: list[tuple[fx.GraphModule, tuple[object, ...]]] = []

    def backend(code: fx.GraphModule, _fakes: object) -> Callable[..., object]:
        def run(*inputs: object) -> Any:
            # dynamo may run a stretch again; one look at its inputs is enough
            if all(code is not known for known, _ in stretches):
                stretches.append((code, inputs))
            return code.forward(*inputs)

        return run

    with compiling_afresh(), quiet(), torch.no_grad():
        torch.compile(call, backend=backend, dynamic=False)()

    graphs, failed = [], []
    for i, (code, inputs) in enumerate(stretches):
        kept = [names.get(id(x)) for x in inputs]
        if not any(kept):
            continue
        try:
            data = tuple(x for x, n in zip(inputs, kept, strict=True) if n is None)
            captured = Captured(_Stretch(model, code, kept), data)
            graphs.append(FxGraph(captured.traced(False, captured.named).graph, model))
        except (LoraFxError, RuntimeError, AssertionError) as e:
            failed.append(f"partial graph {i} cannot be read: {one_line(e, 120)}")
    return PartialGraphs(model, graphs, failed)


# Whether a module's forward is just one op on its weight, read from the captured graph.
#
# A branch beside the module, y + B(A x)·s, is the branch beside the op only where what comes in is
# the op's activation and what goes out is its result. Reshapes of leading axes on the way, as in
# transformers' Conv1D, change nothing for a matmul of the last axis.


def bodies_of(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Module call → the nodes that it made, those of the modules inside too."""
    bodies: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        for call in node.meta.get("nn_module_stack", ()):
            bodies.setdefault(call, set()).add(node)
    return bodies


def one_op(
    site: Site,
    node: fx.Node,
    x: object,
    states: Mapping[fx.Node, object],
    bodies: Mapping[str, set[fx.Node]],
) -> bool:
    """True when the innermost module call that made `node` holds nothing else.

    Args:
        site: The use.
        node: Its op.
        x: The op's activation.
        states: Nodes that depend on parameters only (FxFlow.behind).
        bodies: Those of the graph.
    """
    call = next(reversed(node.meta.get("nn_module_stack", {})), None)
    if call is None or not isinstance(x, fx.Node):
        return False
    body = bodies[call]
    seen = {node}
    first, last = x, node
    while first in body:
        source = first.args[0] if first.target in VIEWS else None
        if not isinstance(source, fx.Node):
            return False
        seen.add(first)
        first = source
    while any(u in body for u in last.users):
        users = list(last.users)
        if len(users) != 1 or users[0].target not in VIEWS:
            return False
        last = users[0]
        seen.add(last)
    more = any(isinstance(value(n), torch.Tensor) for n in body - seen if n not in states)
    return not more and (len(seen) == 1 or _leading(site, first, last))


def _leading(site: Site, first: fx.Node, last: fx.Node) -> bool:
    """True when reshapes left the last axis alone, before and after a matmul of that axis."""
    right = isinstance(site.kind, Einsum) and site.kind.form == "right"
    x, y = shape_of(first), shape_of(last)
    if not right or len(site.operand) != 2 or x is None or y is None:
        return False
    axes = site.kind.axes(site.operand)
    ends = site.operand[axes.in_[0]], site.operand[axes.out[0]]
    same = len(x) == len(y) and all(bool(a == b) for a, b in zip(x[:-1], y[:-1], strict=True))
    return same and (x[-1], y[-1]) == ends


def one_argument(module: nn.Module) -> bool:
    """True when forward takes one tensor and nothing else, by the class and not by an instance."""
    if "forward" in module.__dict__:
        return False
    try:
        signature = Signature(type(module).forward)
    except (TypeError, ValueError):
        return False
    return len(signature.order) == len(signature.positional) == 2  # self and the tensor
