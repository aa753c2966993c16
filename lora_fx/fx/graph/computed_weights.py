"""The names and values of computed weights.

Their key is `PATH.weight~`, and an update is one of the effective weight. PATH.weight is the name
that the user knows: `lin.weight~` for `lin.parametrizations.weight.original0` and for
`lin.weight_v`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lora_fx.fx.dotted_names import owner
from lora_fx.fx.graph.flow import FxFlow, FxWeight
from lora_fx.fx.graph.in_place import written_by
from lora_fx.fx.graph.nodes import (
    op_name,
    plain,
    reached,
)
from lora_fx.fx.tensors import device_of

_PARAMETRISED = re.compile(r"(^|\.)parametrizations\.([^.]+)\..*$")


_SUFFIX = re.compile(r"_(g|v|orig)$")


def effective_name(behind: tuple[str, ...]) -> str:
    """The name of a weight that is computed from parameters, with the ~ of a computed weight.

    >>> effective_name(("lin.parametrizations.weight.original0",))
    'lin.weight~'
    >>> effective_name(("c.weight_g", "c.weight_v")), effective_name(("a.q.weight", "a.k.weight"))
    ('c.weight~', 'a.weight~')
    """
    names = set()
    for parameter in behind:
        name = _PARAMETRISED.sub(r"\1\2", parameter)
        names.add(_SUFFIX.sub("", name))
    if len(names) == 1:
        return names.pop() + "~"

    paths = [name.split(".")[:-1] for name in names]
    common = []
    for components in zip(*paths, strict=False):
        if len(set(components)) > 1:
            break
        common.append(components[0])
    return ".".join([*common, "weight"]) + "~"


class Namer:
    """Gives computed weights their names, and the same name to equal computations."""

    def __init__(self) -> None:
        self.recipes: dict[str, dict[str, int]] = {}  # by the name, in the order of the graph

    def __call__(self, weight: FxWeight) -> str:
        """The parameter's name, or that of the computed weight."""
        if weight.name:
            return weight.name
        name = effective_name(weight.behind)
        recipes = self.recipes.setdefault(name, {})
        number = recipes.setdefault(_recipe(weight.root, {}), len(recipes))
        if number == 0:
            return name
        return f"{name}{number}"


def _recipe(node: fx.Node, memo: dict[fx.Node, str]) -> str:
    """The computation of a value as a text; equal computations have equal texts."""
    if node not in memo:
        if node.op == "call_function":
            arguments: object = fx.node.map_aggregate(
                (node.args, node.kwargs),
                lambda arg: _recipe(arg, memo) if isinstance(arg, fx.Node) else repr(arg),
            )
            memo[node] = f"{op_name(node)}{arguments}"
        else:
            memo[node] = str(node.target)
    return memo[node]


def evaluate(root: torch.nn.Module, flow: FxFlow, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and constants only.

    Ops that edit intermediate values in place run as well; buffers are copied first.
    """
    needed = _dependencies(node)
    for earlier in node.graph.nodes:  # what edits an intermediate belongs to its value
        if earlier is node:
            break
        if flow.fixed(earlier) and any(operand in needed for operand in written_by(earlier)):
            needed |= _dependencies(earlier)

    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for step in node.graph.nodes:
            if step in needed:
                values[step] = _computed(step, values, root)
    result: torch.Tensor = values[node]
    return result


def _computed(node: fx.Node, values: Mapping[fx.Node, Any], root: torch.nn.Module) -> Any:
    """The value of one node, from those of the nodes before it and the tensors of the tree."""
    if node.target is getattr:
        return device_of(root)
    if node.op == "get_attr":
        module, leaf = owner(root, str(node.target))
        return getattr(module, leaf).detach().clone()
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda arg: values[arg] if isinstance(arg, fx.Node) else plain(arg),
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _dependencies(node: fx.Node) -> set[fx.Node]:
    """A node and all that its value depends on; a device is known without its tensor."""

    def operands(step: fx.Node) -> list[fx.Node]:
        return [] if step.target is getattr else step.all_input_nodes

    return set(reached([node], operands))
