"""One torch.export of a source, cleaned into a flat graph over the skeleton's names."""

from __future__ import annotations

import contextlib
import logging
import operator
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import traceback
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from lora_fx.conditions import Condition
from lora_fx.errors import CaptureError, silenced
from lora_fx.fx import fake_tensors, symbolic_sizes
from lora_fx.fx.capture.call import (
    Door,
    OverTree,
    Requested,
    Signature,
    apart,
    leaf_names,
    leaves_of,
    without_cache,
)
from lora_fx.fx.capture.guards import UNKNOWN, GuardLog, constants_of, learn
from lora_fx.fx.capture.repeat import Repeats, write_out
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import random_ops, value
from lora_fx.fx.graph.ops import row_of
from lora_fx.fx.lowering.product_chains import split_products
from lora_fx.fx.lowering.regions import inline_regions, without_grad_modes
from lora_fx.fx.lowering.vmap import without_vmap
from lora_fx.fx.operators import HigherOrderOperator, decomposition_table
from lora_fx.fx.proxy_tracing import make_fx
from lora_fx.fx.trees import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)
from lora_fx.inputs import Named
from lora_fx.patching import patched
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
        doubtful: What a kernel asked of sizes; a run decides whether it matters.
        cuts: Numbers that sizes are compared, cut or divided with.
        bodies: What higher-order ops call, by the name that the graph reads.
        left_out: Outputs that are no tensors, and that no graph makes.
        notes: What else has to be said.
        own_gradients: What may have another gradient than its forward, which a graph has not.
        copies: Calls of blocks that are copies of the nodes of another one.
        modeless: True where nothing asked for a mode, so that the other one's graph is this one.
        analyses: What was computed of it; see lora_fx.ir.graph.Analysed.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    door: Door
    out_spec: Any
    pinned: list[Pinned] = field(default_factory=list)
    doubtful: list[Condition] = field(default_factory=list)
    cuts: tuple[int, ...] = ()
    bodies: dict[str, fx.GraphModule] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    own_gradients: tuple[str, ...] = ()
    copies: int = 0
    modeless: bool = False
    analyses: dict[str, object] = field(default_factory=dict)

    def fx_graph(self, root: nn.Module, training: bool) -> FxGraph:
        """A fresh copy over a tree that holds the tensors; what find saw of one holds for all."""
        graph = FxGraph(
            self.graph, root, training=training, bodies=self.bodies, constants=self.constants
        ).clone()
        graph.read_codes()
        graph.share(self.analyses)
        return graph


def trace(entry: RootModule, named: Named, requested: Requested, *, repeat: bool = True) -> Traced:
    """Export a model on `named` inputs and clean the graph.

    A dynamic dimension of size 1 is tried at 2, and fixed where the model does not take that.

    Args:
        entry: The model.
        named: Its arguments.
        requested: What should be dynamic.
        repeat: Trace blocks that repeat once; see lora_fx.fx.capture.repeat.
    """
    try:
        return _repeated(entry, named, requested, repeat=repeat)
    except Exception:
        lone = ones_of(named, requested)
        if not lone:
            raise
        traced = _repeated(entry, named, less(requested, lone), repeat=repeat)
        where = "the model: it does not run at size 2"
        traced.pinned = [*traced.pinned, *(Pinned(n, d, 1, where) for n, d in lone)]
        return traced


def ones_of(named: Named, requested: Requested) -> list[tuple[str, int]]:
    """(leaf name, dimension) of what should be dynamic and has size 1."""
    leaves = dict(leaves_of(named))
    return [
        (n, d)
        for n, dims in requested.items()
        for d in dims
        if isinstance(x := leaves.get(n), torch.Tensor) and d < x.dim() and x.shape[d] == 1
    ]


def less(requested: Requested, fixed: Collection[tuple[str, int]]) -> Requested:
    """What should be dynamic, but for these dimensions, which become fixed."""
    return {
        n: {d: s for d, s in dims.items() if (n, d) not in fixed} for n, dims in requested.items()
    }


def _repeated(entry: RootModule, named: Named, requested: Requested, *, repeat: bool) -> Traced:
    """Export with blocks that repeat traced once, or each for itself where that fails."""
    if repeat and (repeats := Repeats(entry.source())).families:
        try:
            with repeats.watching():
                traced = _trace(entry, named, requested)
            traced.copies = repeats.copies
            return traced
        except Exception as error:  # of the model, or it comes of the watching
            if raises_alike(entry, named, error):
                raise
    return _trace(entry, named, requested)


