"""The cleaned graph of a program: leaves in, flat outputs out, with the model's tensor names."""

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
from lora_fx.fx.capture.learnt_sizes import Shape, learn
from lora_fx.fx.capture.size_nodes import constants_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import draws_nothing, value
from lora_fx.fx.lowering.context_bodies import inline_regions
from lora_fx.fx.lowering.product_chains import split_products
from lora_fx.fx.lowering.vmap import without_vmap
from lora_fx.fx.trees import tree_leaves
from lora_fx.text import Json

aten = torch.ops.aten


@dataclass(frozen=True)
class Pinned:
    """A dimension that should be dynamic, but that the model fixed.

    Attributes:
        input: The name of the leaf.
        dim: The dimension.
        size: The size at which it is fixed.
        op: The line of code, or the reason, that fixed it.
        rung: How the graph was captured: "pinned" by an export, "recorded" by one recorded run.
    """

    input: str
    dim: int
    size: int
    op: str
    rung: str = "pinned"

    def to_json(self) -> Json:
        """Return one row of `pinned[]`."""
        return dict(vars(self))

    def __str__(self) -> str:
        """Return the line for a report."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"


@dataclass
class Traced:
    """A cleaned graph, whose placeholders are the leaves and whose outputs are flat.

    Attributes:
        graph: The nodes.
        constants: Tensors that the graph reads and that are none of the model's.
        door: The sizes that it takes.
        out_spec: How the flat outputs become what the model returns.
        pinned: Dimensions that were asked to be dynamic and are not.
        doubtful: Conditions that a kernel asked for; a run decides whether they matter.
        cuts: Numbers that sizes are compared, cut or divided with.
        bodies: The graphs that higher-order ops call, by the name that the graph reads.
        left_out: Outputs that are no tensors, and that no graph makes.
        notes: Further notes for the user.
        own_gradients: Functions and modules whose gradient may differ from that of their forward,
            by name: a graph has the forward only.
        copies: Calls of blocks that are copies of the nodes of another one.
        modeless: True where no code asked for the mode, so that this is the other mode's graph too.
        analyses: Results of analyses of the graph; see lora_fx.ir.graph.Analysed.
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
        """Return a copy over a tree that holds the tensors; all copies share find's results."""
        graph = FxGraph(
            self.graph, root, training=training, bodies=self.bodies, constants=self.constants
        ).clone()
        graph.read_codes()
        graph.share(self.analyses)
        return graph


def clean_module(
    module: fx.GraphModule,
    program: ExportedProgram,
    names: Sequence[str],
    requested: Requested,
    log: GuardLog,
) -> Traced:
    """Return a program as a flat graph whose placeholders are the leaves of a call.

    Args:
        module: The program's; it may have been edited.
        program: The export, or what a file holds.
        names: The names of the leaves.
        requested: The dimensions that should be dynamic.
        log: The guards of the export; empty for a file.
    """
    graph = module.graph
    inline_regions(module)
    without_vmap(graph)
    write_out(module)
    # these bake dtype and device in: .to(bf16) and autocast would fail on them
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)

    learnt = learn(program, graph, names, log)
    fixed_sizes = tuple(_fixed_sizes(shape) for shape in learnt.sizes)
    door = Door(tuple(names), fixed_sizes, tuple(learnt.conditions))
    pinned = []
    for (name, dim), size in door.fixed(requested).items():
        line = learnt.fixed.get((names.index(name), dim), UNKNOWN)
        pinned.append(Pinned(name, dim, size, line))

    constants, bodies = constants_and_bodies(module, graph)
    cuts = constants_of(graph)
    finish(graph)
    out_spec = program.call_spec.out_spec
    return Traced(graph, constants, door, out_spec, pinned, learnt.doubtful, cuts, bodies)


def _fixed_sizes(shape: Shape | None) -> tuple[int | None, ...] | None:
    """Return a leaf's sizes, with None for a free size; None for a leaf that is no tensor."""
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in shape)


def constants_and_bodies(
    module: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, torch.Tensor], dict[str, fx.GraphModule]]:
    """Return the tensors that a graph reads, and the bodies of higher-order ops, by name."""
    constants: dict[str, torch.Tensor] = {}
    bodies: dict[str, fx.GraphModule] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        attribute = operator.attrgetter(name)(module)
        if isinstance(attribute, torch.Tensor):
            constants[name] = attribute
        elif isinstance(attribute, fx.GraphModule):
            bodies[name] = attribute
    return constants, bodies


def match_places(graph: fx.Graph, leaves: Sequence[object]) -> None:
    """Give a graph one placeholder for each leaf of the call.

    A constant among the leaves gets one that nothing reads; a placeholder of a constant becomes
    the constant.
    """
    tensor_places = []
    for place in graph.find_nodes(op="placeholder"):
        constant = place.meta.get("val")
        if isinstance(constant, torch.Tensor):
            tensor_places.append(place)
        else:
            place.replace_all_uses_with(constant)
            graph.erase_node(place)

    next_place = iter(tensor_places)
    previous: fx.Node | None = None
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            previous = next(next_place)
            continue
        following = next(iter(graph.nodes)) if previous is None else previous.next
        with graph.inserting_before(following):
            previous = graph.placeholder(f"constant_{i}")


def finish(graph: fx.Graph) -> None:
    """Apply the last cleaning steps to a graph."""
    split_products(graph)
    graph.eliminate_dead_code(_stays)
    _follow_device(graph)
    graph.set_codegen(fx.graph.CodeGen())  # leaves in, leaves out


def _stays(node: fx.Node) -> bool:
    """Whether a node without a reader stays in a graph: it draws numbers, or checks something."""
    if node.op in ("output", "placeholder"):
        return True
    # for fx, a dropout and attention are impure even where they draw nothing
    return bool(node.is_impure()) and not draws_nothing(node)


def _follow_device(graph: fx.Graph) -> None:
    """Replace every device literal by the device of the first tensor input.

    A captured Llama has 28 of them, and the graph would stay on the device of the capture.
    """
    places = graph.find_nodes(op="placeholder")
    tensor_places = (place for place in places if isinstance(value(place), torch.Tensor))
    first = next(tensor_places, None)
    if first is None or not _has_device_literals(graph):
        return

    with graph.inserting_after(places[-1]):
        device = graph.call_function(getattr, (first, "device"))

    def followed(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), followed)


def _has_device_literals(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        arguments = tree_leaves((node.args, node.kwargs))
        if any(isinstance(argument, torch.device) for argument in arguments):
            return True
    return False
