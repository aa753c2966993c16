"""One run of a model on its real tensors, written down: the last rung of a capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import traceback

from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.cleaned_graph import (
    Pinned,
    Traced,
    constants_and_bodies,
    finish,
    match_places,
)
from lora_fx.fx.capture.door import Door
from lora_fx.fx.capture.observed import observing
from lora_fx.fx.capture.root_module import RootModule
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.capture.unchanged import same_dtypes
from lora_fx.fx.interception import make_fx
from lora_fx.fx.lowering import without_grad_modes
from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.inputs import Named


def record(entry: RootModule, named: Named, why: str) -> Traced:
    """One run of a model on its real tensors, written down: the last rung of a capture.

    It holds for the sizes of the example, and for the branches that its values took: whatever
    Python read of a tensor is a constant of the graph.

    Args:
        entry: The model with its values, in the mode to record; it stays as it is.
        named: The example's arguments.
        why: Why torch.export refused, for `pinned`.
    """
    leaves, spec = tree_flatten(dict(named))
    names, made = leaf_names(named), list[Any]()
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    # nothing is kept for a backward pass; what the model runs without gradient shows all the same
    frozen = {n: nn.Parameter(p.detach(), False) for n, p in entry.named_parameters()}
    buffers = {n: b.clone() for n, b in entry.named_buffers()}

    def run(parameters: Any, buffers: Any, given: list[torch.Tensor]) -> list[Any]:
        rest = iter(given)
        all_leaves = [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]
        arguments = (tree_unflatten(all_leaves, spec),)
        out = torch.func.functional_call(entry, {**parameters, **buffers}, arguments)
        flat, out_spec = tree_flatten(out)
        made[:] = [out_spec]
        return flat

    source = entry.source()
    modes = quiet(), torch.enable_grad(), _scopes(source), same_dtypes()
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        seen = stack.enter_context(observing(source))
        module = make_fx(
            run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )(frozen, buffers, [x.clone() for x in tensors])
    graph = module.graph
    without_grad_modes(graph)
    constants, bodies = constants_and_bodies(module, graph)
    graph.owning_module = None  # it has none of the model's names
    places = graph.find_nodes(op="placeholder")
    for place, name in zip(places, (*frozen, *buffers), strict=False):
        with graph.inserting_before(place):
            read = graph.get_attr(name)
        read.meta = dict(place.meta)
        place.replace_all_uses_with(read)
        graph.erase_node(place)
    match_places(graph, leaves)
    (end,) = graph.find_nodes(op="output")
    end.args = (tuple(end.args[0]),)
    finish(graph)
    sizes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves)
    traced = Traced(graph, constants, Door(tuple(names), sizes), made[0], bodies=bodies)
    traced.left_out, traced.notes, traced.own_gradients = tuple(entry.left_out()), *seen()
    traced.pinned = [
        Pinned(n, d, size, why, "recorded")
        for n, shape in zip(names, sizes, strict=True)
        for d, size in enumerate(shape or ())
    ]
    return traced


@contextlib.contextmanager
def _scopes(model: nn.Module) -> Iterator[None]:
    """Nodes get the stack of modules that they were made in, which make_fx leaves out."""
    stack: dict[str, tuple[str, str]] = {}

    def enter(path: str, module: nn.Module, _args: object) -> None:
        stack[path] = (path, type(module).__qualname__)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    def leave(path: str, _m: object, _args: object, _out: object) -> None:
        stack.pop(path, None)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    with contextlib.ExitStack() as hooks, traceback.preserve_node_meta():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, path)))
            after = module.register_forward_hook(partial(leave, path), always_call=True)
            hooks.enter_context(after)
        yield