def raises_alike(entry: RootModule, named: Named, error: BaseException | None) -> bool:
    """Whether a model raises an error of its export where nothing traces it, too.

    Every further try would take as long as an export.

    Args:
        entry: The model, with its values or on fake tensors, in the mode to run.
        named: Its arguments.
        error: What its export raised.
    """
    fake = next((p.fake_mode for p in entry.parameters() if fake_tensors.is_fake(p)), None)
    inputs = dict(named)
    if fake is not None:
        static = partial(fake.from_tensor, static_shapes=True)
        inputs = tree_map_only(torch.Tensor, static, inputs)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fake or contextlib.nullcontext():
            entry(inputs)
    except Exception as found:
        return type(found) is type(error) and str(found) == str(error)
    return False


def _trace(entry: RootModule, named: Named, requested: Requested) -> Traced:
    """Export once, through one dict argument.

    torch 2.13 cannot name shapes inside **kwargs ("Must provide a tree_name"), and that is how
    Hugging Face's Trainer passes num_items_in_batch.
    """
    given, spec = leaves_of(named), tree_structure(dict(named))
    free = [requested.get(n, {}) if isinstance(x, torch.Tensor) else {} for n, x in given]
    large = [at_least_two(x, dims) for (_, x), dims in zip(given, free, strict=True)]
    named = tree_unflatten(apart(large), spec)
    shapes = tree_unflatten([{d: Dim.AUTO for d in dims} or None for dims in free], spec)
    log = GuardLog()
    model = entry.source()
    with (
        log.listening(),
        _same_dtypes(),
        _same_attributes(model),
        _watched(model) as seen,
        _modes_read(model) as read,
    ):
        program = export_program(entry, (named,), (shapes,))
    module = program.module(check_guards=False)
    traced = clean_module(module, program, [n for n, _ in given], requested, log)
    traced.left_out, traced.notes, traced.own_gradients = tuple(entry.left_out()), *seen()
    # what draws numbers may be a layer that a train mode drops, see _watched; the bodies of
    # higher-order ops are traced by a compiler, whose reads are not seen
    bodies = any(isinstance(n.target, HigherOrderOperator) for n in program.graph.nodes)
    traced.modeless = not (read() or bodies or random_ops(traced.graph))
    return traced


def export_program(
    module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...]
) -> ExportedProgram:
    """torch.export, as every capture and every re-export is made.

    strict=True takes twice the time, and captured no model that this does not. Deferred asserts
    leave the size checks in the graph as nodes, and a free batch keeps a cut such as `ids[:, :16]`
    where the example is shorter. Only what a model's own code says of free sizes has lines worth
    looking up, node by node: that takes a sixth of an export.
    """
    looked = not isinstance(module, fx.GraphModule) and any(tree_leaves(shapes))
    lines = patched(fx.config, do_not_emit_stack_traces=not looked)
    # an example of batch 1 still gives a free dimension
    with quiet(), symbolic_sizes.ones_stay_free(), recurrent_shapes(), lines:
        return torch.export.export(
            module,
            args,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def record(entry: RootModule, named: Named, why: str) -> Traced:
    """One run of a model on its real tensors, written down: the last rung of a capture.

    It holds for the sizes of the example, and for the branches that its values took: whatever
    Python read of a tensor is a constant of the graph.

    Args:
        entry: The model with its values, in the mode to record; it stays as it is.
        named: The example's arguments.
        why: Why torch.export refused, for `pinned`.
    """
    leaves, spec = tree_flatten(dict(named))
    names, made = leaf_names(named), list[Any]()
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    # nothing is kept for a backward pass; what the model runs without gradient shows all the same
    frozen = {n: nn.Parameter(p.detach(), False) for n, p in entry.named_parameters()}
    buffers = {n: b.clone() for n, b in entry.named_buffers()}

    def run(parameters: Any, buffers: Any, given: list[torch.Tensor]) -> list[Any]:
        rest = iter(given)
        all_leaves = [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]
        arguments = (tree_unflatten(all_leaves, spec),)
        out = torch.func.functional_call(entry, {**parameters, **buffers}, arguments)
        flat, out_spec = tree_flatten(out)
        made[:] = [out_spec]
        return flat

    source = entry.source()
    modes = quiet(), torch.enable_grad(), _scopes(source), _same_dtypes()
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        seen = stack.enter_context(_watched(source))
        module = make_fx(
            run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )(frozen, buffers, [x.clone() for x in tensors])
    graph = module.graph
    without_grad_modes(graph)
    constants, bodies = _constants(module, graph)
    graph.owning_module = None  # it has none of the model's names
    places = graph.find_nodes(op="placeholder")
    for place, name in zip(places, (*frozen, *buffers), strict=False):
        with graph.inserting_before(place):
            read = graph.get_attr(name)
        read.meta = dict(place.meta)
        place.replace_all_uses_with(read)
        graph.erase_node(place)
    match_places(graph, leaves)
    (end,) = graph.find_nodes(op="output")
    end.args = (tuple(end.args[0]),)
    _finish(graph)
    sizes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves)
    traced = Traced(graph, constants, Door(tuple(names), sizes), made[0], bodies=bodies)
    traced.left_out, traced.notes, traced.own_gradients = tuple(entry.left_out()), *seen()
    traced.pinned = [
        Pinned(n, d, size, why, "recorded")
        for n, shape in zip(names, sizes, strict=True)
        for d, size in enumerate(shape or ())
    ]
    return traced


