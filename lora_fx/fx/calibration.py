"""A captured model that records the inputs of its targets and the gradients that reach them.

The captured graph runs node by node (torch.fx.Interpreter). A watched use reads a leaf in place
of its weight, through a copy of the weight's own chain of views, and zeros that require grad are
added to what it makes. So torch.autograd.grad of the loss gives ∂L/∂W and dy = ∂L/∂y exactly, and
only for the uses that are meant. Nothing is hooked, and the model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import program_key
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.door import Door
from lora_fx.fx.graph.graph import FxGraph, replaced
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.site_rows import SiteRows, readable, rows_of
from lora_fx.fx.trees import TreeSpec, tree_leaves, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.ir import kinds
from lora_fx.ir.graph import Site
from lora_fx.text import by_key

Choose = Callable[[FxGraph], Sequence[tuple[Site, tuple[str, ...]]]]
"""The uses of a graph to watch, with the keys of the updates that reach them."""


Saw = Callable[[Site, tuple[str, ...], SiteRows | None], None]
"""Gets the rows of x when a use runs: an op further on may write over x."""


@dataclass(frozen=True)
class Tap:
    """One watched use in one program: its node, its chain of views, and where its result is."""

    site: Site
    keys: tuple[str, ...]
    node: fx.Node
    chain: tuple[fx.Node, ...]
    output: tuple[fx.Node, ...]
    activation: fx.Node | None


@dataclass
class Run:
    """The leaves and zeros of one call.

    Attributes:
        leaves: (keys, root of the weight) → the leaf, in the stored shape.
        zeros: The uses whose dy can be had, each with the leaf at its result.
    """

    leaves: dict[tuple[tuple[str, ...], str], Tensor] = field(default_factory=dict)
    zeros: list[WatchedResult] = field(default_factory=list)


@dataclass(frozen=True)
class WatchedResult:
    """The result of a use: zeros that were added to it, and the facts about its rows."""

    tap: Tap
    zeros: Tensor
    shape: tuple[int, ...]
    ends: Tensor | None

    def rows(self, dy: Tensor) -> SiteRows | None:
        """The rows of dy = ∂L/∂zeros."""
        return rows_of(self.tap.site, dy, self.ends, self.shape)


class Watched(CapturedModule):
    """The model with taps; `last` holds the records of the last call.

    Args:
        captured: The model.
        choose: The uses to watch.
        saw: Called as each of them runs.
        weights: Whether leaves stand for the weights.
        results: Whether zeros are added to the results.
    """

    def __init__(
        self, captured: Captured, choose: Choose, saw: Saw, *, weights: bool, results: bool
    ) -> None:
        super().__init__(captured, blocks=False)
        self.last = Run()
        self._choose = choose
        self._saw = saw
        self._weights = weights
        self._results = results
        self._watching: dict[object, tuple[fx.Graph, tuple[Tap, ...], Door, TreeSpec]] = {}
        try:
            captured.allows(False)
        except LoraFxError:
            self.train()  # a file with a train program only

    def _run(self, args: Sequence[Any], kwargs: Named) -> Any:
        named = self._programs.captured.signature.bind(args, kwargs)
        leaves = tree_leaves(named)
        key = program_key(named, leaves)
        if key not in self._watching:
            self._watching[key] = self._watch(named)
        graph, taps, door, spec = self._watching[key]
        door.check(leaves)
        self.last = Run()
        run = _Interpreter(self, graph, taps)
        with torch.set_grad_enabled(self._weights or self._results):
            out = run.run(*leaves, enable_io_processing=False)
        return tree_unflatten(list(out), spec)

    def _watch(self, named: Named) -> tuple[fx.Graph, tuple[Tap, ...], Door, TreeSpec]:
        traced = self._programs.captured.traced(self.training, named, self._dtype)
        graph = self._graph(self.training, named)
        taps = []
        for site, keys in self._choose(graph):
            node, chain = graph.places(site)
            output: tuple[fx.Node, ...] = ()
            activation = None
            if readable(site):
                output = (graph.output(site),)
                activation = graph.activation(site)
            taps.append(Tap(site, keys, node, chain, output, activation))
        return graph.graph, tuple(taps), traced.door, traced.out_spec


class _Interpreter(fx.Interpreter):
    """Runs a graph with taps."""

    def __init__(self, root: Watched, graph: fx.Graph, taps: Sequence[Tap]) -> None:
        super().__init__(root, graph=graph)
        self.last = root.last
        self.saw = root._saw
        self.taps_at = by_key((tap.node, tap) for tap in taps)
        self.taps_along: dict[fx.Node, list[Tap]] = {}
        self.taps_after: dict[fx.Node, list[Tap]] = {}
        for tap in taps:
            if root._weights:
                for node in tap.chain:
                    self.taps_along.setdefault(node, []).append(tap)
            if root._results:
                for node in tap.output:
                    self.taps_after.setdefault(node, []).append(tap)
        self.leaves: dict[tuple[tuple[str, ...], str], dict[fx.Node, Any]] = {}
        self.shapes: dict[Tap, tuple[tuple[int, ...], Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run the node; on the path of a watched weight, run it on the weight's leaf too."""
        for tap in self.taps_at.get(n, ()):
            if tap.activation is not None:
                self._show_activation(n, tap, tap.activation)
        value = self._call(n, {}) if self.taps_along and n in self.taps_at else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()  # the model's own need no gradient
        for tap in self.taps_along.get(n, ()):
            self._run_leaf(n, tap, value)
        for tap in self.taps_after.get(n, ()):
            zeros = torch.zeros_like(value, requires_grad=True)
            self.last.zeros.append(WatchedResult(tap, zeros, *self.shapes[tap]))
            value = value + zeros
        return value

    def _show_activation(self, n: fx.Node, tap: Tap, activation: fx.Node) -> None:
        """Hand over the rows of x before a use runs."""
        x = self.env[activation]
        ends: Any = None
        if isinstance(tap.site.kind, kinds.Grouped):
            ends = map_arg(n.args[2], lambda m: self.env[m])
        self.shapes[tap] = tuple(x.shape), ends
        self.saw(tap.site, tap.keys, rows_of(tap.site, x.detach(), ends))

    def _run_leaf(self, n: fx.Node, tap: Tap, value: Any) -> None:
        """Run a node of a weight's chain on the leaf that replaces the weight."""
        root = tap.chain[0]
        name = (tap.keys, root.name)
        leaf_values = self.leaves.setdefault(name, {})
        if n in leaf_values:
            return
        if n is root:
            leaf = value.detach().requires_grad_()
            self.last.leaves[name] = leaf
            leaf_values[n] = leaf
        else:
            leaf_values[n] = self._call(n, leaf_values)

    def _call(self, n: fx.Node, replacements: Mapping[fx.Node, Any]) -> Any:
        """The node with other values for some of its inputs, and leaves for watched weights."""
        args, kwargs = map_arg((n.args, n.kwargs), lambda m: replacements.get(m, self.env.get(m)))
        for tap in self.taps_at.get(n, ()):
            weight = self.leaves[tap.keys, tap.chain[0].name][tap.chain[-1]]
            args = replaced(args, tap.site.slot, weight)
        return getattr(self, n.op)(n.target, args, kwargs)
