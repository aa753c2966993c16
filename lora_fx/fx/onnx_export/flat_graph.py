"""A captured graph as one of tensors only, with names for its inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.fx.capture.call import leaf_names, onnx_name, output_name
from lora_fx.fx.capture.trace import Traced
from lora_fx.fx.graph.nodes import value
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Named


def flat_program(
    module: CapturedModule,
    graph: fx.Graph,
    traced: Traced,
    *,
    all_outputs: bool = True,
    named: Named | None = None,
) -> tuple[fx.GraphModule, list[str], list[str]]:
    """A GraphModule of tensors only: constants of the call left out, outputs named.

    Args:
        module: What holds the tensors.
        graph: Its graph; edited.
        traced: What that was made from.
        all_outputs: Keep the outputs that are no tensors.
        named: The arguments that it was made for; those of the capture without them.
    """
    leaves = tree_leaves(execution_of(module).captured.named if named is None else dict(named))
    names = []
    places = [n for n in graph.nodes if n.op == "placeholder"]
    for place, name, leaf in zip(places, traced.door.names, leaves, strict=False):
        if isinstance(leaf, torch.Tensor):
            names.append(onnx_name(name))
        else:
            place.replace_all_uses_with(leaf)  # a Python constant of the capture
            graph.erase_node(place)
    out = next(n for n in graph.nodes if n.op == "output")
    values = list(tree_leaves(out.args[0]))
    paths = output_paths(traced.out_spec, len(values))
    kept = [
        (leaf, path)
        for leaf, path in zip(values, paths, strict=True)
        if all_outputs or (isinstance(leaf, fx.Node) and isinstance(value(leaf), torch.Tensor))
    ]
    out.args = (tuple(leaf for leaf, _ in kept),)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph), names, [output_name(path) for _, path in kept]


def output_paths(spec: Any, count: int) -> list[str]:
    """The dotted paths of an output's leaves.

    An output class of transformers may give its fields back in another order than they came in.
    """
    dummy = tree_unflatten(list(range(count)), spec)
    if isinstance(dummy, int):
        return [""]
    places = dict(zip(tree_leaves(dummy), leaf_names({"": dummy}), strict=True))
    return [places[i] for i in range(count)]
