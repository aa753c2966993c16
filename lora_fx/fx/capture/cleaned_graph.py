"""The cleaned graph of a program: leaves in, flat outputs out, over the skeleton's names."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

from lora_fx.conditions import Condition
from lora_fx.fx.capture.block_copies import write_out
from lora_fx.fx.capture.door import Door, Requested
from lora_fx.fx.capture.guards import UNKNOWN, GuardLog
from lora_fx.fx.capture.learnt_sizes import learn
from lora_fx.fx.capture.size_nodes import constants_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import value
from lora_fx.fx.lowering import inline_regions, split_products, without_vmap
from lora_fx.fx.trees import tree_leaves
from lora_fx.text import Json

aten = torch.ops.aten


@dataclass
class Traced:
    """A cleaned graph, whose placeholders are the leaves and whose outputs are flat.

    Attributes:
        graph: The nodes.
        constants: Tensors that the graph reads and that are none of the model's.
        door: The sizes that it takes.
        out_spec: How the flat outputs become what the model returns.
        pinned: Dimensions that were asked to be dynamic and are not.
        doubtful: What a kernel asked of sizes; a run decides whether it matters.
        cuts: Numbers that sizes are compared, cut or divided with.
        bodies: What higher-order ops call, by the name that the graph reads.
        left_out: Outputs that are no tensors, and that no graph makes.
        notes: What else has to be said.
        own_gradients: What may have another gradient than its forward, which a graph has not.
        copies: Calls of blocks that are copies of the nodes of another one.
        modeless: True where nothing asked for a mode, so that the other one's graph is this one.
        analyses: What was computed of it; see lora_fx.ir.graph.Analysed.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    door: Door
    out_spec: Any
    pinned: list[Pinned] = field(default_factory=list)
    doubtful: list[Condition] = field(default_factory=list)
    cuts: tuple[int, ...] = ()
    bodies: dict[str, fx.GraphModule] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    own_gradients: tuple[str, ...] = ()
    copies: int = 0
    modeless: bool = False
    analyses: dict[str, object] = field(default_factory=dict)

    def fx_graph(self, root: nn.Module, training: bool) -> FxGraph:
        """A fresh copy over a tree that holds the tensors; what find saw of one holds for all."""
        graph = FxGraph(
            self.graph, root, training=training, bodies=self.bodies, constants=self.constants
        ).clone()
        graph.read_codes()
        graph.share(self.analyses)
        return graph


def match_places(graph: fx.Graph, leaves: Sequence[object]) -> None:
    """One placeholder for each leaf of the call: constants get one, or lose theirs."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    tensors = [p for p in places if isinstance(p.meta.get("val"), torch.Tensor)]
    for place in places:
        if place not in tensors:
            place.replace_all_uses_with(place.meta.get("val"))
            graph.erase_node(place)
    wanted = iter(tensors)
    at = None
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            at = next(wanted)
            continue
        anchor = next(iter(graph.nodes)) if at is None else at.next
        with graph.inserting_before(anchor):
            at = graph.placeholder(f"constant_{i}")


def clean_module(
    module: fx.GraphModule,
    program: ExportedProgram,
    names: Sequence[str],
    requested: Requested,
    log: GuardLog,
) -> Traced:
    """A program as a flat graph whose placeholders are the leaves.

    Args:
        module: The program's; it may have been edited.
        program: The export, or what a file holds.
        names: The names of the leaves.
        requested: What should be dynamic.
        log: What was learnt while it was made; empty for a file.
    """
    graph = module.graph
    inline_regions(module)
    without_vmap(graph)
    write_out(module)
    # these bake dtype and device in: .to(bf16) and autocast would fail on them
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    learnt = learn(program, graph, names, log)
    fixed = tuple(
        None if s is None else tuple(n if isinstance(n, int) else None for n in s)
        for s in learnt.sizes
    )
    door = Door(tuple(names), fixed, tuple(learnt.conditions))
    pinned = [
        Pinned(n, d, size, learnt.fixed.get((names.index(n), d), UNKNOWN))
        for (n, d), size in door.fixed(requested).items()
    ]
    constants, bodies = constants_and_bodies(module, graph)
    cuts = constants_of(graph)
    finish(graph)
    out_spec = program.call_spec.out_spec
    return Traced(graph, constants, door, out_spec, pinned, learnt.doubtful, cuts, bodies)


def constants_and_bodies(
    module: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, torch.Tensor], dict[str, fx.GraphModule]]:
    """The tensors that a graph reads, and the bodies of higher-order ops."""
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    held = {name: operator.attrgetter(name)(module) for name in names}
    tensors = {n: v for n, v in held.items() if isinstance(v, torch.Tensor)}
    return tensors, {n: v for n, v in held.items() if isinstance(v, fx.GraphModule)}


def finish(graph: fx.Graph) -> None:
    """The last steps of a graph that is otherwise clean."""
    split_products(graph)
    graph.eliminate_dead_code(lambda n: n.op in ("output", "placeholder") or n.is_impure())
    _follow_device(graph)
    graph.set_codegen(fx.graph.CodeGen())  # leaves in, leaves out


def _follow_device(graph: fx.Graph) -> None:
    """Replace every device literal by the device of the first tensor input.

    A captured Llama has 28 of them, and the graph would stay on the device of the capture.
    """
    places = graph.find_nodes(op="placeholder")
    first = next((n for n in places if isinstance(value(n), torch.Tensor)), None)
    literals = (a for n in graph.nodes for a in tree_leaves((n.args, n.kwargs)))
    if first is None or not any(isinstance(a, torch.device) for a in literals):
        return
    with graph.inserting_after(places[-1]):
        device = graph.call_function(getattr, (first, "device"))
    for n in graph.nodes:
        n.args, n.kwargs = map_aggregate(
            (n.args, n.kwargs), lambda a: device if isinstance(a, torch.device) else a
        )


@dataclass(frozen=True)
class Pinned:
    """A dimension that was asked to be dynamic and that the model fixed."""

    input: str
    dim: int
    size: int
    op: str
    rung: str = "pinned"

    def to_json(self) -> Json:
        """One row of `pinned[]`."""
        return dict(vars(self))

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"
