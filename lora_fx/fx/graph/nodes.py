"""Read the nodes of an export graph: shapes, dtypes, arguments by schema name."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx import Node

from lora_fx.ir.einsum import Shape

T = TypeVar("T")


def value(node: object) -> Any:
    """The fake tensor of a node, or a tuple of them."""
    if isinstance(node, Node):
        return node.meta.get("val")
    return node


def shape_of(node: object) -> Shape | None:
    """The sizes of a node's tensor, ints or SymInts; None for anything else."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return None
    return tuple(tensor.shape)


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a node's tensor; None for anything else."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor.dtype


def hint(size: Any) -> int:
    """The number that a size is in the example; 2 for one that depends on a tensor's values."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        return 2
    return int(size.node.hint)


def plain(value: object) -> Any:
    """A value of the capture as it is in the example: a size as its number."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    return value


def numel(shape: Shape) -> int:
    """The number of elements at the example's sizes."""
    return math.prod(map(hint, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its module: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def argument(node: Node, name: str, default: object = None) -> Any:
    """An argument by its name in the op's schema, given by position or by keyword."""
    for position, slot in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if slot.name != name:
            continue
        if position < len(node.args):
            return node.args[position]
        if slot.has_default_value():
            default = slot.default_value
        return node.kwargs.get(name, default)
    return default


def op_name(node: Node) -> str:
    """The op without its namespace: linear for aten.linear.default."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def scopes_of(node: fx.Node) -> dict[str, str]:
    """Path → class name of the modules in whose forward a node was made, the outermost first."""
    scopes: dict[str, str] = {}
    for path_with_call, module_class in (node.meta.get("nn_module_stack") or {}).values():
        path, _, _ = str(path_with_call).partition("@")
        name = module_class if isinstance(module_class, str) else module_class.__name__
        scopes.pop(path, None)  # one that calls itself is innermost again
        scopes[path] = name.rpartition(".")[2]
    return scopes


def scope_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module whose forward made the node."""
    return next(reversed(scopes_of(node).items()), ("", ""))


def block_of(node: fx.Node, blocks: Sequence[str]) -> str:
    """The block among `blocks` whose forward made a node; empty for the rest of the model."""
    scopes = scopes_of(node)
    return next((block for block in blocks if block in scopes), "")


def overloads(row: T, *names: str) -> dict[object, T]:
    """One row of a table of ATen's ops for every overload of the ops by these names."""
    rows: dict[object, T] = {}
    for name in names:
        packet = getattr(torch.ops.aten, name)
        rows |= {getattr(packet, overload): row for overload in packet.overloads()}
    return rows


def aten_ops(names: str) -> set[object]:
    """ATen's ops by these names: `add.Tensor`, or `relu` for relu.default."""
    operators = set[object]()
    for name in names.split():
        op, _, overload = name.partition(".")
        operators.add(getattr(getattr(torch.ops.aten, op), overload or "default"))
    return operators


def reached(start: Iterable[T], onwards: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """The nodes that a walk through a graph meets, nearest first, each once, with `start`."""
    visited = dict.fromkeys(start)
    queue = deque(visited)
    while queue:
        node = queue.popleft()
        yield node
        for neighbour in onwards(node):
            if neighbour not in visited:
                visited[neighbour] = None
                queue.append(neighbour)


def replace_parts(node: Node, parts: Sequence[Node]) -> None:
    """Replace the parts of a node's result by these nodes, and erase the node."""
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def random_ops(graph: fx.Graph) -> list[str]:
    """The ops of a graph that draw random numbers; a dropout that is off draws none."""
    switches = ("train", "training", "p", "dropout", "dropout_p")
    names: dict[str, None] = {}
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        if all(argument(node, switch, True) for switch in switches):
            names[op_name(node)] = None
    return list(names)


NO_GRAD = "lora_fx_no_grad"
"""The key in the metadata of nodes that ran with gradients off."""
MARK = "lora_fx"


def mark(node: fx.Node, site: str) -> None:
    """Say in the metadata that a node belongs to the branch of a site.

    Of a node's metadata torch keeps "custom" through save, load and a second export.
    """
    node.meta["custom"] = {**node.meta.get("custom", {}), MARK: {"site": site}}


def unmark(node: fx.Node) -> None:
    """Take the mark off a node again."""
    custom = node.meta["custom"]
    node.meta["custom"] = {key: entry for key, entry in custom.items() if key != MARK}


def make_marked(
    before: fx.Node, beside: fx.Node, site: str, target: Any, args: Any = None, kwargs: Any = None
) -> fx.Node:
    """A new node of a site's branch: an op on `args`, or without them a read of a tensor.

    Args:
        before: Where in the graph it stands.
        beside: The node whose module it belongs to.
        site: The id of the site.
        target: The op or function, or the dotted name of a tensor of the tree.
        args: What the op takes.
        kwargs: What it takes by keyword.
    """
    graph = before.graph
    with graph.inserting_before(before):
        if args is None:
            node = graph.get_attr(target)
        else:
            name = f"lora_{getattr(target, '_opname', target.__name__)}"
            node = graph.create_node("call_function", target, args, kwargs or {}, name)
    stack = beside.meta.get("nn_module_stack")
    if stack is not None:
        node.meta["nn_module_stack"] = stack
    mark(node, site)
    return node


def is_marked(node: fx.Node, site: str | None = None) -> bool:
    """True for nodes that a pass emitted, for `site` or for any."""
    mark_of_node = node.meta.get("custom", {}).get(MARK)
    if mark_of_node is None:
        return False
    return site is None or mark_of_node["site"] == site


class OverTensors(fx.Interpreter):
    """A graph over tensors by name, to run once: a GraphModule would be compiled first."""

    def __init__(self, tensors: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.tensors = tensors

    def fetch_attr(self, target: str) -> Any:
        """The object that the graph reads by this name."""
        return self.tensors[target]
