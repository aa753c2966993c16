"""One torch.export of a source, cleaned into a flat graph over the skeleton's names."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from lora_fx.fx.capture.call import Door, Signature, apart, leaf_names
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import NO_GRAD, hint, value
from lora_fx.fx.graph.ops import row_of
from lora_fx.inputs import SIZES, Named
from lora_fx.text import Json

aten = torch.ops.aten


@dataclass
class Traced:
    """A cleaned graph, whose placeholders are the leaves and whose outputs are flat.

    Attributes:
        graph: The nodes.
        constants: Tensors that the graph reads and that are none of the model's.
        door: The sizes that it takes.
        out_spec: How the flat outputs become what the model returns.
        pinned: Dimensions that were asked to be dynamic and are not.
        lone: (leaf, dimension) for which the export ruled size 1 out; a proof decides.
        ranges: The largest size of (leaf, dimension), where the export found one.
        bodies: What higher-order ops call, by the name that the graph reads.
        analyses: What was computed of it; see lora_fx.ir.graph.Analysed.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    door: Door
    out_spec: Any
    pinned: list[Pinned] = field(default_factory=list)
    lone: list[tuple[int, int]] = field(default_factory=list)
    ranges: dict[tuple[int, int], int] = field(default_factory=dict)
    bodies: dict[str, fx.GraphModule] = field(default_factory=dict)
    analyses: dict[str, object] = field(default_factory=dict)

    def fx_graph(self, root: nn.Module, training: bool) -> FxGraph:
        """A fresh copy over a tree that holds the tensors; what find saw of one holds for all."""
        graph = FxGraph(self.graph, root, training=training, bodies=self.bodies)
        graph.share(self.analyses)
        return graph.clone()


