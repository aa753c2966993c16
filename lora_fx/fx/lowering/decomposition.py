"""Lowering: what one node holds as nodes of its own, for passes and in an exporter's operators.

Of a program for an exporter one node of every kind is decomposed. torch.export decomposes by
running the whole program again with symbolic sizes, which is most of what an export costs. Layers
are one block many times: nodes of one operator that read the same shapes, dtypes and constants come
apart alike. So a program of one node a kind is decomposed, and what became of each stands in for
all of its kind.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.graph.nodes import hint, reached, replace_parts, value
from lora_fx.fx.lowering.node_arguments import _reads, _valued, _with
from lora_fx.fx.lowering.program_signature import _sign, signed
from lora_fx.fx.operators import OpOverload, decomposes_unasked
from lora_fx.fx.trees import tree_leaves
from lora_fx.text import by_key

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]
"""Operator → what it is made of; what is not in it stays."""
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
CHECKS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
}
"""Nodes without a value, which no exporter translates."""


_whole: Callable[[ExportedProgram, Table], ExportedProgram] = ExportedProgram.run_decompositions


def lowered(program: ExportedProgram, table: Table) -> ExportedProgram:
    """The program as `program.run_decompositions(table)` makes it; edited where that is enough.

    A program that writes in place, has bodies of its own, or sizes that depend on values is
    decomposed as a whole.
    """
    if any(node.op == "get_attr" or not _alone(node) for node in program.graph.nodes):
        return _whole(program, table)
    apart = (node for node in program.graph.nodes if _comes_apart(node, table))
    kinds = by_key(((n.target, _known((n.args, n.kwargs))), n) for n in apart)
    if kinds:
        parts = _parts([nodes[0] for nodes in kinds.values()], program, table)
        if not all(_sizes_known(part, program.graph) for part in parts):
            return _whole(program, table)
        of = {n: part for nodes, part in zip(kinds.values(), parts, strict=True) for n in nodes}
        _replace(program.graph, of)
        _sign(program)
    return program


def _alone(node: fx.Node) -> bool:
    """Whether what a node gives depends on nothing but what it reads."""
    if node.op != "call_function" or node.target in CHECKS:
        return True
    target: Any = node.target
    number = isinstance(value(node), (*NUMBERS, int))
    if not isinstance(target, OpOverload):  # a body, or code of ours that has to be traced
        return target in (getattr, operator.getitem) or number
    if number:  # sym_numel and sym_stride are made of sizes by a run
        return target is aten.sym_size.int
    sizes = [v for v in map(value, node.all_input_nodes) if isinstance(v, NUMBERS)]
    known = all(isinstance(v, torch.SymInt) and v.node.hint and hint(v) > 0 for v in sizes)
    several = isinstance(value(node), (list, tuple))
    picked = not several or all(u.target is operator.getitem for u in node.users)
    pure = not target._schema.is_mutable and not node.meta.get("unbacked_bindings")
    return known and picked and pure


def _comes_apart(node: fx.Node, table: Table) -> bool:
    target: Any = node.target
    if not isinstance(target, OpOverload) or target in CHECKS or isinstance(value(node), NUMBERS):
        return False
    return target in table or decomposes_unasked(target)


def _known(x: object) -> Hashable:
    """What a decomposition can see of an argument."""
    if isinstance(x, fx.Node):
        return "node", _known(value(x))
    if isinstance(x, torch.Tensor):
        strides = tuple(map(str, x.stride())) if x.layout is torch.strided else ()
        return x.dtype, x.device, tuple(map(str, x.shape)), strides
    if isinstance(x, NUMBERS):
        return "number", str(x.node.expr)
    if isinstance(x, Mapping):
        return tuple((k, _known(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(map(_known, x))
    return type(x), repr(x)


@dataclass(frozen=True)
class _Part:
    """What a node becomes: its inputs, the nodes between them and its values, and its values."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def _parts(nodes: Sequence[fx.Node], program: ExportedProgram, table: Table) -> list[_Part]:
    """Decompose one program that has these nodes side by side, each with inputs of its own."""
    graph, ends = fx.Graph(), list[fx.Node]()
    reads = [_reads(n) for n in nodes]
    fakes = detect_fake_mode([value(n) for n in program.graph.nodes]) or contextlib.nullcontext()
    places = [[graph.placeholder(f"x{i}_{j}") for j, _ in enumerate(of)]
              for i, of in enumerate(reads)]  # fmt: skip
    for node, of, starts in zip(nodes, reads, places, strict=True):
        with fakes:
            given = iter([_start(graph, p, value(x)) for p, x in zip(starts, of, strict=True)])
        made = _valued(graph, value(node), node.target, *_with(node, given))
        ends += _values(graph, made)
    graph.output(tuple(ends))
    whole = signed(graph, [p for starts in places for p in starts], {})
    done = _whole(whole, table).graph
    inputs, outputs = iter(done.find_nodes(op="placeholder")), iter(done.output_node().args[0])
    parts = []
    for node, of in zip(nodes, reads, strict=True):
        begin = tuple(islice(inputs, len(of)))
        end = tuple(islice(outputs, len(tree_leaves(value(node)))))
        parts.append(_Part(begin, _between(done, begin, end), end))
    return parts


