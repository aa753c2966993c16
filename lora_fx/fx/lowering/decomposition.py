"""A program decomposed by one node of every kind.

torch.export decomposes by running the whole program again with symbolic sizes, which is most of
what an export costs. Layers are one block many times: nodes of one operator that read the same
shapes, dtypes and constants come apart alike. So a program of one node a kind is decomposed, and
what became of each stands in for all of its kind.
"""

from __future__ import annotations

import contextlib
import itertools
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
from lora_fx.fx.lowering.node_arguments import call_with, read_nodes, valued
from lora_fx.fx.lowering.program_signature import name_outputs, signed
from lora_fx.fx.operators import OpOverload, decomposes_unasked
from lora_fx.fx.trees import tree_leaves
from lora_fx.text import by_key

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]
"""Operator → its decomposition; operators that are not in it stay."""
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
CHECKS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
}
"""Nodes without a value, which no exporter translates."""


_decompose_all: Callable[[ExportedProgram, Table], ExportedProgram]
_decompose_all = ExportedProgram.run_decompositions


def lowered(program: ExportedProgram, table: Table) -> ExportedProgram:
    """The program as `program.run_decompositions(table)` makes it; edited where that is enough.

    A program that writes in place, has bodies of its own, or sizes that depend on values is
    decomposed as a whole.
    """
    graph = program.graph
    if any(node.op == "get_attr" or not stands_alone(node) for node in graph.nodes):
        return _decompose_all(program, table)

    decomposed = [node for node in graph.nodes if _comes_apart(node, table)]
    nodes_by_kind = by_key((_kind_of(node), node) for node in decomposed)
    if not nodes_by_kind:
        return program
    examples = [nodes[0] for nodes in nodes_by_kind.values()]
    decompositions = _decompositions(examples, program, table)
    if not all(_sizes_are_available(each, graph) for each in decompositions):
        return _decompose_all(program, table)

    replacements: dict[fx.Node, _Decomposition] = {}
    for nodes, decomposition in zip(nodes_by_kind.values(), decompositions, strict=True):
        replacements |= dict.fromkeys(nodes, decomposition)
    _replace(graph, replacements)
    name_outputs(program)
    return program


def stands_alone(node: fx.Node) -> bool:
    """Whether the result of a node depends only on its operands."""
    if node.op != "call_function" or node.target in CHECKS:
        return True
    target: Any = node.target
    is_number = isinstance(value(node), (*NUMBERS, int))
    if not isinstance(target, OpOverload):  # a body, or code of ours that has to be traced
        return target in (getattr, operator.getitem) or is_number
    if is_number:  # sym_numel and sym_stride are made of sizes by a run
        return target is aten.sym_size.int
    if target._schema.is_mutable or node.meta.get("unbacked_bindings"):
        return False
    return _reads_known_sizes(node) and _parts_are_picked(node)


def _reads_known_sizes(node: fx.Node) -> bool:
    """Whether every number that a node reads is a size with a hint above zero."""
    numbers = [val for val in map(value, node.all_input_nodes) if isinstance(val, NUMBERS)]
    return all(isinstance(n, torch.SymInt) and n.node.hint and hint(n) > 0 for n in numbers)


def _parts_are_picked(node: fx.Node) -> bool:
    """Whether a node gives one value, or several that are all read one by one."""
    if not isinstance(value(node), (list, tuple)):
        return True
    return all(user.target is operator.getitem for user in node.users)


def _comes_apart(node: fx.Node, table: Table) -> bool:
    target: Any = node.target
    if not isinstance(target, OpOverload) or target in CHECKS or isinstance(value(node), NUMBERS):
        return False
    return target in table or decomposes_unasked(target)


def _kind_of(node: fx.Node) -> Hashable:
    """The same for nodes that come apart alike."""
    return node.target, _visible((node.args, node.kwargs))


def _visible(argument: object) -> Hashable:
    """The features of an argument that a decomposition can see."""
    if isinstance(argument, fx.Node):
        return "node", _visible(value(argument))
    if isinstance(argument, torch.Tensor):
        strides: tuple[str, ...] = ()
        if argument.layout is torch.strided:
            strides = tuple(map(str, argument.stride()))
        return argument.dtype, argument.device, tuple(map(str, argument.shape)), strides
    if isinstance(argument, NUMBERS):
        return "number", str(argument.node.expr)
    if isinstance(argument, Mapping):
        return tuple((key, _visible(item)) for key, item in argument.items())
    if isinstance(argument, (list, tuple)):
        return tuple(map(_visible, argument))
    return type(argument), repr(argument)