def trace(
    source: nn.Module,
    signature: Signature,
    forward: Any,
    named: Named,
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
    named: Named,
    requested: Requested,
) -> Traced:
    """Export once, through one dict argument.

    torch 2.13 cannot name shapes inside **kwargs ("Must provide a tree_name"), and that is how
    Hugging Face's Trainer passes num_items_in_batch.
    """
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
    entry = RootModule(source, signature, forward)
    with _quiet(), _free_batch():
        # strict=True takes twice the time, and captured no model that this does not. Deferred
        # asserts leave the size checks in the graph as nodes, which become the door.
        program = torch.export.export(
            entry,
            (named,),
            dynamic_shapes=(shapes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        module = program.module(check_guards=False)
    return _clean(module, program, names, leaves, requested)


class RootModule(nn.Module):
    """A module over the source's own tensors, under their names, that takes a dict of arguments."""

    def __init__(self, source: nn.Module, signature: Signature, forward: Any) -> None:
        super().__init__()
        self.__dict__["_parameters"] = source._parameters
        self.__dict__["_buffers"] = source._buffers
        self.__dict__["_modules"] = source._modules
        self.__dict__["_non_persistent_buffers_set"] = source._non_persistent_buffers_set
        self.training = source.training
        self._call = (signature, forward)

    def forward(self, named: dict[str, Any]) -> Any:
        """Call the user's forward with its arguments by name."""
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
    """A setting under which an example of batch 1 still gives a free dimension.

    It is private to torch, so it may go; then such an example gives a batch of 1.
    """
    try:
        from torch.fx.experimental import _config

        return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


def _at_least_two(x: torch.Tensor, dims: Mapping[int, str]) -> torch.Tensor:
    """The tensor with every dynamic dimension of size 1 doubled to 2."""
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
            # these bake dtype and device in: .to(bf16) and autocast would fail on them
            graph.erase_node(node)
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
    """The tensors that are no parameter or buffer, and the bodies of higher-order ops."""
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
    """Replace every device literal by the device of the first tensor input.

    A captured Llama has 28 of them, and the graph would stay on the device of the capture.
    """
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


@dataclass(frozen=True)
class Pinned:
    """A dimension that was asked to be dynamic and that the model fixed."""

    input: str
    dim: int
    size: int
    op: str

    def to_json(self) -> Json:
        """One row of `pinned[]`."""
        return {"input": self.input, "dim": self.dim, "size": self.size, "op": self.op}

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"


Requested = Mapping[str, Mapping[int, str]]
"""What should be dynamic: leaf name → {dimension: symbol name}."""


def _size_of(node: Any, places: Sequence[fx.Node]) -> tuple[int, int] | None:
    """The (leaf, dimension) whose size a node is; None where it is no size of an input."""
    if isinstance(node, fx.Node) and node.target is aten.sym_size.int and node.args[0] in places:
        return places.index(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    return None


def door_asserts(
    graph: fx.Graph,
    places: Sequence[fx.Node],
    sizes: list[Any],
    names: Sequence[str],
    requested: Requested,
) -> tuple[list[Pinned], Any, list[tuple[int, int]]]:
    """Turn asserts on input sizes into checks at the door; leave the rest in the graph.

    Args:
        graph: Edited in place.
        places: The placeholders, one for each leaf.
        sizes: The sizes of every leaf; those that an assert fixes are written into it.
        names: The names of the leaves.
        requested: What should be dynamic.

    Returns:
        Pinned dimensions, pairs of (leaf, dimension) that must agree, and dimensions for which
        size 1 is ruled out.
    """
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
            # Kept, "not 1" refuses a batch of 1 that nn.TransformerEncoder takes. Dropped, a model
            # with `if x.shape[0] == 1` is wrong there and says nothing. So a proof runs size 1.
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
        elif _decides(test) and len(behind := _sizes_behind(test, places)) == 1:
            # an equation in one size: other solutions may exist, the example's is certain
            ((leaf, dim),) = behind
            sizes[leaf][dim] = hint(sizes[leaf][dim])
            if dim in requested.get(names[leaf], {}):
                pinned.append(Pinned(names[leaf], dim, sizes[leaf][dim], _line(node)))
        else:
            continue
        graph.erase_node(node)
    return pinned, tuple(same), lone


def _decides(test: fx.Node) -> bool:
    """True for an equation that does not hold at the sizes that the checks use."""
    expression = getattr(getattr(test.meta.get("val"), "node", None), "expr", None)
    if test.target is not operator.eq or expression is None or len(expression.free_symbols) != 1:
        return False
    (symbol,) = expression.free_symbols
    return any(expression.subs(symbol, n[1]) == False for n in SIZES)  # noqa: E712 - sympy's own


def _sizes_behind(node: fx.Node, places: Sequence[fx.Node]) -> set[tuple[int, int]]:
    """The input sizes that an expression is made of."""
    found, queue = set(), [node]
    while queue:
        n = queue.pop()
        size = _size_of(n, places)
        if size is not None:
            found.add(size)
        elif n.op == "call_function":
            queue += n.all_input_nodes
        else:
            return set()  # a value, not a size
    return found


def _line(node: fx.Node) -> str:
    """The user's source line that a node came from, else torch's."""
    text = str(node.meta.get("stack_trace") or "").splitlines()
    files = [x.strip().removeprefix("File ").replace('"', "") for x in text if "File " in x]
    theirs = [x for x in files if "/torch/" not in x]
    return next(reversed(theirs or files), "the model's arithmetic")


def who_pinned(program: Any, place: fx.Node, dim: int) -> str:
    """The line of the user's code whose guard fixed a dimension, by the shape environment."""
    mode = getattr(place.meta.get("val"), "fake_mode", None)
    env = getattr(mode, "shape_env", None)
    for guard in getattr(env, "guards", None) or []:
        stack = getattr(getattr(guard, "sloc", None), "user_stack", None)
        text = str(guard.expr)
        if stack and text.startswith("Eq(") and text.endswith(f" {place.meta['val'].shape[dim]})"):
            theirs = [f for f in stack if "/torch/" not in f.filename]
            frame = theirs[-1] if theirs else stack[-1]
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return "the model's arithmetic"


def single_sizes(program: Any, sizes: Sequence[Any]) -> dict[tuple[int, int], int]:
    """The (leaf, dimension) to which the export left one size only, and that size."""
    result = {}
    for i, shape in enumerate(sizes):
        for d, n in enumerate(shape or ()):
            if isinstance(n, torch.SymInt):
                bound = program.range_constraints.get(n.node.expr)
                if bound is not None and bound.lower == bound.upper:
                    result[i, d] = int(bound.lower)
    return result


def upper_bounds(program: Any, sizes: Sequence[Any]) -> dict[tuple[int, int], int]:
    """The largest size of each (leaf, dimension) for which the export found one."""
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


higher = torch.ops.higher_order


def inline_regions(module: fx.GraphModule, graph: fx.Graph, *, no_grad: bool = False) -> None:
    """Replace every call of a no_grad or autocast body by the body's own nodes.

    What runs in them is the model's like everything else: its weights are targets. What the
    regions did to gradients and dtypes is written out as detach and casts.
    """
    for node in list(graph.nodes):
        if node.target is higher.wrap_with_set_grad_enabled:
            enabled, body, *given = node.args
            off = no_grad or not enabled
            _inline(module, graph, node, body, given, no_grad=off, cast=None)
        elif node.target is higher.wrap_with_autocast:
            _, dtype, enabled, _, body, *given = node.args
            cast = (dtype or torch.bfloat16) if enabled else None
            _inline(module, graph, node, body, given, no_grad=no_grad, cast=cast)


def _inline(
    module: fx.GraphModule,
    graph: fx.Graph,
    node: fx.Node,
    body: fx.Node,
    given: list[Any],
    *,
    no_grad: bool,
    cast: torch.dtype | None,
) -> None:
    part: Any = module
    for name in str(body.target).split("."):
        part = getattr(part, name)
    inline_regions(part, part.graph, no_grad=no_grad)
    env: dict[fx.Node, Any] = {}
    arguments = iter(given)
    results: Any = ()
    with graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op == "placeholder":
                outer = next(arguments)
                env[inner] = _detached(graph, outer) if no_grad else outer
            elif inner.op == "output":
                results = map_arg(inner.args[0], lambda n: env[n])
            else:
                new = graph.node_copy(inner, lambda n: env[n])
                if inner.op == "get_attr":
                    new.target = f"{body.target}.{inner.target}"
                if cast is not None:
                    _cast_inputs(graph, new, cast)
                if no_grad:
                    new.meta[NO_GRAD] = True
                env[inner] = new
        if no_grad:
            results = map_arg(results, lambda n: _detached(graph, n))
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _detached(graph: fx.Graph, node: Any) -> Any:
    """The value without its gradient; tensors of the model and numbers have none to lose."""
    floating = isinstance(node, fx.Node) and isinstance(v := value(node), torch.Tensor)
    if not floating or node.op == "get_attr" or not v.is_floating_point():
        return node
    new = graph.call_function(aten.detach.default, (node,))
    new.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
    return new


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast a node's floating operands as autocast did when the graph was recorded.

    Ops that autocast runs narrow have a narrow result of wider operands; those that it runs in
    fp32 have an fp32 result of narrow operands.
    """
    made = value(node)
    if isinstance(made, (tuple, list)):
        made = next((m for m in made if isinstance(m, torch.Tensor)), None)
    if not isinstance(made, torch.Tensor) or not made.is_floating_point() or _casts(node):
        return
    operands = [
        i for i in node.all_input_nodes if isinstance(v := value(i), torch.Tensor)
        and v.is_floating_point()
    ]  # fmt: skip
    seen = {value(i).dtype for i in operands}
    wanted = made.dtype
    mixed = seen != {wanted} and wanted in (dtype, torch.float32)
    if not mixed or (wanted is torch.float32 and torch.float32 in seen):
        return  # plain type promotion
    with graph.inserting_before(node):
        for i in operands:
            if value(i).dtype is not wanted:
                new = graph.call_function(aten.to.dtype, (i, wanted))
                new.meta = dict(i.meta)
                new.meta["val"] = value(i).to(wanted)
                node.replace_input_with(i, new)


def _casts(node: fx.Node) -> bool:
    name = str(node.target)
    return name.startswith(
        ("aten.to.", "aten._to_copy", "aten.type_as", "aten.empty", "aten.zeros")
    )


# The experts of a mixture, in a form that other runtimes have.
#
# transformers computes experts by one grouped product, for which ONNX has no op, nor has ATen where
# torch lacks the kernel. Its batched form gathers every row's matrices instead: the same numbers by
# common ops. A capture for export takes that form by itself. (The third form, eager, loops over
# nonzero(), which Mixtral's export fails on.)


GROUPED, BATCHED = "grouped_mm", "batched_mm"


def has_grouped(graph: fx.Graph) -> bool:
    """True when a graph has a grouped product."""
    return any((row := row_of(n)) is not None and row.op == GROUPED for n in graph.nodes)


@contextlib.contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """A context in which transformers' experts run in their batched form."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    name = "_experts_implementation_internal"  # the public setter also reaches into sub-configs
    switched = [c for c in configs.values() if getattr(c, name, None) == GROUPED]
    for c in switched:
        setattr(c, name, BATCHED)
    try:
        yield
    finally:
        for c in switched:
            setattr(c, name, GROUPED)