def match_places(graph: fx.Graph, leaves: Sequence[object]) -> None:
    """One placeholder for each leaf of the call: constants get one, or lose theirs."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    tensors = [p for p in places if isinstance(p.meta.get("val"), torch.Tensor)]
    for place in places:
        if place not in tensors:
            place.replace_all_uses_with(place.meta.get("val"))
            graph.erase_node(place)
    wanted = iter(tensors)
    at = None
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            at = next(wanted)
            continue
        anchor = next(iter(graph.nodes)) if at is None else at.next
        with graph.inserting_before(anchor):
            at = graph.placeholder(f"constant_{i}")


class _Drawn(float):
    """A random number that Python compares, drawn so that nothing is left out."""

    def item(self) -> float:
        """The number, as a tensor gives it."""
        return float(self)


class EveryLayer(TorchFunctionMode):
    """A block in which no layer is dropped at random.

    Args:
        said: Gets a note where one would be.
    """

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; a lone number that is drawn is one that drops nothing."""
        if func is torch.rand and len(args) == 1 and args[0] in ([], ()):
            self.said[:] = ["no layer is dropped in train mode: a graph has all of them"]
            return _Drawn(1.0)
        return func(*args, **(kwargs or {}))


class EveryTurn(TorchFunctionMode):
    """A block in which a loop over the places where a mask is true runs over all of its places.

    So do mixtures of experts that are written as a loop, `for expert in hit.nonzero()`: how many
    turns there are depends on values, which no graph can hold. A turn for an expert without rows
    adds nothing; that it does not is for the caller to check.

    Attributes:
        turns: The loops that were seen, by the number of their turns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []
        self._places: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; the parts of a mask's places are the numbers of all places."""
        if func in (torch.unbind, torch.Tensor.unbind) and args[1:] in ((), (0,)) and not kwargs:
            for places, mask, shape in self._places:
                if args[0] is places:
                    self.turns.append(mask.shape[0])
                    rows = range(mask.shape[0])
                    return tuple(torch.tensor(i, device=mask.device).reshape(shape) for i in rows)
        if func is torch.Tensor.__format__ and args[0].dim() == 0:  # the name of an expert
            return format(args[0].item(), args[1])
        result = func(*args, **(kwargs or {}))
        if func in (torch.nonzero, torch.Tensor.nonzero) and not kwargs:
            mask = args[0]
            if mask.dim() == 1 and isinstance(mask.shape[0], int):
                self._places.append((result, mask, [1]))
        elif func in (torch.squeeze, torch.Tensor.squeeze) and args[1:] in ((1,), (-1,)):
            self._places += [(result, m, []) for p, m, _ in self._places if p is args[0]]
        return result


