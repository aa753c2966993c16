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
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
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
from torch.fx.node import Argument, map_arg

from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.graph.in_place import Writes, written_by
from lora_fx.fx.graph.nodes import NO_GRAD, aten_ops, dtype_of, hint, reached, replace_parts, value
from lora_fx.fx.interception import make_fx
from lora_fx.fx.operators import SET_GRAD_ENABLED, OpOverload, decomposes_unasked
from lora_fx.fx.trees import tree_leaves, tree_map_only, tree_structure
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
    given, written = ([str(a.type) for a in op._schema.arguments] for op in (plain, target))
    return plain if given == written else None


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


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, as often as they stand there."""
    return [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _with(node: fx.Node, given: Iterator[Any]) -> Any:
    """(args, kwargs) of a node with others in the places of the nodes that it reads."""
    return tree_map_only(fx.Node, lambda _: next(given), (node.args, node.kwargs))


def _start(graph: fx.Graph, place: fx.Node, val: Any) -> Any:
    """An input, as a node reads it; a number is the size of a tensor made for it."""
    if isinstance(val, torch.Tensor):
        place.meta["val"] = val
        return place
    place.meta["val"] = torch.empty(val)
    return _valued(graph, val, aten.sym_size.int, (place, 0))


def _valued(graph: fx.Graph, val: object, target: Any, *call: Any) -> fx.Node:
    """A new node with its value; `call` is its args and kwargs."""
    new = graph.call_function(target, *call)
    new.meta["val"] = val
    return new


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
    tensors = tree_leaves([value(n) for n in nodes])
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
    spec = tree_structure((tuple(range(len(inputs))), {}))
    call = ModuleCallSignature([], [], spec, tree_structure(tuple(range(len(outputs)))))
    return ExportedProgram(
        nn.Module(),
        graph,
        ExportGraphSignature([*owned, *given], ends),
        dict(state),
        {},
        [ModuleCallEntry("", call)],
    )


# What torch holds in one node as nodes of its own: no_grad, autocast, vmap, chains of products.


higher = torch.ops.higher_order
CHOSEN = ("aten.to.", "aten._to_copy", "aten.type_as", "aten.empty", "aten.zeros")
"""Beginnings of ops whose dtype the model chose, whatever autocast would."""
CHAINS = aten_ops("linalg_multi_dot chain_matmul")


def inline_regions(module: fx.GraphModule, *, no_grad: bool = False) -> None:
    """Replace every call of a no_grad or autocast body by the body's own nodes.

    What runs in them is the model's like everything else: its weights are targets. What the
    regions did to gradients and dtypes is written out as detach and casts.
    """
    for node in list(module.graph.nodes):
        if node.target is higher.wrap_with_set_grad_enabled:
            _inline(module, node, node.args[1:], no_grad or not node.args[0], None)
        elif node.target is higher.wrap_with_autocast:
            _, dtype, enabled, *_ = node.args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, node, node.args[4:], no_grad, cast)


def _inline(
    module: fx.GraphModule, node: fx.Node, call: Any, no_grad: bool, cast: torch.dtype | None
) -> None:
    """Put the nodes of a body in the place of the one that runs it: call is (body, *arguments)."""
    body, *given = call
    graph, part = module.graph, operator.attrgetter(str(body.target))(module)
    inline_regions(part, no_grad=no_grad)
    with graph.inserting_before(node):
        given = [_detached(node, outer) for outer in given] if no_grad else given
        places = part.graph.find_nodes(op="placeholder")
        env: dict[fx.Node, Any] = dict(zip(places, given, strict=False))
        results: Any = graph.graph_copy(part.graph, env)
        for inner in (n for n in part.graph.nodes if n.op not in ("placeholder", "output")):
            if inner.op == "get_attr":
                env[inner].target = f"{body.target}.{inner.target}"
            if cast is not None:
                _cast_inputs(graph, env[inner], cast)
            if no_grad:
                env[inner].meta[NO_GRAD] = True
        if no_grad:
            results = map_arg(results, lambda n: _detached(node, n))
    replace_parts(node, results)
    if not body.users:
        graph.erase_node(body)


def without_grad_modes(graph: fx.Graph) -> None:
    """Write out what a recorded run did between two switches of the gradient as detach.

    Left in the graph, a switch would act on whatever runs after it, the user's code too.
    """
    region: dict[fx.Node, None] = {}
    enabled = True
    for node in list(graph.nodes):
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif not enabled and node.op == "call_function":
            region[node] = None
            node.meta[NO_GRAD] = True
    for node in region:
        readers = [user for user in node.users if user not in region]
        if not readers:
            continue
        with graph.inserting_after(node):
            result = _detached(node, node)
        for reader in readers:
            if reader is not result:
                reader.replace_input_with(node, result)


def _detached(region: fx.Node, node: Any) -> Any:
    """The value without its gradient; tensors of the model and numbers have none to lose."""
    floating = isinstance(node, fx.Node) and isinstance(v := value(node), torch.Tensor)
    if not floating or node.op == "get_attr" or not v.is_floating_point():
        return node
    new = region.graph.call_function(aten.detach.default, (node,))
    new.meta = {"val": v, "nn_module_stack": region.meta.get("nn_module_stack", {})}
    return new


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast a node's floating operands as autocast did when the graph was recorded.

    Ops that autocast runs narrow have a narrow result of wider operands; those that it runs in
    fp32 have an fp32 result of narrow operands.
    """
    tensors = (v for v in tree_leaves(value(node)) if isinstance(v, torch.Tensor))
    made = next(tensors, None)
    chosen = str(node.target).startswith(CHOSEN)
    if chosen or made is None or not made.is_floating_point():
        return
    dtypes = {i: dtype_of(i) for i in node.all_input_nodes}
    operands = [i for i, dtype in dtypes.items() if dtype and dtype.is_floating_point]
    seen = {dtypes[i] for i in operands}
    wanted = made.dtype
    mixed = seen != {wanted} and wanted in (dtype, torch.float32)
    if not mixed or (wanted is torch.float32 and torch.float32 in seen):
        return  # plain type promotion
    with graph.inserting_before(node):
        for i in operands:
            if dtypes[i] is not wanted:
                new = graph.call_function(aten.to.dtype, (i, wanted))
                new.meta = {**i.meta, "nn_module_stack": node.meta.get("nn_module_stack", {})}
                new.meta["val"] = value(i).to(wanted)
                node.replace_input_with(i, new)


