"""A captured module's eval program through torch's ONNX exporter, as an onnx_ir model."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from lora_fx.errors import LoraFxError, one_line, silenced
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.onnx_names import onnx_name, output_name, symbols_of
from lora_fx.fx.capture.trace import export_program, recurrent_shapes
from lora_fx.fx.codes import DEQUANTISE, LEVELS, bits_of, dequantised
from lora_fx.fx.graph.attention import SHARED
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import argument, dtype_of, hint, random_ops, reached, shape_of, value
from lora_fx.fx.lowering import lowered, program_of, without_writes
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_exporter import table_read_once, translated_once, typed_by_values
from lora_fx.fx.tensors import from_numpy, has_values, named_tensors, to_numpy
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.onnx.constant_folding import mark_data, unfolded
from lora_fx.onnx.names import give_own_names
from lora_fx.onnx.onnxscript_rules import (
    constants_apart,
    exact_constants,
    inferred_once,
    matched_by_operator,
    norms_unfused,
    weights_unjoined,
)
from lora_fx.patching import patched
from lora_fx.progress import stage
from lora_fx.targets.target import Target

OPSET = 20
LEAST = {"torch.onnx": logging.CRITICAL, "onnxscript": logging.ERROR, "onnx_ir": logging.ERROR}
"""Levels of the exporter's loggers; it also prints progress and warns about its own parts."""


def to_onnx(
    module: CapturedModule,
    opset: int = OPSET,
    apart: Mapping[str, Target] | None = None,
    *,
    repeat: bool = True,
) -> Any:
    """The eval program of a module without branches as an onnx_ir.Model, by the model's own names.

    Args:
        module: A module in eval mode.
        opset: The opset of the file.
        apart: Weights that get an initialiser of their own, by its name: what the target's uses
            read, which the exporter would compute from, join, or store once for several uses.
        repeat: Do once what is the same for many nodes; the long way gives the same file.

    Raises:
        LoraFxError: The exporter cannot translate an op; its own words are in the message.
    """
    import onnx_ir as ir

    captured = execution_of(module).captured
    graph = module.graph(False, portable=True)
    captured.allows(False)
    if drawn := random_ops(graph.graph):
        raise LoraFxError(
            f"the model draws random numbers in eval mode, ONNX Runtime others: {', '.join(drawn)}",
            "let forward take the numbers as an input",
        )
    weights = {name: _lifted(graph, t) for name, t in (apart or {}).items()}
    make_portable(graph.graph)
    traced = captured.traced(False, captured.named, execution_of(module).base_dtype)
    flat, names, outputs = flat_program(module, graph.graph, traced, all_outputs=False)
    free = traced.door.free(captured.requested)
    tensors = _representative(module, free)
    dims = (*({d: Dim.AUTO for d in s} or None for s in free.values()), *(None for _ in weights))
    own = {n for n, _ in captured.model.named_parameters(remove_duplicate=False)}
    if execution_of(module).base_dtype is torch.bfloat16:
        own |= set(getattr(module, "unrounded", ()))  # which are still to become float32

    def program() -> ExportedProgram:
        given = (*tensors, *weights.values())
        known = program_of(flat, given, dims) if repeat else None
        return known or export_program(flat, given, dims)

    model = translated(program, [*names, *weights], outputs, own, opset, repeat=repeat)
    mark_data(model, own)
    owner = model.graph
    for place, weight in zip(owner.inputs[len(names) :], weights.values(), strict=True):
        place.const_value = ir.tensor(to_numpy(weight), name=place.name)
        owner.inputs.remove(place)
        owner.register_initializer(place)
    give_own_names(model, named_tensors(captured.model)[0], symbols_of(free))
    return model


def _representative(module: CapturedModule, free: Mapping[str, Collection[int]]) -> list[Tensor]:
    """The tensors whose sizes a program is traced again with: the example's, where they will do.

    The capture knows what is true at those sizes. At smaller ones an inner size, a length after
    strides, may be 1: torch then takes it for one that is repeated, and writes shapes into the file
    that no other length has.
    """
    example = execution_of(module).in_own_dtype()
    tensors = [x for x in tree_leaves(example) if isinstance(x, Tensor)]
    sizes = dict(zip(leaf_names(example), tree_leaves(example), strict=True))
    single = any(sizes[name].shape[d] == 1 for name, dims in free.items() for d in dims)
    if single or not all(map(has_values, tensors)):
        return [x for x in tree_leaves(execution_of(module).sample()) if isinstance(x, Tensor)]
    return tensors


