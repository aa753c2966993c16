"""A captured graph of tensors only, with names for its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.onnx_names import onnx_name, output_name
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
    """Return a GraphModule of tensors only, and the names of its inputs and outputs.

    Constants of the call become constants of the graph.

    Args:
        module: The module that holds the tensors.
        graph: Its graph; edited.
        traced: The trace that the graph was made from.
        all_outputs: Keep the outputs that are no tensors.
        named: The arguments that the graph was made for; without them, those of the capture.
    """
    arguments = execution_of(module).captured.named if named is None else dict(named)
    input_names = _keep_tensor_inputs(graph, traced.door.names, tree_leaves(arguments))
    output_names = _flatten_outputs(graph, traced, all_outputs)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph), input_names, output_names


def _keep_tensor_inputs(graph: fx.Graph, names: Sequence[str], leaves: Sequence[Any]) -> list[str]:
    """Put arguments that are not tensors into a graph; return the names of the tensor arguments."""
    tensor_names = []
    placeholders = graph.find_nodes(op="placeholder")
    for placeholder, name, leaf in zip(placeholders, names, leaves, strict=False):
        if isinstance(leaf, torch.Tensor):
            tensor_names.append(onnx_name(name))
        else:
            placeholder.replace_all_uses_with(leaf)
            graph.erase_node(placeholder)
    return tensor_names


def _flatten_outputs(graph: fx.Graph, traced: Traced, all_outputs: bool) -> list[str]:
    """Make a graph return its outputs as one tuple; return their names."""
    output = graph.output_node()
    leaves = list(tree_leaves(output.args[0]))
    paths = output_paths(traced.out_spec, len(leaves))
    outputs = []
    names = []
    for leaf, path in zip(leaves, paths, strict=True):
        if all_outputs or _is_tensor(leaf):
            outputs.append(leaf)
            names.append(output_name(path))
    output.args = (tuple(outputs),)
    return names


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, fx.Node) and isinstance(value(leaf), torch.Tensor)


def output_paths(spec: Any, count: int) -> list[str]:
    """Return the dotted paths of an output's leaves.

    An output class of transformers may give its fields back in another order than they came in.
    """
    numbered = tree_unflatten(list(range(count)), spec)
    if isinstance(numbered, int):
        return [""]
    path_of = dict(zip(tree_leaves(numbered), leaf_names({"": numbered}), strict=True))
    return [path_of[i] for i in range(count)]