@contextlib.contextmanager
def _same_dtypes() -> Iterator[None]:
    """A block in which a module that is cast to the dtype that it has stays as it is.

    torch puts new parameters in the place of those of a trace, and fails, since the trace has them.
    """
    apply: Callable[..., Any] = nn.Module._apply

    def changed(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        with torch.no_grad():
            new = fn(tensor)
        return (new.dtype, new.device, new.shape) != (tensor.dtype, tensor.device, tensor.shape)

    def apply_changes(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        if any(changed(t, fn) for t in (*self.parameters(recurse), *self.buffers(recurse))):
            return apply(self, fn, recurse)
        return self

    with patched(nn.Module, _apply=apply_changes):
        yield


_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict)


@contextlib.contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """A block in which torch.export traces a model whose attributes are the same things after it.

    torch.export puts copies of lists and dicts back, one for each module that has them. What
    several modules shared would be apart then: the next trace, or the user's own module, is
    another model.
    """
    own = [
        (m, {name: x for name, x in vars(m).items() if name not in _OF_TORCH})
        for m in model.modules()
    ]
    contents = dict[int, tuple[Any, Any]]()
    for _, attributes in own:
        for x in attributes.values():
            _keep_contents(x, contents)
    try:
        yield
    finally:
        for module, attributes in own:
            vars(module).update(attributes)
        for container, before in contents.values():
            container.clear()
            if isinstance(container, dict):
                container.update(before)
            else:
                container.extend(before)


def _keep_contents(x: Any, kept: dict[int, tuple[Any, Any]]) -> None:
    """Note what lists and dicts hold, and those in them, by their ids."""
    if not (type(x) in _CONTAINERS or isinstance(x, tuple)) or id(x) in kept:
        return
    if not isinstance(x, tuple):
        kept[id(x)] = x, dict(x) if isinstance(x, dict) else list(x)
    for inner in x.values() if isinstance(x, dict) else x:
        _keep_contents(inner, kept)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[Callable[[], tuple[tuple[str, ...], tuple[str, ...]]]]:
    """A block that traces a model; gives what has to be said, and what has gradients of its own.

    A train mode that drops whole layers at random drops none: Wav2Vec2, BART and their like draw
    one number a layer and let Python compare it, which no graph can hold. (Stochastic depth by a
    mask draws tensors, and stays.) An export drops autograd functions and hooks, so they are noted.
    What numpy and Python draw would be a constant of the graph.

    Raises:
        CaptureError: Numbers were drawn outside torch.
    """
    said: list[str] = []
    own = [n for n, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    function: Any = torch.autograd.Function
    tensor: Any = torch.Tensor
    apply, hook = function.__dict__["apply"], tensor.register_hook

    def noted(cls: Any, /, *args: object, **kwargs: object) -> Any:
        own.extend([cls.__qualname__] * (not cls.__module__.startswith("torch.")))
        return apply.__get__(None, cls)(*args, **kwargs)

    def hooked(self: object, *args: object) -> object:
        own.append("Tensor.register_hook")
        return hook(self, *args)

    before = _drawn_outside()
    watched = patched(function, apply=classmethod(noted)), patched(tensor, register_hook=hooked)
    with watched[0], watched[1], EveryLayer(said) if model.training else contextlib.nullcontext():
        yield lambda: (tuple(said), tuple(dict.fromkeys(own)))
    if _drawn_outside() != before:
        cure = "draw them by torch"
        if getattr(getattr(model, "config", None), "apply_spec_augment", False):
            cure = "set config.apply_spec_augment = False, since its masks are drawn by numpy"
        raise CaptureError(
            f"cannot capture {type(model).__name__} in {'train' if model.training else 'eval'} "
            "mode: it draws random numbers by numpy or Python, which a graph would keep",
            f"{cure}; lora_fx.attach trains the live model",
        )


@contextlib.contextmanager
def _modes_read(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """A block that traces a model; gives whether the trace may depend on the mode of a module.

    It does where a module was asked for its `training`, which is a property for the time of the
    block, or does what it likes when its mode is set.
    """
    kinds = {type(m) for m in model.modules()}
    read = [k for k in kinds if k.train is not nn.Module.train or hasattr(k, "training")]
    # torch calls modules by proxies over their __dict__
    own = {id(m.__dict__) for m in model.modules()}

    def get(module: nn.Module) -> bool:
        compiled = torch.compiler.is_dynamo_compiling()  # a body, which must not write to a list
        if not compiled and id(module.__dict__) in own:
            read.append(type(module))
        return bool(module.__dict__.get("training", True))

    watched = property(get, lambda module, mode: module.__dict__.update(training=mode))
    with patched(nn.Module, training=watched):
        yield lambda: bool(read)


def _drawn_outside() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(keys).tobytes(), *rest)


@contextlib.contextmanager
def _scopes(model: nn.Module) -> Iterator[None]:
    """Nodes get the stack of modules that they were made in, which make_fx leaves out."""
    stack: dict[str, tuple[str, str]] = {}

    def enter(path: str, module: nn.Module, _args: object) -> None:
        if torch.compiler.is_dynamo_compiling():  # a body, which must not write to a dict
            return
        stack[path] = (path, type(module).__qualname__)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    def leave(path: str, _m: object, _args: object, _out: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        stack.pop(path, None)
        traceback.current_meta["nn_module_stack"] = dict(stack)

    with contextlib.ExitStack() as hooks, traceback.preserve_node_meta():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, path)))
            after = module.register_forward_hook(partial(leave, path), always_call=True)
            hooks.enter_context(after)
        yield