def translated(
    program: Callable[[], ExportedProgram],
    inputs: Sequence[str],
    outputs: Sequence[str],
    own: Collection[str],
    opset: int,
    *,
    repeat: bool = True,
) -> Any:
    """A program as an onnx_ir.Model.

    Args:
        program: Makes it.
        inputs: The names of its inputs.
        outputs: Those of its outputs.
        own: The names of weights, which stay as they are.
        opset: The opset of the file.
        repeat: As in `to_onnx`.

    Raises:
        LoraFxError: The exporter cannot translate an op; its own words are in the message.
    """
    said = silenced(contextlib.redirect_stdout, LEAST)
    quick = repeating() if repeat else contextlib.nullcontext()
    translating = stage("translating to ONNX")
    with translating, said, weights_apart(own), recurrent_shapes(), quick, torch.no_grad():
        try:
            onnx = torch.onnx.export(
                program(),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
        except Exception as e:
            inner: BaseException = e  # the innermost names the operator
            while inner.__cause__ is not None:
                inner = inner.__cause__
            raise LoraFxError(
                f"torch's ONNX exporter refused the model: {one_line(inner, 200)}",
                "-v prints all that it says",
            ) from e
    assert onnx is not None
    return onnx.model


def _lifted(graph: FxGraph, target: Target) -> Tensor:
    """Let the uses of a weight read an input in its place; returns its value."""
    # a copy: an export takes one tensor for one value, wherever it meets it
    weight = from_numpy(graph.read(target.parameter.name).copy())
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(places[-1]):
        place = graph.graph.placeholder(f"weight_{len(places)}")
    for site in target.sites:
        graph.rebase(site, place)
    return weight


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


@contextlib.contextmanager
def weights_apart(weights: Collection[str]) -> Iterator[None]:
    """A block that leaves weights as they are: nothing is computed from them or joined with them.

    The exporter would multiply batch norms into convolutions, compute what reads small weights
    and constants, and store weights once that are equal; adapters of the model would no longer fit
    the file. ONNX Runtime does the same when it loads a file, so nothing is lost. onnxscript has
    no option for norms; where its rules are others, weights are marked as changed
    (names.mark_changed).
    """
    from onnxscript import optimizer

    rule = partial(optimizer.optimize_ir, should_fold=unfolded(weights))
    fold = patched(optimizer, optimize_ir=rule)
    with norms_unfused(), weights_unjoined(weights), fold, exact_constants(), constants_apart():
        yield


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """A block in which the exporter does once, to the same graph, what it would for every node."""
    by_kind = partial(patched, ExportedProgram, run_decompositions=lowered)
    quick = (matched_by_operator, typed_by_values, translated_once, inferred_once)
    with table_read_once(), contextlib.ExitStack() as held:
        for part in (by_kind, *quick):  # what a version lacks goes the long way
            with contextlib.suppress(ImportError, AttributeError):
                held.enter_context(part())
        yield


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

aten = torch.ops.aten

LONGEST = 4096
"""A transform of more points stays one: its table of waves would be too large."""


def make_portable(graph: fx.Graph) -> None:
    """Rewrites the nodes of an eval graph in place; it has to be traced again afterwards."""
    without_writes(graph)
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(graph, node)
    graph.eliminate_dead_code()


def _lstm(graph: fx.Graph, node: fx.Node) -> None:
    each = 5 if argument(node, "has_biases") else 3
    ways = 2 if argument(node, "bidirectional") else 1
    if len(argument(node, "params")) == each * ways * argument(node, "num_layers"):
        node.target = projected_lstm


def projected_lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    *rest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.lstm.input with projections, in eval mode, by LSTMs without: (output, h, c)."""
    _dropout, _train, bidirectional, batch_first = rest
    each, ways = (5 if has_biases else 3), (2 if bidirectional else 1)
    x = x.transpose(0, 1) if batch_first else x
    hs, cs = [], []
    for layer in range(layers):
        outputs = []
        for i in range(layer * ways, (layer + 1) * ways):
            backward = i % ways == 1
            own = params[i * each : (i + 1) * each]
            y, h, c = _one_way(x.flip(0) if backward else x, hx[0][i], hx[1][i], own)
            outputs.append(y.flip(0) if backward else y)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if batch_first else x, torch.cat(hs), torch.cat(cs)


def _one_way(
    x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction; x is [time, batch, in]."""
    w_ih, w_hh, *biases, project = params
    first = (torch.arange(x.shape[0], device=x.device) == 0).to(x.dtype)[:, None, None]
    wide, weight = torch.cat([x, first * h], -1), torch.cat([w_ih, w_hh], 1)
    state = [torch.zeros_like(c)[None], c[None]]
    y, h, c = aten.lstm.input(
        wide, state, [weight, w_hh @ project, *biases], bool(biases), 1, 0.0, False, False, False
    )
    return y @ project.t(), h @ project.t(), c


def _fourier(graph: fx.Graph, node: fx.Node) -> None:
    """real(fft(x)) of a real x and no padding or scale; the transform may be over several axes."""
    of, transforms = node.args[0], (aten.fft_fftn.default, aten.fft_fft.default)
    if not isinstance(of, fx.Node) or of.target not in transforms:
        return
    x, norm, dims = of.args[0], argument(of, "norm"), argument(of, "dim")
    lengths = argument(of, "s") or argument(of, "n")
    given = value(x)
    if lengths or norm not in (None, "backward") or not isinstance(given, Tensor):
        return
    axes = list(range(given.dim())) if dims is None else [dims] if isinstance(dims, int) else dims
    short = all(hint(given.shape[d]) <= LONGEST for d in axes)
    if given.dtype.is_floating_point and short:
        node.target, node.args = real_fourier, (x, axes)


def real_fourier(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The real part of the discrete Fourier transform of a real x over some axes."""
    real, imaginary = x, None
    for d in dims:
        cos, sin = _waves(x, d)
        a, b = real.transpose(d, -1), None if imaginary is None else imaginary.transpose(d, -1)
        turned = a @ cos if b is None else a @ cos + b @ sin
        other = -(a @ sin) if b is None else b @ cos - a @ sin
        real, imaginary = turned.transpose(d, -1), other.transpose(d, -1)
    return real


def _waves(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2π·jk/n, their phases within half a turn, where floats are finest."""
    k = torch.arange(x.shape[d], device=x.device)
    n = torch.full((), x.shape[d], device=x.device)  # the exporter takes no symbol in % and >
    turns = torch.outer(k, k) % n
    turns = torch.where(2 * turns > n, turns - n, turns)
    phase = turns.to(x.dtype) * (2 * math.pi) / n
    return phase.cos(), phase.sin()


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


def _attention(graph: fx.Graph, node: fx.Node) -> None:
    """The exporter wants four dimensions, and heads that keys and values share alike."""
    query, key, values = (shape_of(x) for x in node.args[:3])
    if query is None or key is None or values is None:
        return
    shares = argument(node, SHARED, False)
    if shares and not (query[-3] != key[-3] == values[-3]):
        node.target = attention_of_unlike_heads
    elif len(query) < 4:
        node.target = attention_in_four


def _by_strides(graph: fx.Graph, node: fx.Node) -> None:
    """A view of storage that is dense, though not in the order of its dimensions."""
    x = node.args[0]
    stored = value(x) if isinstance(x, fx.Node) else None
    if not isinstance(stored, Tensor) or stored.layout != torch.strided:
        return
    sizes = [hint(n) for n in stored.shape]
    strides = [hint(n) for n in stored.stride()]
    order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] != 1 else 0)
    dense = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != dense:
            return  # a view with gaps, or of numbers that are read twice
        dense *= sizes[d]
    start = stored.storage_offset()
    offset = argument(node, "storage_offset")
    if offset is not None and not (isinstance(offset, int) and isinstance(start, int)):
        return  # free sizes before the view
    first = 0 if offset is None else offset - start
    if order != sorted(order) or (offset is not None and start):
        size, stride = (argument(node, name) for name in ("size", "stride"))
        node.target, node.args, node.kwargs = in_storage, (x, order, size, stride, first), {}


