"""What a node of an export graph says: shapes, dtypes, arguments by schema name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from lora_fx.ir.kinds import Shape


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


def random_ops(graph: fx.Graph) -> list[str]:
    """The ops of a graph that draw random numbers; a dropout that is off draws none."""
    seeded = [
        n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
    ]
    off = ("train", "p", "dropout_p")
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


def is_marked(node: fx.Node, site: str | None = None) -> bool:
    """True for nodes that a pass emitted, for `site` or for any."""
    found = node.meta.get("custom", {}).get(MARK)
    return found is not None and (site is None or found["site"] == site)