class RootModule(OverTree):
    """A model that takes its arguments as one dict.

    Args:
        source: The model.
        signature: That of its forward.
        forward: What is called.

    Attributes:
        source: Gives the model.
        left_out: Gives the names of the outputs of the last run that are no tensors.
    """

    def __init__(self, source: nn.Module, signature: Signature, forward: Any) -> None:
        super().__init__(source)
        left_out = list[str]()

        def call(named: dict[str, Any]) -> Any:
            left_out.clear()
            return without_cache(signature.call(forward, named), left_out)

        # Functions, since torch.export puts back what lists and tuples of a module held.
        self._call: Callable[[dict[str, Any]], Any] = call
        self.source: Callable[[], nn.Module] = lambda: source
        self.left_out: Callable[[], list[str]] = lambda: left_out

    def forward(self, named: dict[str, Any]) -> Any:
        """Call the user's forward with its arguments by name."""
        return self._call(named)


def quiet() -> contextlib.AbstractContextManager[None]:
    """A block in which torch and the model warn of nothing; a failing capture prints its graph."""
    loggers = (symbolic_sizes.LOGGER, fake_tensors.LOGGER)
    return silenced(contextlib.redirect_stderr, dict.fromkeys(loggers, logging.CRITICAL))


@contextlib.contextmanager
def recurrent_shapes() -> Iterator[None]:
    """A block in which traces see LSTM and GRU as one op each, of any length.

    torch's rule for a traced one runs every step of it in Python, which fixes the length.
    """
    ops = (aten.lstm.input, aten.gru.input)  # the exporter to ONNX has no RNN, and needs its steps
    held = [(op, dict(op.py_kernels), decomposition_table[op]) for op in ops]

    def shapes(x: torch.Tensor, hx: object, *args: object) -> tuple[torch.Tensor, ...]:
        states: Any = hx if isinstance(hx, (tuple, list)) else [hx]
        directions = 2 if args[5] else 1
        out = x.new_empty((*x.shape[:2], directions * states[0].shape[2]))
        return out, *map(torch.empty_like, states)

    def put(op: Any, kernels: Mapping[Any, Any], decomposition: Callable[..., Any]) -> None:
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()
        decomposition_table[op] = decomposition

    try:
        for op in ops:
            put(op, dict.fromkeys(op.py_kernels, shapes), shapes)
        yield
    finally:
        for kept in held:
            put(*kept)


def at_least_two(x: Any, dims: Mapping[int, str]) -> Any:
    """A leaf whose every dynamic dimension of size 1 is doubled to 2."""
    for d in dims:
        if d < x.dim() and x.shape[d] == 1:
            x = torch.cat([x, x], d)
    return x


def clean_module(
    module: fx.GraphModule,
    program: ExportedProgram,
    names: Sequence[str],
    requested: Requested,
    log: GuardLog,
) -> Traced:
    """A program as a flat graph whose placeholders are the leaves.

    Args:
        module: The program's; it may have been edited.
        program: The export, or what a file holds.
        names: The names of the leaves.
        requested: What should be dynamic.
        log: What was learnt while it was made; empty for a file.
    """
    graph = module.graph
    inline_regions(module)
    without_vmap(graph)
    write_out(module)
    # these bake dtype and device in: .to(bf16) and autocast would fail on them
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    learnt = learn(program, graph, names, log)
    fixed = tuple(
        None if s is None else tuple(n if isinstance(n, int) else None for n in s)
        for s in learnt.sizes
    )
    door = Door(tuple(names), fixed, tuple(learnt.conditions))
    pinned = [
        Pinned(n, d, size, learnt.fixed.get((names.index(n), d), UNKNOWN))
        for (n, d), size in door.fixed(requested).items()
    ]
    constants, bodies = _constants(module, graph)
    cuts = constants_of(graph)
    _finish(graph)
    out_spec = program.call_spec.out_spec
    return Traced(graph, constants, door, out_spec, pinned, learnt.doubtful, cuts, bodies)


