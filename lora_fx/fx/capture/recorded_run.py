"""The last way to capture a model: one recorded run on its real tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import fx, nn
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
from lora_fx.fx.lowering.context_bodies import without_grad_modes
from lora_fx.fx.proxy_tracing import make_fx
from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.inputs import Named


def record(entry: RootModule, named: Named, why: str) -> Traced:
    """Record one run of a model on its real tensors as a graph.

    The graph is valid for the sizes of the example and for the branches that its values took:
    every value that Python read from a tensor is a constant of the graph.

    Args:
        entry: The model with its values, in the mode to record; it stays as it is.
        named: The example's arguments.
        why: Why torch.export refused, for `pinned`.
    """
    leaves, spec = tree_flatten(dict(named))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    # nothing is kept for a backward pass; what the model runs without gradient shows all the same
    parameters = {n: nn.Parameter(p.detach(), False) for n, p in entry.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in entry.named_buffers()}
    out_spec: Any = None

    def run(parameters: Any, buffers: Any, given_tensors: list[torch.Tensor]) -> list[Any]:
        nonlocal out_spec
        next_tensor = iter(given_tensors)
        run_leaves = [
            next(next_tensor) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]
        arguments = (tree_unflatten(run_leaves, spec),)
        out = torch.func.functional_call(entry, {**parameters, **buffers}, arguments)
        flat_outputs, out_spec = tree_flatten(out)
        return flat_outputs

    source = entry.source()
    with (
        quiet(),
        torch.enable_grad(),
        _scopes(source),
        same_dtypes(),
        observing(source) as observed,
    ):
        record_run = make_fx(
            run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )
        module = record_run(parameters, buffers, [tensor.clone() for tensor in tensors])

    graph = module.graph
    without_grad_modes(graph)
    constants, bodies = constants_and_bodies(module, graph)
    graph.owning_module = None  # it has none of the model's names
    _read_by_name(graph, (*parameters, *buffers))
    match_places(graph, leaves)
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(output.args[0]),)
    finish(graph)

    names = leaf_names(named)
    sizes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
    traced = Traced(graph, constants, Door(tuple(names), sizes), out_spec, bodies=bodies)
    traced.left_out = tuple(entry.left_out())
    traced.notes = tuple(observed.notes)
    traced.own_gradients = tuple(observed.own_gradients)
    for name, shape in zip(names, sizes, strict=True):
        for dim, size in enumerate(shape or ()):
            traced.pinned.append(Pinned(name, dim, size, why, "recorded"))
    return traced


def _read_by_name(graph: fx.Graph, names: Iterable[str]) -> None:
    """Turn a graph's first placeholders into reads of the model's tensors with these names."""
    places = graph.find_nodes(op="placeholder")
    for place, name in zip(places, names, strict=False):
        with graph.inserting_before(place):
            tensor = graph.get_attr(name)
        tensor.meta = dict(place.meta)
        place.replace_all_uses_with(tensor)
        graph.erase_node(place)


@contextlib.contextmanager
def _scopes(model: nn.Module) -> Iterator[None]:
    """A block in which new nodes get their module stack, which make_fx leaves out."""
    stack: dict[str, tuple[str, str]] = {}

    def enter(path: str, module: nn.Module, _args: object) -> None:
        if torch.compiler.is_dynamo_compiling():  # a body, which must not write to a dict
            return
        stack[path] = (path, type(module).__qualname__)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    def leave(path: str, _module: object, _args: object, _out: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        stack.pop(path, None)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    with contextlib.ExitStack() as hooks, traceback.preserve_node_meta():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, path)))
            after = module.register_forward_hook(partial(leave, path), always_call=True)
            hooks.enter_context(after)
        yield
