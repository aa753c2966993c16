"""Regions that change how ops run (no_grad, autocast), taken into the graph around them.

torch.export puts such a region into a body that a higher-order op calls. Inlined, its weights are
weights like any other, and its meaning stays:

    no_grad    what enters is detached, and so is what leaves: no gradient passes either way
    autocast   the casts that autocast would make at run time become nodes, by the recorded dtypes
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lora_fx.fx.nodes import value

aten = torch.ops.aten
higher = torch.ops.higher_order
NO_GRAD = "lora_fx_no_grad"
"""Key in the metadata of nodes that ran with gradients off."""


def inline_regions(module: fx.GraphModule, graph: fx.Graph, *, no_grad: bool = False) -> None:
    """Replace every call of a no_grad or autocast body by the body's own nodes."""
    for node in list(graph.nodes):
        if node.target is higher.wrap_with_set_grad_enabled:
            enabled, body, *given = node.args
            off = no_grad or not enabled
            _inline(module, graph, node, body, given, no_grad=off, cast=None)
        elif node.target is higher.wrap_with_autocast:
            _, dtype, enabled, _, body, *given = node.args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, graph, node, body, given, no_grad=no_grad, cast=cast)


def _inline(
    module: fx.GraphModule,
    graph: fx.Graph,
    node: fx.Node,
    body: fx.Node,
    given: list[Any],
    *,
    no_grad: bool,
    cast: torch.dtype | None,
) -> None:
    part: Any = module
    for name in str(body.target).split("."):
        part = getattr(part, name)
    inline_regions(part, part.graph, no_grad=no_grad)
    env: dict[fx.Node, Any] = {}
    arguments = iter(given)
    results: Any = ()
    with graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op == "placeholder":
                outer = next(arguments)
                env[inner] = _detached(graph, outer) if no_grad else outer
            elif inner.op == "output":
                results = map_arg(inner.args[0], lambda n: env[n])
            else:
                new = graph.node_copy(inner, lambda n: env[n])
                if inner.op == "get_attr":
                    new.target = f"{body.target}.{inner.target}"
                if cast is not None:
                    _cast_inputs(graph, new, cast)
                if no_grad:
                    new.meta[NO_GRAD] = True
                env[inner] = new
        if no_grad:
            results = map_arg(results, lambda n: _detached(graph, n))
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _detached(graph: fx.Graph, node: Any) -> Any:
    """A value without its gradient; tensors of the model and numbers have none to lose."""
    floating = isinstance(node, fx.Node) and isinstance(v := value(node), torch.Tensor)
    if not floating or node.op == "get_attr" or not v.is_floating_point():
        return node
    new = graph.call_function(aten.detach.default, (node,))
    new.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
    return new


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast a node's floating operands as autocast did when the graph was recorded.

    Ops that autocast runs narrow have a narrow result of wider operands; those that it runs in
    fp32 have an fp32 result of narrow operands.
    """
    made = value(node)
    if isinstance(made, (tuple, list)):
        made = next((m for m in made if isinstance(m, torch.Tensor)), None)
    if not isinstance(made, torch.Tensor) or not made.is_floating_point() or _casts(node):
        return
    operands = [
        i for i in node.all_input_nodes if isinstance(v := value(i), torch.Tensor)
        and v.is_floating_point()
    ]  # fmt: skip
    seen = {value(i).dtype for i in operands}
    wanted = made.dtype
    mixed = seen != {wanted} and wanted in (dtype, torch.float32)
    if not mixed or (wanted is torch.float32 and torch.float32 in seen):
        return  # plain type promotion
    with graph.inserting_before(node):
        for i in operands:
            if value(i).dtype is not wanted:
                new = graph.call_function(aten.to.dtype, (i, wanted))
                new.meta = dict(i.meta)
                new.meta["val"] = value(i).to(wanted)
                node.replace_input_with(i, new)


def _casts(node: fx.Node) -> bool:
    name = str(node.target)
    return name.startswith(
        ("aten.to.", "aten._to_copy", "aten.type_as", "aten.empty", "aten.zeros")
    )