def in_storage(
    x: Tensor, order: Sequence[int], size: Sequence[int], stride: Sequence[int], first: int
) -> Tensor:
    """A view by strides of a tensor whose dimensions lie in this order in its storage."""
    stored: Tensor = x.permute(*order).clone(memory_format=torch.contiguous_format)
    return torch.as_strided(stored, list(size), list(stride), first)


def _mean(graph: fx.Graph, node: fx.Node) -> None:
    sizes = argument(node, "output_size")
    wanted = sizes if isinstance(sizes, (list, tuple)) else [sizes]
    if all(type(n) is int and n == 1 for n in wanted):
        axes = [*range(-len(wanted), 0)]
        node.target, node.args = aten.mean.dim, (node.args[0], axes, True)


def attention_in_four(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Attention [n, d] or [batch, n, d] with the dimensions in front that the exporter wants."""
    missing = 4 - q.dim()
    q, k, v = (t[(None,) * missing] for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, *rest, **named)
    return y[(0,) * missing]


def attention_of_unlike_heads(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, enable_gqa: bool, **named: Any
) -> Tensor:
    """Attention whose heads of keys and of values are repeated, each as often as it has to be."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    return attention_in_four(q, k, v, *rest, **named)


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


def _of_pairs(op: Any) -> Callable[..., Tensor]:
    """unsqueeze, select or expand of the pairs that a complex tensor is."""

    def of_pairs(x: Tensor, where: Any, *rest: object) -> Tensor:
        where = (where if where >= 0 else where - 1) if isinstance(where, int) else [*where, 2]
        return torch.view_as_complex(op(torch.view_as_real(x), where, *rest))

    return of_pairs


OF_PAIRS: dict[object, Callable[..., Tensor]] = {
    op: _of_pairs(op) for op in (aten.unsqueeze.default, aten.select.int, aten.expand.default)
}


def _complex(graph: fx.Graph, node: fx.Node) -> None:
    """The exporter has complex numbers as pairs, and lacks these ops of them."""
    made = value(node)
    if isinstance(made, Tensor) and made.is_complex():
        node.target = OF_PAIRS[node.target]


PRODUCTS: dict[object, tuple[int, int, int | None, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.matmul.default: (0, 1, None, True),
    aten.mm.default: (0, 1, None, True),
    aten.addmm.default: (1, 2, 0, True),
}
"""Product → the places of x, of W and of the bias, and whether it reads W [in, out]."""
OTHERS = ("fp8", "torchao_nf4", "ocp_fp4")
"""Formats that ONNX Runtime has no product for."""
TURNS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.mT.default}


def _dequantise(graph: fx.Graph, node: fx.Node) -> None:
    """Let every product of a quantised matrix be one of the runtime, and the rest read numbers."""
    args: Any = node.args
    codes, scale, zero, order, shape, kind, block, turned, _ = args
    node.target = dequantised
    if kind in OTHERS or len(shape) != 2 or block < 16 or block & (block - 1) or order is not None:
        return
    views = [u for u in node.users if u.target in TURNS]
    for weight, flipped in ((node, turned), *((v, not turned) for v in views)):
        for user in [u for u in weight.users if u.target in PRODUCTS]:
            x, w, b, wants = PRODUCTS[user.target]
            fits = wants is flipped and user.args[w] is weight
            scaled = float(argument(user, "alpha", 1)) * float(argument(user, "beta", 1)) != 1.0
            if not fits or user.args[x] is weight or (b == 0 and scaled):
                continue
            sizes = tuple(shape[::-1] if turned else shape)
            bias = user.args[b] if b is not None and b < len(user.args) else None
            user.target, user.kwargs = product_of_codes, {}
            user.args = (user.args[x], codes, scale, zero, sizes, kind, block, bias)


def product_of_codes(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    sizes: tuple[int, int],
    kind: str,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """x·Wᵀ + bias by an operator of ONNX Runtime, in float32, for codes of W [out, in]."""
    out, inner = sizes
    named: dict[str, Any] = {"K": inner, "N": out, "block_size": block}
    if kind in LEVELS:
        op, more = "MatMulBnb4", {"quant_type": int(kind == "nf4")}
    else:
        op, more = "MatMulNBits", {"bits": bits_of(kind), "accuracy_level": 0}
    given = (x.float(), codes, scale)
    y: Tensor = torch.onnx.ops.symbolic(
        f"com.microsoft::{op}",
        given if zero is None else (*given, zero),
        attrs=named | more,
        dtype=torch.float32,
        shape=(*x.shape[:-1], out),
        version=1,
    )
    return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias


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
