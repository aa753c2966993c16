"""Ops that torch's ONNX exporter lacks, or that ONNX Runtime computes badly, by others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.graph.nodes import argument, dtype_of, reached, value
from lora_fx.fx.lowering.functional_ops import without_writes
from lora_fx.fx.onnx_export.attention_shapes import _attention
from lora_fx.fx.onnx_export.complex_pairs import OF_PAIRS, _complex
from lora_fx.fx.onnx_export.projected_lstm import _lstm
from lora_fx.fx.onnx_export.quantised_products import _dequantise
from lora_fx.fx.onnx_export.real_fourier import _fourier
from lora_fx.fx.onnx_export.strided_views import _by_strides

aten = torch.ops.aten

# Ops that torch's ONNX exporter lacks, or that ONNX Runtime computes badly, by others, exactly.
#
# - A projected LSTM, h = P·(o⊙tanh c), is a plain one whose recurrent weight is W_hh·P, with P
#   after it: gates = W_ih·x + W_hh·h = W_ih·x + (W_hh·P)·(o⊙tanh c). A first state h₀ enters as
#   further inputs of the first step, weighed by W_hh. The exporter writes an LSTM of wrong shapes
#   instead.
# - The real part of a Fourier transform is products with cosines and sines. ONNX Runtime's DFT
#   rounds ten times worse than torch's (2e-6 on FNet) and has no CUDA kernel.
# - `number − integers` is cast first: the exporter promotes no number on the left.
# - Attention without a dimension for heads gets one: the exporter takes four dimensions only.
# - A pooled mean of everything is a mean. Behind a permute the exporter's own is put into other
#   memory by a Gather of every element, through which no row of a batch can be followed.
# - Parts along a free dimension are cut one by one. The exporter makes a sequence of them, whose
#   length its optimizer takes from the value of a size that it does not have.
# - Complex numbers lose or gain dimensions as pairs: see OF_PAIRS.
# - A view by strides is one of the storage, which the exporter takes to be in the order of the
#   dimensions: of a transposed tensor it reads other numbers. Its dimensions are put into the order
#   of the storage first.
# - A check that all values are true holds for what runs in torch. ONNX has no checks.
# - A product with a quantised weight is ONNX Runtime's own, over the same bytes: MatMulNBits, or
#   MatMulBnb4 for codes that are places of a table. Any other reader gets numbers by plain ops.


def make_portable(graph: fx.Graph) -> None:
    """Rewrites the nodes of an eval graph in place; it has to be traced again afterwards."""
    without_writes(graph)
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(graph, node)
    graph.eliminate_dead_code()


def _rsub(graph: fx.Graph, node: fx.Node) -> None:
    made, (x, *rest) = value(node), node.args
    if isinstance(made, Tensor) and dtype_of(x) not in (None, made.dtype):
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (x, made.dtype))
        cast.meta["val"] = made
        node.args = (cast, *rest)


def _all_true(graph: fx.Graph, node: fx.Node) -> None:
    """Erases the asserts that a check of values leads to; what they read is then dead."""
    seen = list(reached([node], lambda n: n.users))
    symbolic = (bool, int, torch.SymBool, torch.SymInt)
    if all(n is node or not n.users or isinstance(value(n), symbolic) for n in seen):
        for n in seen:
            if n.target is aten._assert_scalar.default:
                graph.erase_node(n)


def _mean(graph: fx.Graph, node: fx.Node) -> None:
    sizes = argument(node, "output_size")
    wanted = sizes if isinstance(sizes, (list, tuple)) else [sizes]
    if all(type(n) is int and n == 1 for n in wanted):
        axes = [*range(-len(wanted), 0)]
        node.target, node.args = aten.mean.dim, (node.args[0], axes, True)


def mend_squeeze(graph: fx.Graph, node: fx.Node) -> None:
    """A squeeze of a size that is not 1 leaves the value; ONNX's own fails there."""
    x, dims = node.args[0], node.args[1]
    shape = getattr(value(x), "shape", ()) if isinstance(x, fx.Node) else ()
    wanted: Any = dims if isinstance(dims, (list, tuple)) else [dims]
    kept = [d for d in wanted if shape and type(shape[d]) is int and shape[d] == 1]
    if not isinstance(x, fx.Node) or not shape or len(kept) == len(wanted):
        return
    if kept:
        node.target, node.args = aten.squeeze.dims, (x, kept)
    else:
        node.replace_all_uses_with(x)
        graph.erase_node(node)


SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)


def _parts(graph: fx.Graph, node: fx.Node) -> None:
    dim, parts = argument(node, "dim"), value(node)
    if all(isinstance(part.shape[dim], int) for part in parts):
        return
    in_chunks = node.target is aten.chunk.default
    size = argument(node, "chunks" if in_chunks else "split_size")
    node.args, node.kwargs = (argument(node, "self"), len(parts), dim, size, in_chunks), {}
    node.target = parts_along


def parts_along(x: Tensor, count: int, dim: int, size: int, in_chunks: bool) -> list[Tensor]:
    """The parts of aten.split.Tensor, or of aten.chunk, whose number is known, as slices.

    A slice ends where x does; and the last of these parts need not be the last of a longer x.
    """
    each = (x.shape[dim] + size - 1) // size if in_chunks else size
    return [aten.slice.Tensor(x, dim, each * i, each * (i + 1)) for i in range(count)]


_REWRITES: dict[object, Callable[[fx.Graph, fx.Node], None]] = {
    DEQUANTISE: _dequantise,
    aten.lstm.input: _lstm,
    aten.scaled_dot_product_attention.default: _attention,
    **{getattr(aten, f"adaptive_avg_pool{d}d").default: _mean for d in (1, 2, 3)},
    aten.real.default: _fourier,
    **dict.fromkeys(SQUEEZES, mend_squeeze),
    aten.rsub.Scalar: _rsub,
    aten.as_strided.default: _by_strides,
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor), _parts),
    **dict.fromkeys(OF_PAIRS, _complex),
    aten._is_all_true.default: _all_true,
}
