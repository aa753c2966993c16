"""A program in the operators that an exporter has: one node of every kind is decomposed.

torch.export decomposes by running the whole program again with symbolic sizes, which is most of
what an export costs. Layers are one block many times: nodes of one operator that read the same
shapes, dtypes and constants come apart alike. So a program of one node a kind is decomposed, and
what became of each stands in for all of its kind.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from torch._export import utils
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from lora_fx.fx.graph.flow import Writes, written_by
from lora_fx.fx.graph.nodes import hint, value

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]
"""Operator → what it is made of; what is not in it stays."""
_kept = getattr(utils, "_is_preservable_cia_op", lambda op: False)
"""Whether an operator that torch could take apart stays if it is not in the table."""
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
    kinds: dict[Hashable, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" or not _alone(node):
            return _whole(program, table)
        if _comes_apart(node, table):
            kinds.setdefault(_kind(node), []).append(node)
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
    return target in table or (target._can_decompose() and not _kept(target))


def _kind(node: fx.Node) -> Hashable:
    """What a decomposition can see of a node."""
    return node.target, _known(node.args), _known(node.kwargs)


def _known(x: object) -> Hashable:
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


def without_writes(graph: fx.Graph) -> None:
    """Let ops that write into a value nobody else reads afterwards give a new one.

    relu_ of a norm's result is relu of it. What something reads later by another name stays, as
    does an op that would round to the dtype of what it writes into.
    """
    writes = Writes(graph)
    for node in graph.nodes:
        into = written_by(node)
        plain = _giving(node.target) if len(into) == 1 else None
        if plain is None or into[0] is not node.args[0]:
            continue
        own, at = writes.storage[into[0]], writes.order[node]
        held = [n for n, s in writes.storage.items() if s & own and writes.order[n] < at]
        dtypes = {v.dtype for v in map(value, _reads(node)) if isinstance(v, torch.Tensor)}
        made = all(isinstance(n, fx.Node) and n.op == "call_function" for n in own)
        if made and len(dtypes) == 1 and all(writes.order[u] <= at for n in held for u in n.users):
            node.target = plain


def _giving(target: Any) -> OpOverload | None:
    """The op that gives what another writes: aten.relu.default for aten.relu_.default."""
    name = getattr(target, "_opname", "")
    packet = getattr(aten, name[:-1], None) if name[-1:] == "_" and name[-2:-1] != "_" else None
    plain = getattr(packet, target._overloadname, None) if packet is not None else None
    if plain is None or plain._schema.is_mutable:
        return None
    same = [str(a.type) for a in plain._schema.arguments] == [
        str(a.type) for a in target._schema.arguments
    ]
    return plain if same else None


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
        call = _with(node, given)
        made = graph.call_function(node.target, *call)  # type: ignore[arg-type]
        made.meta["val"] = value(node)
        ends += _values(graph, made)
    graph.output(tuple(ends))
    whole = signed(graph, [p for starts in places for p in starts], {})
    done = _whole(whole, table).graph
    inputs, outputs = iter(done.find_nodes(op="placeholder")), iter(done.output_node().args[0])
    parts = []
    for node, of in zip(nodes, reads, strict=True):
        begin = tuple(islice(inputs, len(of)))
        end = tuple(islice(outputs, len(pytree.tree_leaves(value(node)))))
        parts.append(_Part(begin, _between(done, begin, end), end))
    return parts


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, as often as they stand there."""
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _with(node: fx.Node, given: Iterator[Any]) -> Any:
    """(args, kwargs) of a node with others in the places of the nodes that it reads."""
    return pytree.tree_map_only(fx.Node, lambda _: next(given), (node.args, node.kwargs))


def _start(graph: fx.Graph, place: fx.Node, val: Any) -> Any:
    """An input, as a node reads it; a number is the size of a tensor made for it."""
    if isinstance(val, torch.Tensor):
        place.meta["val"] = val
        return place
    place.meta["val"] = torch.empty(val)
    size = graph.call_function(aten.sym_size.int, (place, 0))
    size.meta["val"] = val
    return size


