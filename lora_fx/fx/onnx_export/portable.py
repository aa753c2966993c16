"""Exact rewrites of ops that torch's exporter lacks or that ONNX Runtime computes badly.

Each rule rewrites one node in place. The larger ones have files of their own; the others are:

- `number − integers` is cast first: the exporter promotes no number on the left.
- A pooled mean of everything is a mean. Behind a permute the exporter's own is put into other
  memory by a Gather of every element, through which no row of a batch can be followed.
- Parts along a free dimension are cut one by one. The exporter makes a sequence of them, whose
  length its optimizer takes from the value of a size that it does not have.
- A squeeze of a size that is not 1 leaves the value; ONNX's own fails there.
- A bilinear layer is a linear one of all products of two numbers, which reads the weight as it is
  stored. The exporter's own reads a copy, stored in another order.
- A check that all values are true holds for what runs in torch. ONNX has no checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.graph.nodes import argument, dtype_of, reached, value
from lora_fx.fx.lowering.functional_ops import without_writes
from lora_fx.fx.onnx_export.attention_shapes import rewrite_attention
from lora_fx.fx.onnx_export.complex_pairs import OF_PAIRS, rewrite_complex
from lora_fx.fx.onnx_export.projected_lstm import rewrite_lstm
from lora_fx.fx.onnx_export.quantised_products import rewrite_dequantise
from lora_fx.fx.onnx_export.real_fourier import rewrite_fourier
from lora_fx.fx.onnx_export.strided_views import rewrite_strided_view

aten = torch.ops.aten
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)
POOLED_MEANS = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
SPLITS = (aten.chunk.default, aten.split.Tensor)
MOST_PRODUCTS = 2**14
"""The most products of two numbers that a row of a bilinear layer may make at once."""


def make_portable(graph: fx.Graph) -> None:
    """Rewrite the nodes of an eval graph in place; the graph has to be traced again afterwards."""
    without_writes(graph)
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(graph, node)
    graph.eliminate_dead_code()


def rewrite_rsub(graph: fx.Graph, node: fx.Node) -> None:
    """Cast the tensor of `number − tensor` to the dtype of the result."""
    result = value(node)
    x, *others = node.args
    if isinstance(result, Tensor) and dtype_of(x) not in (None, result.dtype):
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (x, result.dtype))
        cast.meta["val"] = result
        node.args = (cast, *others)


def erase_checks(graph: fx.Graph, node: fx.Node) -> None:
    """Erase the asserts behind a check of values, so that their operands are dead code."""
    dependents = list(reached([node], lambda n: n.users))
    numbers = (bool, int, torch.SymBool, torch.SymInt)
    for dependent in dependents:
        is_end = dependent is node or not dependent.users
        if not is_end and not isinstance(value(dependent), numbers):
            return
    for dependent in dependents:
        if dependent.target is aten._assert_scalar.default:
            graph.erase_node(dependent)


def rewrite_pooled_mean(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a pooled mean with one output per axis by a mean over these axes."""
    output_size = argument(node, "output_size")
    sizes = output_size if isinstance(output_size, (list, tuple)) else [output_size]
    if all(type(size) is int and size == 1 for size in sizes):
        axes = list(range(-len(sizes), 0))
        node.target = aten.mean.dim
        node.args = (node.args[0], axes, True)


def mend_squeeze(graph: fx.Graph, node: fx.Node) -> None:
    """Make a squeeze drop only dimensions of size 1; erase a squeeze without any."""
    x = node.args[0]
    dims: Any = node.args[1]
    if not isinstance(x, fx.Node):
        return
    shape = getattr(value(x), "shape", ())
    if not shape:
        return
    squeezed = dims if isinstance(dims, (list, tuple)) else [dims]
    ones = [dim for dim in squeezed if type(shape[dim]) is int and shape[dim] == 1]
    if len(ones) == len(squeezed):
        return
    if ones:
        node.target = aten.squeeze.dims
        node.args = (x, ones)
    else:
        node.replace_all_uses_with(x)
        graph.erase_node(node)


def rewrite_split(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a split or chunk along a free dimension by slices, one per part."""
    dim = argument(node, "dim")
    parts = value(node)
    if all(isinstance(part.shape[dim], int) for part in parts):
        return
    in_chunks = node.target is aten.chunk.default
    size = argument(node, "chunks" if in_chunks else "split_size")
    node.args = (argument(node, "self"), len(parts), dim, size, in_chunks)
    node.kwargs = {}
    node.target = parts_along


def parts_along(x: Tensor, count: int, dim: int, size: int, in_chunks: bool) -> list[Tensor]:
    """Return the parts of aten.split.Tensor or aten.chunk as slices, for a known number of parts.

    A slice ends where x does; and the last of these parts need not be the last of a longer x.
    """
    length = (x.shape[dim] + size - 1) // size if in_chunks else size
    return [aten.slice.Tensor(x, dim, length * i, length * (i + 1)) for i in range(count)]


def rewrite_bilinear(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a bilinear layer by a linear one, unless its products would take much memory."""
    _, inside, beside = value(argument(node, "weight")).shape
    if inside * beside <= MOST_PRODUCTS:
        node.target = bilinear_as_linear


def bilinear_as_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute aten.bilinear, the sum of weight[o, i, j]·x[…, i]·y[…, j] over i and j."""
    products = x.unsqueeze(-1) * y.unsqueeze(-2)
    return torch.nn.functional.linear(products.flatten(-2), weight.flatten(1), bias)


_REWRITES: dict[object, Callable[[fx.Graph, fx.Node], None]] = {
    DEQUANTISE: rewrite_dequantise,
    aten.lstm.input: rewrite_lstm,
    aten.scaled_dot_product_attention.default: rewrite_attention,
    **dict.fromkeys(POOLED_MEANS, rewrite_pooled_mean),
    aten.real.default: rewrite_fourier,
    **dict.fromkeys(SQUEEZES, mend_squeeze),
    aten.rsub.Scalar: rewrite_rsub,
    aten.as_strided.default: rewrite_strided_view,
    **dict.fromkeys(SPLITS, rewrite_split),
    **dict.fromkeys(OF_PAIRS, rewrite_complex),
    aten.bilinear.default: rewrite_bilinear,
    aten._is_all_true.default: erase_checks,
}
