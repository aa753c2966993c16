"""One torch.export of a source, cleaned into a flat graph over the skeleton's names."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lora_fx.fx.asserts import (
    Pinned,
    Requested,
    door_asserts,
    single_sizes,
    upper_bounds,
    who_pinned,
)
from lora_fx.fx.calling import Door, Signature, apart, leaf_names
from lora_fx.fx.inline import inline_regions

aten = torch.ops.aten


@dataclass
class Traced:
    """A cleaned graph: placeholders are the leaves, outputs are flat."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    door: Door
    out_spec: Any
    pinned: list[Pinned] = field(default_factory=list)
    lone: list[tuple[int, int]] = field(default_factory=list)
    ranges: dict[tuple[int, int], int] = field(default_factory=dict)
    bodies: dict[str, fx.GraphModule] = field(default_factory=dict)


def trace(
    source: nn.Module,
    signature: Signature,
    forward: Any,
    named: Mapping[str, Any],
    requested: Requested,
) -> Traced:
    """Export `forward` on `named` inputs and clean the graph.

    A dynamic dimension of size 1 is tried at 2, and fixed where the model does not take that.
    """
    try:
        return _trace(source, signature, forward, named, requested)
    except Exception:
        leaves = dict(zip(leaf_names(named), pytree.tree_leaves(dict(named)), strict=True))
        lone = [
            (n, d)
            for n, dims in requested.items()
            for d in dims
            if isinstance(x := leaves.get(n), torch.Tensor) and d < x.dim() and x.shape[d] == 1
        ]
        if not lone:
            raise
        fewer = {
            n: {d: s for d, s in dims.items() if (n, d) not in lone}
            for n, dims in requested.items()
        }
        traced = _trace(source, signature, forward, named, fewer)
        where = "the model: it does not run at size 2"
        traced.pinned = [*traced.pinned, *(Pinned(n, d, 1, where) for n, d in lone)]
        return traced


def _trace(
    source: nn.Module,
    signature: Signature,
    forward: Any,
    named: Mapping[str, Any],
    requested: Requested,
) -> Traced:
    """Capture goes through one dict argument: torch 2.13 cannot name shapes inside **kwargs."""
    leaves, spec = pytree.tree_flatten(dict(named))
    names = leaf_names(named)
    leaves = [
        _at_least_two(x, requested.get(n, {})) if isinstance(x, torch.Tensor) else x
        for x, n in zip(leaves, names, strict=True)
    ]
    leaves = apart(leaves)
    named = pytree.tree_unflatten(leaves, spec)
    shapes = pytree.tree_unflatten(
        [
            {d: Dim.AUTO for d in requested.get(n, {})} or None
            if isinstance(x, torch.Tensor)
            else None
            for x, n in zip(leaves, names, strict=True)
        ],
        spec,
    )
    entry = _Entry(source, signature, forward)
    with _quiet(), _free_batch():
        program = torch.export.export(
            entry,
            (named,),
            dynamic_shapes=(shapes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        module = program.module(check_guards=False)
    return _clean(module, program, names, leaves, requested)


class _Entry(nn.Module):
    """forward(named) → the original call; the source's tensors keep their names."""

    def __init__(self, source: nn.Module, signature: Signature, forward: Any) -> None:
        super().__init__()
        self.__dict__["_parameters"] = source._parameters
        self.__dict__["_buffers"] = source._buffers
        self.__dict__["_modules"] = source._modules
        self.__dict__["_non_persistent_buffers_set"] = source._non_persistent_buffers_set
        self.training = source.training
        self._call = (signature, forward)

    def forward(self, named: dict[str, Any]) -> Any:
        signature, forward = self._call
        return signature.call(forward, named)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:  # a failing capture prints its partial graph
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _free_batch() -> Any:
    """A sample with batch 1 gives a free dimension; the setting is private to torch."""
    try:
        from torch.fx.experimental import _config

        return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


def _at_least_two(x: torch.Tensor, dims: Mapping[int, str]) -> torch.Tensor:
    """A dynamic dimension of size 1 is sampled again at 2."""
    for d in dims:
        if d < x.dim() and x.shape[d] == 1:
            x = torch.cat([x, x], d)
    return x


def _clean(
    module: fx.GraphModule,
    program: Any,
    names: Sequence[str],
    leaves: Sequence[Any],
    requested: Requested,
) -> Traced:
    graph = module.graph
    inline_regions(module, graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # these bake dtype and device
    places = [n for n in graph.nodes if n.op == "placeholder"]
    sizes = [
        list(p.meta["val"].shape) if isinstance(p.meta.get("val"), torch.Tensor) else None
        for p in places
    ]
    pinned, same, lone = door_asserts(graph, places, sizes, names, requested)
    for (i, d), n in single_sizes(program, sizes).items():
        sizes[i][d] = n  # type: ignore[index]
    fixed = tuple(
        None if s is None else tuple(n if isinstance(n, int) else None for n in s) for s in sizes
    )
    for i, (name, s) in enumerate(zip(names, fixed, strict=True)):
        for d in requested.get(name, {}):
            known = any(p.input == name and p.dim == d for p in pinned)
            if s is not None and d < len(s) and s[d] is not None and not known:
                pinned.append(Pinned(name, d, int(s[d] or 0), who_pinned(program, places[i], d)))
    constants, bodies = _constants(module, graph)
    graph.eliminate_dead_code(lambda n: n.op in ("output", "placeholder") or n.is_impure())
    _follow_device(graph)
    graph.set_codegen(fx.graph.CodeGen())  # leaves in, leaves out
    out_spec = program.call_spec.out_spec
    ranges = upper_bounds(program, sizes)
    door = Door(tuple(names), fixed, same)
    return Traced(graph, constants, door, out_spec, pinned, lone, ranges, bodies)


def _constants(
    module: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, torch.Tensor], dict[str, fx.GraphModule]]:
    """Tensors that are no parameter or buffer of the model, and bodies of higher-order ops."""
    known = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
    result: dict[str, torch.Tensor] = {}
    bodies: dict[str, fx.GraphModule] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            result[str(node.target)] = value
        elif isinstance(value, fx.GraphModule):
            bodies[str(node.target)] = value
    return result, bodies


def _follow_device(graph: fx.Graph) -> None:
    """Every device literal becomes the device of the first tensor input."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    first = next((n for n in places if isinstance(n.meta.get("val"), torch.Tensor)), None)
    uses = []

    def look(arg: Any) -> Any:
        if isinstance(arg, torch.device):
            uses.append(arg)
        return arg

    for n in graph.nodes:
        map_aggregate((n.args, n.kwargs), look)
    if first is None or not uses:
        return
    with graph.inserting_after(places[-1]):
        device = graph.call_function(getattr, (first, "device"))
    for n in graph.nodes:
        if n is not device:
            n.args = map_aggregate(n.args, lambda a: device if isinstance(a, torch.device) else a)
            n.kwargs = map_aggregate(
                n.kwargs, lambda a: device if isinstance(a, torch.device) else a
            )
