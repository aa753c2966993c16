"""The names and values of computed weights.

Their key is `PATH.weight~`, and an update is one of the effective weight. PATH.weight is the name
that the user knows: `lin.weight~` for `lin.parametrizations.weight.original0` and for
`lin.weight_v`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.flow import FxFlow, FxWeight
from lora_fx.fx.graph.in_place import written_by
from lora_fx.fx.graph.nodes import (
    op_name,
    plain,
    reached,
)
from lora_fx.fx.tensors import device_of, owner

_HELD = re.compile(r"(^|\.)parametrizations\.([^.]+)\..*$")


_PARTS = re.compile(r"_(g|v|orig)$")


def effective_name(behind: tuple[str, ...]) -> str:
    """The name of what parameters make together, with the ~ of a computed weight.

    >>> effective_name(("lin.parametrizations.weight.original0",))
    'lin.weight~'
    >>> effective_name(("c.weight_g", "c.weight_v")), effective_name(("a.q.weight", "a.k.weight"))
    ('c.weight~', 'a.weight~')
    """
    names = {_PARTS.sub("", _HELD.sub(r"\1\2", n)) for n in behind}
    if len(names) == 1:
        return names.pop() + "~"
    paths = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join([*(level[0] for level in shared), "weight"]) + "~"


class Namer:
    """Gives computed weights their names, and the same name to equal computations."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, int]] = {}

    def __call__(self, weight: FxWeight) -> str:
        """The parameter's name, or that of the computed weight."""
        if weight.name:
            return weight.name
        name = effective_name(weight.behind)
        recipes = self.known.setdefault(name, {})
        i = recipes.setdefault(_recipe(weight.root, {}), len(recipes))
        return f"{name}{i}" if i else name


def _recipe(node: fx.Node, memo: dict[fx.Node, str]) -> str:
    """How a value is computed, as a text that is equal for equal computations."""
    if node not in memo:
        inner: object = fx.node.map_aggregate(
            (node.args, node.kwargs),
            lambda a: _recipe(a, memo) if isinstance(a, fx.Node) else repr(a),
        )
        called = node.op == "call_function"
        memo[node] = f"{op_name(node)}{inner}" if called else str(node.target)
    return memo[node]


def evaluate(root: torch.nn.Module, flow: FxFlow, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and constants only.

    Ops that edit intermediate values in place run as well; buffers are copied first.
    """
    wanted = _made_from(node)
    for n in node.graph.nodes:  # what edits an intermediate belongs to its value
        if n is node:
            break
        if flow.fixed(n) and any(w in wanted for w in written_by(n)):
            wanted |= _made_from(n)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in node.graph.nodes:
            if n not in wanted:
                continue
            if n.target is getattr:
                values[n] = device_of(root)
            elif n.op == "get_attr":
                module, leaf = owner(root, str(n.target))
                values[n] = getattr(module, leaf).detach().clone()
            else:
                args, kwargs = fx.node.map_aggregate(
                    (n.args, n.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else plain(a)
                )
                values[n] = n.target(*args, **kwargs)
    result: torch.Tensor = values[node]
    return result


def _made_from(node: fx.Node) -> set[fx.Node]:
    """A node and all that its value depends on; a device is known without its tensor."""
    return set(reached([node], lambda n: [] if n.target is getattr else n.all_input_nodes))
