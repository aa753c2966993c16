"""Readers of export graph nodes: shapes, dtypes, arguments by schema name."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx import Node
from torch.fx.node import map_arg

from lora_fx.ir.einsum import Shape

T = TypeVar("T")


def value(node: object) -> Any:
    """Return the fake tensor of a node, or a tuple of fake tensors."""
    if isinstance(node, Node):
        return node.meta.get("val")
    return node


def shape_of(node: object) -> Shape | None:
    """Return the sizes of a node's tensor, as ints or SymInts; None for any other node."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return None
    return tuple(tensor.shape)


def dtype_of(node: object) -> torch.dtype | None:
    """Return the dtype of a node's tensor; None for any other node."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor.dtype


def hint(size: Any) -> int:
    """Return a size's number in the example; 2 if it depends on a tensor's values."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        return 2
    return int(size.node.hint)


def plain(value: object) -> Any:
    """Return a captured value as in the example: a symbolic size becomes its number."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    return value


def numel(shape: Shape) -> int:
    """Return the number of elements at the example's sizes."""
    return math.prod(map(hint, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without its module: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def argument(node: Node, name: str, default: object = None) -> Any:
    """Return an argument by its schema name, whether given by position or by keyword."""
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
    """Return the op's name without its namespace: linear for aten.linear.default."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def op_in_any_form(node: fx.Node) -> str:
    """Return the op's name, such as relu for relu.default and relu_.default; "" for no call."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return str(name).rpartition("::")[2].rstrip("_")


def scopes_of(node: fx.Node) -> dict[str, str]:
    """Return {path: class name} of the modules around a node, the outermost first."""
    scopes: dict[str, str] = {}
    for path_with_call, module_class in (node.meta.get("nn_module_stack") or {}).values():
        path, _, _ = str(path_with_call).partition("@")
        name = module_class if isinstance(module_class, str) else module_class.__name__
        scopes.pop(path, None)  # one that calls itself is innermost again
        scopes[path] = name.rpartition(".")[2]
    return scopes


def scope_of(node: fx.Node) -> tuple[str, str]:
    """Return path and class name of the innermost module whose forward made the node."""
    return next(reversed(scopes_of(node).items()), ("", ""))


def block_of(node: fx.Node, blocks: Sequence[str]) -> str:
    """Return the block among `blocks` whose forward made a node; empty if there is none."""
    scopes = scopes_of(node)
    return next((block for block in blocks if block in scopes), "")


def overloads(row: T, *names: str) -> dict[object, T]:
    """Return a table with this row for every overload of the named ATen ops."""
    rows: dict[object, T] = {}
    for name in names:
        packet = getattr(torch.ops.aten, name)
        rows |= {getattr(packet, overload): row for overload in packet.overloads()}
    return rows


def aten_ops(names: str) -> set[object]:
    """Return the named ATen ops: `add.Tensor`, or `relu` for relu.default."""
    operators = set[object]()
    for name in names.split():
        op, _, overload = name.partition(".")
        operators.add(getattr(getattr(torch.ops.aten, op), overload or "default"))
    return operators


def reached(start: Iterable[T], onwards: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Walk through a graph and yield each node once, nearest first, beginning with `start`."""
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
    """Replace the parts of a node's result by other nodes, and erase the node."""
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def random_ops(graph: fx.Graph) -> list[str]:
    """Return the ops of a graph that draw random numbers, without dropouts that are off."""
    drawing = [node for node in graph.nodes if _may_draw(node) and not draws_nothing(node)]
    return list(dict.fromkeys(map(op_name, drawing)))


def draws_nothing(node: fx.Node) -> bool:
    """Whether a node is of an op that can draw random numbers, and its dropout is off."""
    switches = ("train", "training", "p", "dropout", "dropout_p")
    return _may_draw(node) and not all(argument(node, switch, True) for switch in switches)


def _may_draw(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


NO_GRAD = "lora_fx_no_grad"
"""The metadata key of nodes that run without gradients."""
MARK = "lora_fx"


def mark(node: fx.Node, site: str) -> None:
    """Mark a node, in its metadata, as part of the branch of a site.

    torch keeps the metadata field "custom" through save, load and a second export.
    """
    node.meta["custom"] = {**node.meta.get("custom", {}), MARK: {"site": site}}


def unmark(node: fx.Node) -> None:
    """Remove the mark from a node."""
    custom = node.meta["custom"]
    node.meta["custom"] = {key: entry for key, entry in custom.items() if key != MARK}


def copy_into(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Append a copy of a node of another graph, and enter it among the copies of such nodes.

    torch's `Graph.node_copy` takes twice as long: a program of 30 blocks is copied block by block.
    """
    copy = graph.create_node(node.op, node.target, None, None, node.name)
    copies[node] = copy
    # set afterwards: create_node looks for symbols among its arguments, a third of its time
    copy.args = map_arg(node.args, copies.__getitem__)
    if node.kwargs:
        copy.kwargs = map_arg(node.kwargs, copies.__getitem__)
    copy.meta.update(node.meta)
    # torch looks up and updates its tables of nodes whenever an attribute is set
    if node.type is not None:
        copy.type = node.type
    return copy


def make_marked(
    before: fx.Node, beside: fx.Node, site: str, target: Any, args: Any = None, kwargs: Any = None
) -> fx.Node:
    """Make a node of a site's branch: an op on `args`, or, without `args`, a read of a tensor.

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
    """True for nodes that a pass emitted, for this `site` or for any site."""
    mark_of_node = node.meta.get("custom", {}).get(MARK)
    if mark_of_node is None:
        return False
    return site is None or mark_of_node["site"] == site


class OverTensors(fx.Interpreter):
    """An interpreter over tensors by name, for one run without a compiled GraphModule."""

    def __init__(self, tensors: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.tensors = tensors

    def fetch_attr(self, target: str) -> Any:
        """Return the object that the graph reads by this name."""
        return self.tensors[target]