@dataclass(frozen=True)
class _Decomposition:
    """A node come apart: its inputs, the nodes between them and its values, and its values."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def _decompositions(
    nodes: Sequence[fx.Node], program: ExportedProgram, table: Table
) -> list[_Decomposition]:
    """Decompose one program that has these nodes next to each other, each with its own inputs."""
    graph = fx.Graph()
    operands_of = [read_nodes(node) for node in nodes]
    placeholders_of: list[list[fx.Node]] = []
    for i, operands in enumerate(operands_of):
        placeholders = [graph.placeholder(f"x{i}_{j}") for j in range(len(operands))]
        placeholders_of.append(placeholders)

    fakes = detect_fake_mode([value(node) for node in program.graph.nodes])
    outputs: list[fx.Node] = []
    for node, operands, placeholders in zip(nodes, operands_of, placeholders_of, strict=True):
        with fakes or contextlib.nullcontext():
            starts = [
                _operand_of(graph, placeholder, value(operand))
                for placeholder, operand in zip(placeholders, operands, strict=True)
            ]
        copied = valued(graph, value(node), node.target, *call_with(node, iter(starts)))
        outputs += _tensors_of(graph, copied)
    graph.output(tuple(outputs))

    inputs = [*itertools.chain.from_iterable(placeholders_of)]
    return _cut(_decompose_all(signed(graph, inputs, {}), table).graph, nodes)


def _cut(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[_Decomposition]:
    """Cut a decomposed graph, which has all nodes next to each other, into the parts of each."""
    inputs = iter(graph.find_nodes(op="placeholder"))
    results: Any = graph.output_node().args[0]
    outputs = iter(results)
    decompositions = []
    for node in nodes:
        first = tuple(islice(inputs, len(read_nodes(node))))
        last = tuple(islice(outputs, len(tree_leaves(value(node)))))
        decompositions.append(_Decomposition(first, _between(graph, first, last), last))
    return decompositions


def _operand_of(graph: fx.Graph, placeholder: fx.Node, val: Any) -> Any:
    """An input, as a node reads it; a number is the size of a tensor made for it."""
    if isinstance(val, torch.Tensor):
        placeholder.meta["val"] = val
        return placeholder
    placeholder.meta["val"] = torch.empty(val)
    return valued(graph, val, aten.sym_size.int, (placeholder, 0))


def _tensors_of(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The tensors that a node gives, each as a node."""
    val = value(node)
    if isinstance(val, torch.Tensor):
        return [node]
    return [valued(graph, item, operator.getitem, (node, i)) for i, item in enumerate(val)]


def _between(
    graph: fx.Graph, first: Sequence[fx.Node], last: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """The nodes from inputs to values, in order; sizes are found by what they are."""

    def inside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if n not in first and not isinstance(value(n), NUMBERS)]

    needed = set(reached(inside(last), lambda node: inside(node.all_input_nodes)))
    return tuple(node for node in graph.nodes if node in needed)


def _replace(graph: fx.Graph, decompositions: Mapping[fx.Node, _Decomposition]) -> None:
    """Replace every node by its decomposition."""
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        decomposition = decompositions.get(node)
        if decomposition is None or [n.target for n in decomposition.nodes] == [node.target]:
            if isinstance(value(node), NUMBERS):
                sizes.setdefault(str(value(node).node.expr), node)
            continue
        copies = dict(zip(decomposition.inputs, read_nodes(node), strict=True))
        with graph.inserting_before(node):
            for inner in decomposition.nodes:
                operands = (_copy_of(graph, x, copies, sizes) for x in read_nodes(inner))
                args, kwargs = call_with(inner, operands)
                copy = graph.call_function(inner.target, args, kwargs)  # type: ignore[arg-type]
                copy.meta = {**node.meta, **inner.meta}
                copies[inner] = copy
        results = [copies[output] for output in decomposition.outputs]
        if isinstance(value(node), torch.Tensor):
            node.replace_all_uses_with(results[0])
        replace_parts(node, results)


def _copy_of(
    graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], sizes: dict[str, fx.Node]
) -> Any:
    """The copy of a node of a decomposition; a size is computed once for all of them."""
    if node in copies:
        return copies[node]
    number = value(node)
    name = str(number.node.expr)
    if name in sizes:
        return sizes[name]
    # a size may be read of an input of another decomposition, which is not in this graph
    tensors = [*copies.values(), *graph.find_nodes(op="placeholder")]
    place = _places_of_sizes(tensors).get(name)
    if place is not None:
        sizes[name] = valued(graph, number, aten.sym_size.int, place)
    else:
        operands = (_copy_of(graph, x, copies, sizes) for x in read_nodes(node))
        sizes[name] = valued(graph, number, node.target, *call_with(node, operands))
    return sizes[name]


def _places_of_sizes(nodes: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Size → a tensor and a dimension that have it."""
    places: dict[str, tuple[fx.Node, int]] = {}
    for node in nodes:
        tensor = value(node)
        if isinstance(tensor, torch.Tensor):
            for axis, size in enumerate(tensor.shape):
                places[str(size)] = (node, axis)
    return places


def _sizes_are_available(decomposition: _Decomposition, graph: fx.Graph) -> bool:
    """Whether every size that a decomposition reads is one of its inputs', or of the graph's."""
    inputs = [*decomposition.inputs, *graph.find_nodes(op="placeholder")]
    available = _places_of_sizes(inputs)

    def unavailable(node: fx.Node) -> list[fx.Node]:
        numbers = [operand for operand in read_nodes(node) if isinstance(value(operand), NUMBERS)]
        return [number for number in numbers if str(value(number).node.expr) not in available]

    computed = reached(decomposition.nodes, unavailable)
    return all(node.target is not aten.sym_size.int for node in computed)
