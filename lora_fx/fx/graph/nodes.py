"""What a node of an export graph says: shapes, dtypes, arguments by schema name."""

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
    """The fake tensor that a node stands for, or a tuple of them."""
    return node.meta.get("val") if isinstance(node, Node) else node


def shape_of(node: object) -> Shape | None:
    """The sizes of a node's tensor, ints or SymInts; None for anything else."""
    v = value(node)
    return tuple(v.shape) if isinstance(v, torch.Tensor) else None


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a node's tensor; None for anything else."""
    v = value(node)
    return v.dtype if isinstance(v, torch.Tensor) else None


def hint(size: Any) -> int:
    """The number that a size is in the example; 2 for one that depends on a tensor's values."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return 2 if size.node.hint is None else int(size.node.hint)


def plain(value: object) -> Any:
    """A value of the capture as it is in the example: a size as its number."""
    return hint(value) if isinstance(value, torch.SymInt) else value


def numel(shape: Shape) -> int:
    """The number of elements at the example's sizes."""
    return math.prod(map(hint, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its module: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def argument(node: Node, name: str, default: object = None) -> Any:
    """An argument by its name in the op's schema, given by position or by keyword."""
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, a.default_value if a.has_default_value() else default)
    return default


def op_name(node: Node) -> str:
    """The op without its namespace: linear for aten.linear.default."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def scopes_of(node: fx.Node) -> dict[str, str]:
    """Path → class name of the modules in whose forward a node was made, the outermost first."""
    found: dict[str, str] = {}
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        name, path = cls if isinstance(cls, str) else cls.__name__, str(path).partition("@")[0]
        found.pop(path, None)  # one that calls itself is innermost again
        found[path] = name.rpartition(".")[2]
    return found


def scope_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module whose forward made the node."""
    return next(reversed(scopes_of(node).items()), ("", ""))


def block_of(node: fx.Node, blocks: Sequence[str]) -> str:
    """The block among `blocks` whose forward made a node; empty for the rest of the model."""
    made_in = scopes_of(node)
    return next((b for b in blocks if b in made_in), "")


def overloads(row: T, *names: str) -> dict[object, T]:
    """One row of a table of ATen's ops for every overload of the ops by these names."""
    packets = [getattr(torch.ops.aten, name) for name in names]
    return {getattr(packet, o): row for packet in packets for o in packet.overloads()}


def aten_ops(names: str) -> set[object]:
    """ATen's ops by these names: `add.Tensor`, or `relu` for relu.default."""
    split = (name.partition(".") for name in names.split())
    return {getattr(getattr(torch.ops.aten, op), kind or "default") for op, _, kind in split}


def reached(start: Iterable[T], onwards: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """What a walk through a graph meets, the nearest first and each once, `start` included."""
    seen = dict.fromkeys(start)
    queue = deque(seen)
    while queue:
        here = queue.popleft()
        yield here
        new = [n for n in onwards(here) if n not in seen]
        seen.update(dict.fromkeys(new))
        queue.extend(dict.fromkeys(new))


def replace_parts(node: Node, parts: Sequence[Node]) -> None:
    """Let what picks the parts of a node's result read these; the node goes."""
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def random_ops(graph: fx.Graph) -> list[str]:
    """The ops of a graph that draw random numbers; a dropout that is off draws none."""
    seeded = [
        n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
    ]
    off = ("train", "training", "p", "dropout", "dropout_p")
    drawing = (n for n in seeded if all(argument(n, name, True) for name in off))
    return list(dict.fromkeys(map(op_name, drawing)))


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
    node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != MARK}


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
            new = graph.get_attr(target)
        else:
            name = f"lora_{getattr(target, '_opname', target.__name__)}"
            new = graph.create_node("call_function", target, args, kwargs or {}, name)
    stack = beside.meta.get("nn_module_stack")
    if stack is not None:
        new.meta["nn_module_stack"] = stack
    mark(new, site)
    return new


def is_marked(node: fx.Node, site: str | None = None) -> bool:
    """True for nodes that a pass emitted, for `site` or for any."""
    found = node.meta.get("custom", {}).get(MARK)
    return found is not None and (site is None or found["site"] == site)


class OverTensors(fx.Interpreter):
    """A graph over tensors by name, to run once: a GraphModule would be compiled first."""

    def __init__(self, tensors: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.tensors = tensors

    def fetch_attr(self, target: str) -> Any:
        """What the graph reads by this name."""
        return self.tensors[target]
