"""One torch.export of a source, cleaned into a flat graph over the skeleton's names."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lora_fx.fx.calling import Door, Signature, leaf_names

aten = torch.ops.aten


@dataclass(frozen=True)
class Pinned:
    """A dimension that was asked to be dynamic and that the model fixed."""

    input: str
    dim: int
    size: int
    op: str

    def to_json(self) -> dict[str, Any]:
        """One row of `pinned[]`."""
        return {"input": self.input, "dim": self.dim, "size": self.size, "op": self.op}

    def __str__(self) -> str:
        """For tables."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"


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


Requested = Mapping[str, Mapping[int, str]]
"""Leaf name → {dimension: symbol name}: what should be dynamic."""


def trace(
    source: nn.Module,
    signature: Signature,
    forward: Any,
    named: Mapping[str, Any],
    requested: Requested,
) -> Traced:
    """Export `forward` on `named` inputs and clean the graph.

    Capture goes through one dict argument: torch 2.13 cannot name shapes inside **kwargs.
    """
    leaves, spec = pytree.tree_flatten(dict(named))
    names = leaf_names(named)
    leaves = [
        _at_least_two(x, requested.get(n, {})) if isinstance(x, torch.Tensor) else x
        for x, n in zip(leaves, names, strict=True)
    ]
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    pinned, same, lone = _asserts(graph, places, sizes, names, requested)
    fixed = tuple(
        None if s is None else tuple(n if isinstance(n, int) else None for n in s) for s in sizes
    )
    for i, (name, s) in enumerate(zip(names, fixed, strict=True)):
        for d in requested.get(name, {}):
            known = any(p.input == name and p.dim == d for p in pinned)
            if s is not None and d < len(s) and s[d] is not None and not known:
                pinned.append(Pinned(name, d, int(s[d] or 0), _who(program, places[i], d)))
    constants = _constants(module, graph)
    graph.eliminate_dead_code(lambda n: n.op in ("output", "placeholder") or n.is_impure())
    _follow_device(graph)
    graph.set_codegen(fx.graph.CodeGen())  # leaves in, leaves out
    out_spec = program.call_spec.out_spec
    ranges = _upper(program, sizes)
    return Traced(graph, constants, Door(tuple(names), fixed, same), out_spec, pinned, lone, ranges)


def _size_of(node: Any, places: Sequence[fx.Node]) -> tuple[int, int] | None:
    """(leaf, dim) when a node is the size of an input."""
    if isinstance(node, fx.Node) and node.target is aten.sym_size.int and node.args[0] in places:
        return places.index(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    return None


def _asserts(
    graph: fx.Graph,
    places: Sequence[fx.Node],
    sizes: list[Any],
    names: Sequence[str],
    requested: Requested,
) -> tuple[list[Pinned], Any, list[tuple[int, int]]]:
    """Turn asserts on input sizes into checks at the door; leave the rest in the graph."""
    pinned: list[Pinned] = []
    same: list[Any] = []
    lone: list[tuple[int, int]] = []
    for node in list(graph.nodes):
        if node.target is not aten._assert_scalar.default:
            continue
        test = node.args[0]
        negated = isinstance(test, fx.Node) and test.target is torch.sym_not
        if negated:
            test = test.args[0]
        if not isinstance(test, fx.Node) or len(test.args) != 2:
            continue
        left, right = (_size_of(a, places) for a in test.args)
        number = next((a for a in test.args if isinstance(a, int)), None)
        one = left or right
        if (test.target is operator.ne) != negated and test.target in (operator.eq, operator.ne):
            if not (one and number == 1):
                continue
            lone.append(one)
        elif negated:
            continue
        elif test.target is operator.eq and left and right:
            same.append((left, right))
        elif test.target is operator.eq and one and number is not None:
            leaf, dim = one
            sizes[leaf][dim] = number
            if dim in requested.get(names[leaf], {}):
                pinned.append(Pinned(names[leaf], dim, number, _line(node)))
        elif test.target in (operator.ge, operator.le) and one and number in (0, 1):
            pass
        else:
            continue
        graph.erase_node(node)
    return pinned, tuple(same), lone


def _line(node: fx.Node) -> str:
    """The user's source line that a node came from, else the op's name."""
    trace_text = str(node.meta.get("stack_trace") or "").strip().splitlines()
    for line in reversed(trace_text):
        if line.strip().startswith("File "):
            return line.strip().removeprefix("File ").replace('"', "")
    return "the model's arithmetic"


def _who(program: Any, place: fx.Node, dim: int) -> str:
    """Where the shape environment recorded the guard that fixed a dimension."""
    mode = getattr(place.meta.get("val"), "fake_mode", None)
    env = getattr(mode, "shape_env", None)
    for guard in getattr(env, "guards", None) or []:
        stack = getattr(getattr(guard, "sloc", None), "user_stack", None)
        text = str(guard.expr)
        if stack and text.startswith("Eq(") and text.endswith(f" {place.meta['val'].shape[dim]})"):
            frame = stack[-1]
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return "the model's arithmetic"


def _upper(program: Any, sizes: Sequence[Any]) -> dict[tuple[int, int], int]:
    """Upper bounds that the export found for input dimensions."""
    result = {}
    for i, shape in enumerate(sizes):
        for d, n in enumerate(shape or ()):
            if isinstance(n, torch.SymInt):
                bound = program.range_constraints.get(n.node.expr)
                try:
                    result[i, d] = int(bound.upper)
                except (AttributeError, OverflowError, TypeError, ValueError):
                    continue
    return result


def _constants(module: fx.GraphModule, graph: fx.Graph) -> dict[str, torch.Tensor]:
    """Tensors that the graph reads and that are no parameter or buffer of the model."""
    known = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
    result: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            result[str(node.target)] = value
    return result


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
