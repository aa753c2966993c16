"""Graphs run node by node: in fp64, with their weights moved, with the choices of another run.

A choice is a tensor of integers or booleans that an op computes from floats: the indices of topk,
argmax or nms, a comparison, a cast. Rounding alone turns it among near-equal scores.
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.compare import Choice, grow
from lora_fx.dtypes import Array
from lora_fx.fx.capture.call import copied, leaves_of
from lora_fx.fx.capture.onnx_names import output_name
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.graph.rounding import Wide, nearby
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.passes.proofs.reference import SEEDS, Choices, Run, Shown


def move(model: CapturedModule, other: CapturedModule, seed: int) -> None:
    """Make another the model with its weights moved by up to a unit of their last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, moved in zip(model.parameters(), other.parameters(), strict=True):
            moved.copy_(nearby(parameter, generator))


class Choosing(Wide):
    """A model's eval graph that records its choices, or repeats the choices of another run.

    Args:
        model: The model.
        imposed: The choices to make, by name; it makes its own of those that are not there.
        wide: Whether it runs in fp64.

    Attributes:
        values: The choices, by name.
        own: The choices that it would have made, where others were imposed.
        among: Choice → the names of the floats that it was made among.
        floats: The floats that choices are made among, by name.
    """

    def __init__(
        self, model: CapturedModule, imposed: Named | None = None, *, wide: bool = False
    ) -> None:
        graph = model.graph(False).graph
        super().__init__(model, graph=graph)
        captured = execution_of(model).captured
        self.out_spec = captured.traced(
            False, captured.named, execution_of(model).base_dtype
        ).out_spec
        self.model = model
        self.imposed = imposed or {}
        self.wide = wide
        self.names = self._names(graph)
        self.values: dict[str, Array] = {}
        self.own: dict[str, Array] = {}
        self.floats: dict[str, Array] = {}
        self.among: dict[str, tuple[str, ...]] = {}
        self.read_by_choices: set[fx.Node] = set()
        for node in graph.nodes:
            among = _chosen_among(node)
            if among:
                self.among[self.names[node]] = tuple(self.names[score] for score in among)
                self.read_by_choices.update(among)

    def _names(self, graph: fx.Graph) -> dict[fx.Node, str]:
        """The names of values as in an exported file; an output value has the output's name."""
        (leaves,) = graph.output_node().args
        results = tree_unflatten(list(leaves), self.out_spec)  # type: ignore[arg-type]
        names = {node: node.name for node in graph.nodes}
        for path, leaf in leaves_of({"": results}):
            if isinstance(leaf, fx.Node):
                names[leaf] = output_name(path)
        return names

    def outputs(self, named: Named) -> dict[str, Array]:
        """The outputs of a run, and the floats that choices are made among."""
        leaves = [self.read(leaf) for leaf in tree_leaves(copied(named))]
        with torch.no_grad(), alike(self.model):
            results = self.run(*leaves, enable_io_processing=False)
        return {**self.floats, **by_output(tree_unflatten(list(results), self.out_spec))}

    def others(self, choices: Mapping[str, Choice]) -> dict[str, Array]:
        """The choices that it would have made, but for imposed ones that rounding turned."""
        unlike: dict[str, Array] = {}
        for name, value in self.own.items():
            if name not in choices:
                continue
            choice = Choice(value, {score: self.floats[score] for score in self.among[name]})
            if math.isinf(choice.apart(choices[name])):
                unlike[name] = value
        return unlike

    def read(self, x: Any) -> Any:
        """Implement `Wide.read`."""
        return super().read(x) if self.wide else x

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node, or the choice that was made in its place."""
        result = super().run_node(n)
        name = self.names[n]
        if n in self.read_by_choices:
            self.floats[name] = to_numpy(result)
        if name not in self.among:
            return result
        self.own[name] = to_numpy(result)
        if name in self.imposed:
            result = from_numpy(self.imposed[name]).to(result.device, result.dtype)
        self.values[name] = to_numpy(result)
        return result


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _chosen_among(node: fx.Node) -> list[fx.Node]:
    """The computed floats that a choice is made among; none where a node is no choice."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        return []
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node):
        return []
    computed = [node for node in source.all_input_nodes if node.op == "call_function"]
    return [node for node in computed if _is_float(node)]


def choices_of(model: CapturedModule, named: Named) -> Choices:
    """The choices of a model on arguments, and its outputs."""
    run = Choosing(model)
    outputs = run.outputs(named)
    values = run.values

    def own(shown: Shown) -> Iterator[Mapping[str, float]]:
        """In fp64, and with the weights moved, where the choices stay."""
        largest_errors: dict[str, float] = {}
        exact = Choosing(model, values, wide=True).outputs(named)
        yield grow(largest_errors, shown(outputs), shown(exact))
        moved = copy.deepcopy(model).eval()
        for seed in SEEDS:
            move(model, moved, seed)
            moved_outputs = Choosing(moved, values).outputs(named)
            yield grow(largest_errors, shown(moved_outputs), shown(outputs))

    return Choices(values, run.among, outputs, own)


@dataclass(frozen=True)
class ModuleRerun:
    """The Rerun of a captured module.

    Attributes:
        module: The module.
        named: Makes its arguments of arrays by input name.
        same: Whether its ops are the reference's, which make choices in one way.
        block: What it runs in.
    """

    module: CapturedModule
    named: Callable[[Named], Named]
    same: bool = True
    block: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def stepped(self) -> Iterator[Run]:
        """None: torch's sigmoid is exact relative to its result."""
        return iter(())

    def plain(self) -> Run | None:
        """None: torch rewrites nothing."""
        return None

    def choosing(self, choices: Choices) -> Run | None:
        """Implement `Rerun.choosing`."""

        def run(feeds: Named) -> dict[str, Array]:
            with self.block():
                chooser = Choosing(self.module, choices.values)
                outputs = chooser.outputs(self.named(feeds))
            if self.same:
                return outputs
            return {**outputs, **chooser.others(choices.named())}

        return run