def _values(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The tensors that a node gives, each as a node."""
    val, found = value(node), list[fx.Node]()
    if isinstance(val, torch.Tensor):
        return [node]
    for i, part in enumerate(val):
        found.append(graph.call_function(operator.getitem, (node, i)))
        found[-1].meta["val"] = part
    return found


def _between(
    graph: fx.Graph, begin: Sequence[fx.Node], end: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """The nodes from inputs to values, in order; sizes are found by what they are."""
    wanted, queue = set[fx.Node](), list(end)
    while queue:
        node = queue.pop()
        if node not in wanted and node not in begin and not isinstance(value(node), NUMBERS):
            wanted.add(node)
            queue += node.all_input_nodes
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
        else:
            for user in list(node.users):
                user.replace_all_uses_with(ends[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


def _of(
    graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, fx.Node], sizes: dict[str, fx.Node]
) -> Any:
    """What stands for a node of a part; a size is computed once for all parts."""
    if node in made:
        return made[node]
    number = value(node)
    name = str(number.node.expr)
    if name not in sizes:
        target: Any = node.target
        # a size may be read of another part's input, which is not here
        if place := _places([*made.values(), *_inputs(graph)]).get(name):
            target, args, kwargs = aten.sym_size.int, place, {}
        else:
            args, kwargs = _with(node, (_of(graph, x, made, sizes) for x in _reads(node)))
        sizes[name] = graph.call_function(target, args, kwargs)
        sizes[name].meta["val"] = number
    return sizes[name]


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _places(nodes: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Size → a tensor and a dimension that have it."""
    tensors = ((n, value(n)) for n in nodes if isinstance(value(n), torch.Tensor))
    return {str(size): (n, d) for n, t in tensors for d, size in enumerate(t.shape)}


def _sizes_known(part: _Part, graph: fx.Graph) -> bool:
    """Whether every size that a part reads is one of its inputs', or of the graph's."""
    known, queue = _places([*part.inputs, *_inputs(graph)]), list(part.nodes)
    while queue:
        for node in (n for n in _reads(queue.pop()) if isinstance(value(n), NUMBERS)):
            if str(value(node).node.expr) not in known:
                if node.target is aten.sym_size.int:
                    return False
                queue.append(node)
    return True


def _sign(program: ExportedProgram) -> None:
    """Let the signature name the outputs as they are."""
    signature, (ends,) = program.graph_signature, program.graph.output_node().args
    signature.output_specs = [
        replace(s, arg=TensorArgument(n.name)) if isinstance(s.arg, TensorArgument) else s
        for s, n in zip(signature.output_specs, ends, strict=True)
    ]


def program_of(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], free: Sequence[Collection[int] | None]
) -> ExportedProgram | None:
    """A flat graph of tensors as a program, without running it; None where that takes a run.

    Every node keeps the value that the capture gave it, and with it the capture's symbols. A
    module that was cast since, or code that was put in, has other values; a recorded run has none.

    Args:
        module: Its placeholders are the inputs, in order.
        inputs: Their values.
        free: The dimensions of each that stay free.
    """
    nodes = list(module.graph.nodes)
    places = module.graph.find_nodes(op="placeholder")
    tensors = pytree.tree_leaves([value(n) for n in nodes])
    modes = {getattr(t, "fake_mode", None) for t in tensors if isinstance(t, torch.Tensor)}
    given = map(_like, map(value, places), inputs, free)
    if not all(map(_has_value, nodes)) or len(modes) != 1 or None in modes or not all(given):
        return None
    graph, made, held = fx.Graph(), dict[fx.Node, fx.Node](), dict[int, fx.Node]()
    state: dict[str, torch.Tensor] = {}
    prefix = "state"
    while any(str(n.target).startswith(prefix) for n in nodes):
        prefix += "_"  # the exporter renames one by one: no place may be called as a tensor is
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = operator.attrgetter(name)(module)
        if not _like(value(node), tensor, None):
            return None
        if id(tensor) not in held:
            held[id(tensor)] = graph.placeholder(f"{prefix}{len(held)}")
            held[id(tensor)].meta = dict(node.meta)
            state[name] = tensor
        made[node] = held[id(tensor)]
    for node in nodes:
        if node.target is getattr:
            node.replace_all_uses_with(getattr(value(node.args[0]), node.args[1]))
        elif node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    return signed(graph, [made[n] for n in places], state)


def _has_value(node: fx.Node) -> bool:
    known = node.op == "output" or node.target in (getattr, *CHECKS) or value(node) is not None
    return known and _alone(node)


def _like(val: object, tensor: torch.Tensor, free: Collection[int] | None) -> bool:
    """Whether a node stands for tensors such as this; other sizes only where they are free."""
    if not isinstance(val, torch.Tensor) or val.dtype != tensor.dtype or val.dim() != tensor.dim():
        return False
    sizes = enumerate(zip(val.shape, tensor.shape, strict=True))
    return all(a == b if isinstance(a, int) else d in (free or ()) for d, (a, b) in sizes)


def signed(
    graph: fx.Graph, inputs: Sequence[fx.Node], state: Mapping[str, torch.Tensor]
) -> ExportedProgram:
    """A graph of tensors as a program; the placeholders of its state stand before the inputs."""
    outputs: Any = graph.output_node().args[0]
    kinds = {True: InputKind.PARAMETER, False: InputKind.BUFFER}
    places = zip(graph.find_nodes(op="placeholder"), state.items(), strict=False)
    owned = [
        InputSpec(kinds[isinstance(t, nn.Parameter)], TensorArgument(p.name), name, True)
        for p, (name, t) in places
    ]
    given = [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in inputs]
    ends = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]
    spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
    call = ModuleCallSignature([], [], spec, pytree.tree_structure(tuple(range(len(outputs)))))
    return ExportedProgram(
        nn.Module(),
        graph,
        ExportGraphSignature([*owned, *given], ends),
        dict(state),
        {},
        [ModuleCallEntry("", call)],
    )