def _start(graph: fx.Graph, place: fx.Node, val: Any) -> Any:
    """An input, as a node reads it; a number is the size of a tensor made for it."""
    if isinstance(val, torch.Tensor):
        place.meta["val"] = val
        return place
    place.meta["val"] = torch.empty(val)
    return _valued(graph, val, aten.sym_size.int, (place, 0))


def _values(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The tensors that a node gives, each as a node."""
    val = value(node)
    if isinstance(val, torch.Tensor):
        return [node]
    return [_valued(graph, part, operator.getitem, (node, i)) for i, part in enumerate(val)]


def _between(
    graph: fx.Graph, begin: Sequence[fx.Node], end: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """The nodes from inputs to values, in order; sizes are found by what they are."""

    def inside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if n not in begin and not isinstance(value(n), NUMBERS)]

    wanted = set(reached(inside(end), lambda n: inside(n.all_input_nodes)))
    return tuple(n for n in graph.nodes if n in wanted)


def _replace(graph: fx.Graph, parts: Mapping[fx.Node, _Part]) -> None:
    """Put the part of every node into its place."""
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        part = parts.get(node)
        if part is None or [n.target for n in part.nodes] == [node.target]:
            if isinstance(value(node), NUMBERS):
                sizes.setdefault(str(value(node).node.expr), node)
            continue
        made = dict(zip(part.inputs, _reads(node), strict=True))
        with graph.inserting_before(node):
            for new in part.nodes:
                of = (_of(graph, x, made, sizes) for x in _reads(new))
                args, kwargs = _with(new, of)
                made[new] = graph.call_function(new.target, args, kwargs)  # type: ignore[arg-type]
                made[new].meta = {**node.meta, **new.meta}
        ends = [made[n] for n in part.outputs]
        if isinstance(value(node), torch.Tensor):
            node.replace_all_uses_with(ends[0])
        replace_parts(node, ends)


def _of(
    graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, fx.Node], sizes: dict[str, fx.Node]
) -> Any:
    """What stands for a node of a part; a size is computed once for all parts."""
    if node in made:
        return made[node]
    number = value(node)
    name = str(number.node.expr)
    if name not in sizes:
        # a size may be read of another part's input, which is not here
        if place := _places([*made.values(), *graph.find_nodes(op="placeholder")]).get(name):
            call = aten.sym_size.int, place
        else:
            read = (_of(graph, x, made, sizes) for x in _reads(node))
            call = node.target, *_with(node, read)
        sizes[name] = _valued(graph, number, *call)
    return sizes[name]


def _places(nodes: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Size → a tensor and a dimension that have it."""
    tensors = ((n, value(n)) for n in nodes if isinstance(value(n), torch.Tensor))
    return {str(size): (n, d) for n, t in tensors for d, size in enumerate(t.shape)}


def _sizes_known(part: _Part, graph: fx.Graph) -> bool:
    """Whether every size that a part reads is one of its inputs', or of the graph's."""
    known = _places([*part.inputs, *graph.find_nodes(op="placeholder")])

    def unknown(node: fx.Node) -> list[fx.Node]:
        numbers = [n for n in _reads(node) if isinstance(value(n), NUMBERS)]
        return [n for n in numbers if str(value(n).node.expr) not in known]

    return all(n.target is not aten.sym_size.int for n in reached(part.nodes, unknown))