def _constants(
    module: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, torch.Tensor], dict[str, fx.GraphModule]]:
    """The tensors that a graph reads, and the bodies of higher-order ops."""
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    held = {name: operator.attrgetter(name)(module) for name in names}
    tensors = {n: v for n, v in held.items() if isinstance(v, torch.Tensor)}
    return tensors, {n: v for n, v in held.items() if isinstance(v, fx.GraphModule)}


def _finish(graph: fx.Graph) -> None:
    """The last steps of a graph that is otherwise clean."""
    split_products(graph)
    graph.eliminate_dead_code(lambda n: n.op in ("output", "placeholder") or n.is_impure())
    _follow_device(graph)
    graph.set_codegen(fx.graph.CodeGen())  # leaves in, leaves out


def _follow_device(graph: fx.Graph) -> None:
    """Replace every device literal by the device of the first tensor input.

    A captured Llama has 28 of them, and the graph would stay on the device of the capture.
    """
    places = graph.find_nodes(op="placeholder")
    first = next((n for n in places if isinstance(value(n), torch.Tensor)), None)
    literals = (a for n in graph.nodes for a in tree_leaves((n.args, n.kwargs)))
    if first is None or not any(isinstance(a, torch.device) for a in literals):
        return
    with graph.inserting_after(places[-1]):
        device = graph.call_function(getattr, (first, "device"))
    for n in graph.nodes:
        n.args, n.kwargs = map_aggregate(
            (n.args, n.kwargs), lambda a: device if isinstance(a, torch.device) else a
        )


@dataclass(frozen=True)
class Pinned:
    """A dimension that was asked to be dynamic and that the model fixed."""

    input: str
    dim: int
    size: int
    op: str
    rung: str = "pinned"

    def to_json(self) -> Json:
        """One row of `pinned[]`."""
        return dict(vars(self))

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"


# The experts of a mixture, in a form that a graph can hold.
#
# transformers computes experts in three forms, of the same numbers. Eager loops over the experts
# that the values chose, which no export follows and a recorded run writes down for the example's
# values only: a capture takes one grouped product instead. For that one ONNX has no op, nor has
# ATen where torch lacks the kernel: a capture for export takes the batched form, which gathers
# every row's matrices by common ops.


EAGER, GROUPED, BATCHED = "eager", "grouped_mm", "batched_mm"


def has_grouped(graph: fx.Graph) -> bool:
    """True when a graph has a grouped product."""
    return any((row := row_of(n)) is not None and row.op == GROUPED for n in graph.nodes)


@contextlib.contextmanager
def traceable_experts(model: nn.Module, *, portable: bool) -> Iterator[tuple[str, ...]]:
    """A context in which transformers' experts run in a form that a graph can hold.

    Args:
        model: The model; its configs are put back.
        portable: Take the form that other runtimes have.

    Yields:
        What has to be said: which form stands for a loop.
    """
    name = "_experts_implementation_internal"  # the public setter also reaches into sub-configs
    said: tuple[str, ...] = ()
    with contextlib.ExitStack() as switched:
        for experts in (m for m in model.modules() if hasattr(m, "_apply_gate")):
            config = getattr(experts, "config", None)
            if not hasattr(config, name):  # another library's
                continue
            own = getattr(config, name) or EAGER
            form = BATCHED if portable or not _aligned(experts) else GROUPED
            if own == EAGER or (own == GROUPED and portable):
                switched.enter_context(patched(config, **{name: form}))
            if own == EAGER:
                said = (
                    f"experts that run in a loop (experts_implementation={EAGER!r}) are captured "
                    f"as {form!r}, which has the same numbers; the model keeps its loop",
                )
        yield said


def _aligned(experts: nn.Module) -> bool:
    """True where the grouped product takes these matrices: in bfloat16 torch's kernel traces it."""
    narrow = [p for p in experts.parameters() if p.dtype == torch.bfloat16 and p.dim() == 3]
    return not any(n * p.element_size() % 16 for p in narrow for n in p.shape[1:])
