"""Computed weights: their names, and their values.

A weight that ops make of parameters (weight_norm, spectral_norm, standardisation, an orthogonal
map, a concatenation) has the key `PATH.weight~`; the update is one of the effective weight. The
name is that of the parameter that the user knows: `lin.weight~` for
`lin.parametrizations.weight.original0` and for `lin.weight_v`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import fx

from lora_fx.fx.flow import Flow, Weight, written_by
from lora_fx.fx.nodes import hint, op_name
from lora_fx.fx.tensors import owner

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
    """Gives computed weights their names: one that is computed twice alike has one name."""

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}

    def __call__(self, weight: Weight) -> str:
        """The name of a weight."""
        if weight.name:
            return weight.name
        name = effective_name(weight.behind)
        recipes = self.known.setdefault(name, [])
        recipe = _recipe(weight.root, {})
        if recipe not in recipes:
            recipes.append(recipe)
        i = recipes.index(recipe)
        return f"{name}{i}" if i else name


def _recipe(node: fx.Node, memo: dict[fx.Node, str]) -> str:
    """How a value is computed, as a text that is equal for equal computations."""
    if node not in memo:
        if node.op != "call_function":
            memo[node] = str(node.target)
        else:
            inner: Any = fx.node.map_aggregate(
                (node.args, node.kwargs),
                lambda a: _recipe(a, memo) if isinstance(a, fx.Node) else repr(a),
            )
            memo[node] = f"{op_name(node)}{inner}"
    return memo[node]


def evaluate(root: torch.nn.Module, flow: Flow, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and constants only.

    Ops that edit intermediate values in place run as well; buffers are copied first.
    """
    wanted = _ancestors({node})
    for n in node.graph.nodes:  # what edits an intermediate belongs to its value
        if n is node:
            break
        if flow.fixed(n) and any(w in wanted for w in written_by(n)):
            wanted |= _ancestors({n})
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in node.graph.nodes:
            if n not in wanted:
                continue
            if n.target is getattr:
                values[n] = _device(root)
            elif n.op == "get_attr":
                module, leaf = owner(root, str(n.target))
                values[n] = getattr(module, leaf).detach().clone()
            else:
                args, kwargs = fx.node.map_aggregate(
                    (n.args, n.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else _plain(a)
                )
                values[n] = n.target(*args, **kwargs)
    result: torch.Tensor = values[node]
    return result


def _plain(arg: Any) -> Any:
    return hint(arg) if isinstance(arg, torch.SymInt) else arg


def _device(root: torch.nn.Module) -> torch.device:
    return next((p.device for p in root.parameters()), torch.device("cpu"))


def _ancestors(start: set[fx.Node]) -> set[fx.Node]:
    seen, queue = set(start), list(start)
    while queue:
        for i in queue.pop().all_input_nodes:
            if i not in seen:
                seen.add(i)
                if i.target is not getattr:
                    queue.append(i)
    return seen
