"""Copies of the nodes of a block, put in the place of the opaque nodes of later calls."""

from __future__ import annotations

import operator
from copy import deepcopy
from typing import cast

import torch
from torch import fx

from lora_fx.fx.capture.repeat import _NUMBERS, AGAIN, END, START
from lora_fx.fx.graph.nodes import value

aten = torch.ops.aten


class NotRepeated(Exception):
    """Copies cannot be put into a graph; the model is traced without any."""


def write_out(module: fx.GraphModule) -> None:
    """Put the copies that the opaque nodes of a graph stand for in their places.

    Raises:
        NotRepeated: Some node is elsewhere than its pattern, or reads what has no counterpart.
    """
    graph = module.graph
    starts: dict[int, fx.Node] = {}
    ends: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is START:
            starts[node.args[1]] = node
        elif node.target is END:
            ends[node.args[1]] = node
        elif node.target is AGAIN:
            key = node.args[1]
            if key not in starts or key not in ends:
                raise NotRepeated
            _copy(module, starts[key], ends[key], node)
    for mark in (*starts.values(), *ends.values()):
        graph.erase_node(mark)
    marks = {START, END, AGAIN}
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and any(n.target in marks for n in part.graph.nodes):
            raise NotRepeated


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (*_NUMBERS, int, float))


def _copy(module: fx.GraphModule, start: fx.Node, end: fx.Node, call: fx.Node) -> None:
    graph = module.graph
    given, theirs, made = (cast("list[fx.Node]", n.args[0]) for n in (start, call, end))
    env = dict(zip(given, theirs, strict=True))
    inside, at = list[fx.Node](), start
    while (at := at.next) is not end:
        inside.append(at)
    here = {*given, *inside, end}
    with graph.inserting_before(call):
        for inner in inside:
            if _is_number(inner) or inner.target in (START, END, aten._assert_scalar.default):
                continue  # numbers are the same in every call
            read = {n for n in inner.all_input_nodes if n.op != "get_attr" and not _is_number(n)}
            if inner.op != "get_attr" and inner not in made:
                read.update(inner.users)
            if read - here:  # other calls would not share it
                raise NotRepeated
            new = graph.node_copy(inner, lambda n: env.get(n, n))
            new.meta["nn_module_stack"] = _moved(inner, start, call)
            body = getattr(module, str(inner.target), None) if inner.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):  # passes edit a body for the one call of it
                new.target = f"{inner.target}_{new.name}"
                module.add_submodule(new.target, deepcopy(body))
            env[inner] = new
    for user in list(call.users):
        if user.target is operator.getitem:
            result = made[cast("int", user.args[1])]
            user.replace_all_uses_with(env.get(result, result))
            graph.erase_node(user)
    graph.erase_node(call)


def _moved(node: fx.Node, start: fx.Node, call: fx.Node) -> dict[str, tuple[str, object]]:
    """The modules that a copied node was made in: those of the call, and then the node's own."""
    stack, outer, here = (n.meta.get("nn_module_stack") or {} for n in (node, start, call))
    if list(stack)[: len(outer)] != list(outer) or not outer or not here:
        return dict(stack)
    (old, (old_path, _)), (new, (new_path, _)) = (list(s.items())[-1] for s in (outer, here))
    inner = list(stack.items())[len(outer) :]
    moved = {
        new + k.removeprefix(old): (new_path + path.removeprefix(old_path), kind)
        for k, (path, kind) in inner
    }
    return {**here, **moved}