def without_vmap(graph: fx.Graph) -> None:
    """The plain operations that torch.vmap makes, instead of its own.

    A level of batching is entered and left by nodes without users, and what lies between holds
    there alone: no pass could move it, share it or drop it.
    """
    depth, body = 0, list[fx.Node]()
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        depth += name == "_vmap_increment_nesting"
        if depth and node.op == "call_function":
            body.append(node)
        if name == "_vmap_decrement_nesting" and not (depth := depth - 1):
            _batched(graph, body)
            body = []


def _batched(graph: fx.Graph, body: Sequence[fx.Node]) -> None:
    """Trace the nodes of one vmap again, below its levels, and put what it runs in their place."""
    read = dict.fromkeys(n for node in body for n in node.all_input_nodes)
    given = [n for n in read if n not in body]
    kept = [n for n in body if any(user not in body for user in n.users)]
    values = [n.meta["val"] for n in given]

    def run(*arguments: Argument) -> list[Argument]:
        env = dict(zip(given, arguments, strict=True))
        for node in body:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[n] for n in kept]

    with detect_fake_mode(values) or contextlib.nullcontext():
        plain = make_fx(run)(*values).graph
    places = dict(zip(plain.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(body[-1]):
        results = graph.graph_copy(plain, places)
    for node, new in zip(kept, results, strict=True):  # type: ignore[arg-type]
        node.replace_all_uses_with(new)
    for node in reversed(body):
        graph.erase_node(node)


# Chains of products, written as products of two, which have rows in the op table.
#
# A chain is associative. It starts at its first activation and goes outwards, x, W₁, W₂ as
# (x W₁) W₂, so that each weight stands alone in one product with an activation.


def split_products(graph: fx.Graph) -> None:
    """Rewrite every chain of a graph; torch may choose another order, so last bits may differ."""
    moving: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "placeholder" and not any(n in moving for n in node.all_input_nodes):
            continue
        moving.add(node)
        if node.target in CHAINS:
            with graph.inserting_before(node):
                new = _chain(node, moving)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moving.add(new)


def _chain(node: fx.Node, moving: Collection[fx.Node]) -> fx.Node:
    factors: Any = node.args[0]
    start = next(i for i, f in enumerate(factors) if f in moving)
    y: fx.Node = factors[start]
    for f in reversed(factors[:start]):
        y = _product(node, f, y)
    for f in factors[start + 1 :]:
        y = _product(node, y, f)
    return y


def _product(node: fx.Node, *factors: fx.Node) -> fx.Node:
    """A product in the place of a chain, in its scope."""
    new = node.graph.call_function(aten.matmul.default, factors)
    new.meta = {**node.meta, "val": aten.matmul.default(*map(value, factors))}
    return new
