"""A captured module's eval program through torch's ONNX exporter, as an onnx_ir model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.calling import leaf_names, onnx_name, output_name
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.portable import make_portable

OPSET = 20


@dataclass(frozen=True)
class OnnxProgram:
    """What the exporter made: an onnx_ir.Model, and the names that we own.

    `symbols` maps (input, dimension) to the name that the dimension shall have in the file.
    """

    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    symbols: dict[tuple[str, int], str]


def to_onnx(module: CapturedModule, opset: int = OPSET) -> OnnxProgram:
    """Translate the eval program of a module without branches.

    Raises:
        LoraFxError: The exporter cannot translate an op; its own words are in the message.
    """
    captured = module.captured
    graph = module.graph(False, portable=True)
    make_portable(graph.graph)
    flat, names, outputs = flat_program(module, graph.graph)
    named = module.sample()
    leaves = pytree.tree_leaves(named)
    traced = captured.traced(False, captured.named, module.base_dtype)
    keep = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    shapes, symbols = [], {}
    for i in keep:
        fixed = traced.door.sizes[i] or ()
        wanted = captured.requested.get(traced.door.names[i], {})
        free = {d: s for d, s in wanted.items() if fixed[d] is None}
        shapes.append({d: Dim.AUTO for d in free} or None)
        symbols.update({(traced.door.names[i], d): s for d, s in free.items()})
    with _quiet(), norms_apart(), torch.no_grad():
        try:
            program = torch.export.export(
                flat,
                tuple(leaves[i] for i in keep),
                dynamic_shapes=tuple(shapes),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                verbose=False,
            )
        except Exception as e:
            raise LoraFxError(
                f"torch's ONNX exporter refused the model: {one_line(e, 200)}",
                "a Hugging Face model may need attn_implementation='eager' (-v prints all)",
            ) from e
    assert onnx is not None
    return OnnxProgram(onnx.model, tuple(names), tuple(outputs), symbols)


def flat_program(
    module: CapturedModule, graph: fx.Graph, *, all_outputs: bool = False
) -> tuple[fx.GraphModule, list[str], list[str]]:
    """A GraphModule of tensors only: constants of the call left out, outputs named.

    Args:
        all_outputs: Keep the outputs that are no tensors.
    """
    traced = module.captured.traced(False, module.captured.named, module.base_dtype)
    leaves = pytree.tree_leaves(module.captured.named)
    names = []
    places = [n for n in graph.nodes if n.op == "placeholder"]
    for place, name, leaf in zip(places, traced.door.names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            names.append(onnx_name(name))
        else:
            place.replace_all_uses_with(leaf)  # a Python constant of the capture
            graph.erase_node(place)
    out = next(n for n in graph.nodes if n.op == "output")
    values = list(pytree.tree_leaves(out.args[0]))
    paths = output_paths(traced.out_spec, len(values))
    kept, outputs = [], []
    for i, (value, path) in enumerate(zip(values, paths, strict=True)):
        is_tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
        if all_outputs or is_tensor:
            kept.append(value)
            outputs.append(output_name(path, i))
    out.args = (tuple(kept),)
    graph.set_codegen(fx.graph.CodeGen())
    flat = fx.GraphModule(module, graph)
    return flat, names, outputs


def output_paths(spec: Any, count: int) -> list[str]:
    """The dotted paths of an output's leaves."""
    dummy = pytree.tree_unflatten(list(range(count)), spec)
    if isinstance(dummy, int):
        return [""]
    return leaf_names({"": dummy})


@contextlib.contextmanager
def norms_apart() -> Iterator[None]:
    """Batch norms stay nodes of their own, so that convolutions keep the parameters' values.

    The exporter would multiply them in, and adapters of the model would no longer fit the file.
    ONNX Runtime does the same when it loads a file, so nothing is lost. onnxscript has no option
    for it; where its list of rules is another, weights are marked as changed (names.mark_changed).
    """
    from onnxscript import rewriter

    name = "_DEFAULT_REWRITE_RULES"
    rules = getattr(rewriter, name, ())
    kept = tuple(r for r in rules if "batchnorm" not in type(r).__name__.lower()
                 and "batchnorm" not in str(getattr(r, "name", "")).lower())  # fmt: skip
    if not kept:
        yield
        return
    setattr(rewriter, name, kept)
    try:
        yield
    finally:
        setattr(rewriter, name, rules)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own parts."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    others = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir")]
    levels = [o.level for o in others]
    for o in others:
        o.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for o, was in zip(others, levels, strict=True):
            o.setLevel(was)
