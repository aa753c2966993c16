"""Blocks that repeat: a call of a block like one that was traced becomes a copy of its nodes.

The layers of a Llama are one block eighty times, and torch.export traces each of them at some
milliseconds a node. Here the first call of a block is traced as ever, between two marks, and a
later call of a block like it is one opaque node. In the graph that comes out, such a node becomes
a copy of the nodes between the marks, over its own tensors and arguments.

Blocks are alike when their classes, the shapes of their tensors, the way they are called, every
attribute that the traced one read and what their code can reach outside of them (snapshot.py) are
the same. A call that leaves something behind (a tensor written in place, an attribute, a counter)
or makes what a copy cannot (sizes that values decide, outputs that are no tensors) is no pattern
for others. Where a graph shows that blocks share values that they are not given, it is traced again
without copies. And a graph with copies is run beside the model: see agreement.py.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from lora_fx.fx.capture.call import is_cache
from lora_fx.fx.capture.snapshot import PLAIN, READS_ALL, Snapshot, Token, held
from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.func_transforms import transforms_are_active
from lora_fx.fx.graph.nodes import value
from lora_fx.fx.proxy_tracing import get_proxy_mode, get_proxy_slot
from lora_fx.fx.trees import LeafSpec, TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from lora_fx.patching import patched

aten = torch.ops.aten
_ALL = "CompositeExplicitAutograd"
torch.library.define("lora_fx::block_start", "(Tensor[] given, int key) -> ()")
torch.library.define("lora_fx::block_end", "(Tensor[] made, int key) -> ()")
torch.library.define("lora_fx::block_again", "(Tensor[] given, int key) -> Tensor[]")
START = torch.ops.lora_fx.block_start.default
END = torch.ops.lora_fx.block_end.default
AGAIN = torch.ops.lora_fx.block_again.default
for _name, _mark in (("start", START), ("end", END)):
    fx.node.has_side_effect(_mark)  # it has no users, and is no dead code
    torch.library.impl(f"lora_fx::block_{_name}", _ALL, lambda _tensors, _key: None)

FEWEST = 4
"""Modules in a block, itself among them: a copy of fewer is no cheaper than its trace."""
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MISSING = object()
_CLASS = ""
"""Stands for a module's class among the names of what it holds."""
Tokens = Mapping[tuple[str, str], Token]
"""(path in a block, attribute) → the token of what is held there."""


class NotRepeated(Exception):
    """Copies cannot be put into a graph; the model is traced without any."""


@dataclass(eq=False)
class Block:
    """A module that others are like, with the modules in it by path."""

    modules: dict[str, nn.Module]
    family: BlockFamily
    called: bool = False

    def tensors(self) -> list[torch.Tensor]:
        """Its parameters and buffers as they are now: a trace puts others in their place."""
        held = ((*m._parameters.values(), *m._buffers.values()) for m in self.modules.values())
        return [t for own in held for t in own if t is not None]

    def held(self) -> dict[tuple[str, str], object]:
        """What else its modules hold now, by path and name."""
        return {(p, k): v for p, m in self.modules.items() for k, v in held(m).items()}

    def told(self, now: Snapshot) -> dict[tuple[str, str], Token]:
        """The tokens of what its modules hold, and of their classes."""
        classes = {(p, _CLASS): now.token(type(m)) for p, m in self.modules.items()}
        return {at: now.token(v) for at, v in self.held().items()} | classes

    def state(self) -> list[object]:
        """Which things its modules hold, to see whether a call has put others in their places."""
        things = self.held()
        return [*things, *map(id, things.values()), *map(id, self.tensors())]

    def as_found(self) -> bool:
        """Whether it has the modules still that it was compared with others by, and no hooks."""
        now = dict(self.modules[""].named_modules(remove_duplicate=False))
        return [*map(id, now.values())] == [*map(id, self.modules.values())] and not _altered(now)


@dataclass(eq=False)
class BlockFamily:
    """Modules of one class and structure.

    Attributes:
        blocks: They.
        differ: (path in a block, attribute) of what they do not all hold alike.
        fixed: Those of which it cannot be seen whether they are read: the class has the name too,
            or is what differs, or its code reads attributes by `vars`.
        patterns: Calls that were traced, which later ones may be copies of.
        broken: True once a call was such that no other can be its copy.
    """

    blocks: list[Block] = field(default_factory=list)
    differ: set[tuple[str, str]] = field(default_factory=set)
    fixed: set[tuple[str, str]] = field(default_factory=set)
    patterns: list[TracedCall] = field(default_factory=list)
    broken: bool = False


@dataclass(eq=False)
class TracedCall:
    """One traced call.

    Attributes:
        key: What its marks in the graph say.
        block: Whose call it was.
        call: How it was called; its sizes may be symbols.
        given: The tensors that it was called with, and those of its block.
        told: The tokens of what its block held then, and of what its code could reach.
        read: Those of the family's differences that it read.
        made: Its outputs, flat.
        spec: Their tree.
    """

    key: int
    block: Block
    call: Sequence[object]
    given: Sequence[torch.Tensor]
    told: Tokens
    read: set[tuple[str, str]]
    made: list[object] = field(default_factory=list)
    spec: TreeSpec = field(default_factory=LeafSpec)

    def reads(self, module: nn.Module, name: str) -> None:
        """Write down that the call asked a module for an attribute."""
        for path, differing in self.block.family.differ:
            own = self.block.modules[path].__dict__ is module.__dict__
            if differing == name and own:
                self.read.add((path, name))

    def holds_for(self, told: Tokens) -> bool:
        """Whether what the call may have read is, in a block of these tokens, as it was then."""
        return _differing(self.told, told) <= self.block.family.differ - self.read


_KEYS = count()
_patterns: dict[int, TracedCall] = {}
"""Patterns by key, while a model is traced: the opaque op has the shapes of their outputs."""


def _again(given: Sequence[torch.Tensor], key: int) -> list[torch.Tensor]:
    made = [m for m in _patterns[key].made if isinstance(m, torch.Tensor)]
    return [torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=m.device) for m in made]


torch.library.impl("lora_fx::block_again", _ALL, _again)
# outputs require gradients where those of the block would; no graph with such a node is run
torch.library.register_autograd("lora_fx::block_again", lambda *_: (None, None))


class Repeats:
    """The blocks of a model that repeat, and what was traced of them.

    Args:
        model: Its modules; their classes have other forwards while `watching`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.open: list[TracedCall] = []
        self.copies = 0
        self.patches = contextlib.ExitStack()
        families: dict[object, BlockFamily] = {}
        # hooks of all modules run in blocks too
        hooks: Any = torch_module
        every = () if hooks._has_any_global_hook() else dict.fromkeys(model.modules())
        for module in every:
            below = dict(module.named_modules(remove_duplicate=False))
            if len(below) >= FEWEST and module is not model and not _altered(below):
                family = families.setdefault(_structure(below), BlockFamily())
                family.blocks.append(Block(below, family))
        self.families = list(families.values())
        blocks = [b for f in self.families for b in f.blocks]
        tops = {id(b.modules[""]) for b in blocks}
        self.around = frozenset(
            id(m) for m in every if any(id(part) in tops for part in m.modules())
        )
        for family in self.families:
            self._compare(family)
        # torch calls modules by proxies over their __dict__
        self.blocks = {id(b.modules[""].__dict__): b for b in blocks}

    def _compare(self, family: BlockFamily) -> None:
        """Find out what the blocks of a family do not all hold alike."""
        now = Snapshot(self.around)
        every = [b.told(now) for b in family.blocks]
        first = family.blocks[0].modules
        family.differ = {n for told in every for n in _differing(every[0], told)}
        family.fixed = {
            (path, name)
            for path, name in family.differ
            if name == _CLASS or hasattr(type(first[path]), name) or now.names & READS_ALL
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A block that traces the model: calls of blocks like earlier ones are one node each."""
        with self.patches as patches:
            for kind in dict.fromkeys(type(b.modules[""]) for b in self.blocks.values()):
                patches.enter_context(patched(kind, forward=self._forward(kind.forward)))
            pairs = {
                (type(b.modules[path]), name)
                for f in self.families
                for path, name in f.differ - f.fixed
                for b in f.blocks
            }
            for kind, name in pairs:
                patches.enter_context(patched(kind, **{name: self._attribute(name)}))
            try:
                yield
            finally:
                for family in self.families:
                    for pattern in family.patterns:
                        _patterns.pop(pattern.key, None)

    def _without_cache(self, x: Any) -> Any:
        """None for a cache that is empty: it gives nothing, and what it keeps is no output."""
        if not is_cache(x):
            return x
        layered = [c for c in (x, *vars(x).values()) if hasattr(c, "layers")]
        new = [c for c in layered if c.layers is not _MISSING]
        held = (t for c in new for layer in c.layers for t in vars(layer).values())
        if any(isinstance(t, torch.Tensor) and t.dim() > 1 for t in held):
            return x
        for c in new:  # a model that asks for its layers later on is traced the long way
            self.patches.enter_context(patched(c, layers=_MISSING))
        return None

    def _attribute(self, name: str) -> property:
        """An attribute that says when it is read."""

        def get(module: nn.Module) -> object:
            for pattern in self.open:
                pattern.reads(module, name)
            if name not in module.__dict__:
                raise AttributeError(name)  # nn.Module looks among its tensors then
            return module.__dict__[name]

        def put(module: nn.Module, value: object) -> None:
            module.__dict__[name] = value

        return property(get, put, lambda module: module.__dict__.pop(name))

    def _forward(self, original: Callable[..., object]) -> Callable[..., object]:
        def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
            if torch.compiler.is_dynamo_compiling():  # the body of a higher-order op
                return original(module, *args, **kwargs)
            run = partial(original, module)
            block = self.blocks.get(id(module.__dict__))
            args = tuple(map(self._without_cache, args))
            kwargs = {k: self._without_cache(x) for k, x in kwargs.items()}
            if block is None or block.family.broken or any(p.block is block for p in self.open):
                return run(*args, **kwargs)
            if len(block.family.blocks) == 1 and not block.called:
                block.called = True  # most such are never called again
                return run(*args, **kwargs)
            return self._call(block, run, args, kwargs)

        forward.__wrapped__ = original  # type: ignore[attr-defined]  # a snapshot reads its code
        return forward

    def _call(
        self,
        block: Block,
        run: partial[object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        leaves, spec = tree_flatten((args, kwargs))
        given = [*(x for x in leaves if isinstance(x, torch.Tensor)), *block.tensors()]
        now = Snapshot(self.around)
        call = _described(leaves, spec, given, now) if block.as_found() else None
        if call is None:
            return run(*args, **kwargs)
        call += [run.func, *(m.__dict__["training"] for m in block.modules.values())]
        told = block.told(now)
        for pattern in block.family.patterns:
            if _sized(pattern.call) == _sized(call) and pattern.holds_for(told):
                self.copies += 1
                for outer in self.open:
                    for path, name in pattern.read:
                        outer.reads(block.modules[path], name)
                made = iter(AGAIN(given, pattern.key))
                out = [next(made) if isinstance(m, torch.Tensor) else m for m in pattern.made]
                passed = dict(zip(map(id, pattern.given), given, strict=True))
                out = [passed.get(id(m), x) for m, x in zip(pattern.made, out, strict=True)]
                return tree_unflatten(out, pattern.spec)
        pattern = TracedCall(next(_KEYS), block, call, given, told, {*block.family.fixed})

        def left() -> object:
            """What the call may leave behind, as it is now."""
            tokens = map(Snapshot(self.around).token, tree_leaves((args, kwargs)))
            written = [t._version for t in given]
            return written, _decided(given), block.state(), [*tokens]

        before = left()
        START(given, pattern.key)
        self.open.append(pattern)
        try:
            result = run(*args, **kwargs)
        finally:
            self.open.pop()
        pattern.made, pattern.spec = tree_flatten(result)
        tensors = [m for m in pattern.made if isinstance(m, torch.Tensor)]
        plain = all(isinstance(m, (torch.Tensor, torch.Size, *PLAIN)) for m in pattern.made)
        same = before == left() and pattern.holds_for(block.told(Snapshot(self.around)))
        if plain and _tracked(tensors) and same:
            END([*tensors, *given], pattern.key)  # a cast that does nothing is now an argument
            _patterns[pattern.key] = pattern
            block.family.patterns.append(pattern)
        else:
            block.family.broken = True
        return result


def _altered(modules: Mapping[str, nn.Module]) -> bool:
    """Whether some module does more, or other things, than the forward of its class."""
    own = any("forward" in m.__dict__ for m in modules.values())
    return own or any(getattr(m, k, ()) for path, m in modules.items() if path for k in _HOOKS)


def _structure(modules: Mapping[str, nn.Module]) -> object:
    """What blocks have to share: classes, modes and shapes of tensors, by path."""

    def shape(t: torch.Tensor | None) -> object:
        return t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)

    parts: list[object] = []
    for path, m in modules.items():
        tensors = (*m._parameters.items(), *m._buffers.items())
        parts += [path, type(m), m.training, *((n, shape(t)) for n, t in tensors)]
    return tuple(parts)


def _differing(a: Tokens, b: Tokens) -> set[tuple[str, str]]:
    return {n for n in a.keys() | b.keys() if n not in a or n not in b or a[n] != b[n]}


def _described(
    leaves: Sequence[object], spec: object, given: Sequence[torch.Tensor], now: Snapshot
) -> list[object] | None:
    """How a block is called; None where the call cannot be told from others."""
    if torch.is_autocast_enabled("cpu") or transforms_are_active():
        return None
    if not _tracked(given):
        return None
    tracer = get_proxy_mode()
    first: dict[int, int] = {}
    parts: list[object] = [spec, id(tracer), torch.is_grad_enabled()]
    parts += [first.setdefault(id(t), i) for i, t in enumerate(given)]
    for x in leaves:
        if isinstance(x, torch.Tensor):
            parts += [x.dtype, x.device, x.requires_grad, *x.shape, *x.stride()]
        elif isinstance(x, (torch.Size, *PLAIN)):
            parts.append((type(x), x))
        elif isinstance(x, _NUMBERS):
            parts.append(x)
        elif inspect.isroutine(x) or isinstance(x, type):
            parts.append(now.token(x))
        else:
            return None
    return parts


def _sized(call: Sequence[object]) -> list[object]:
    """A call with its sizes as torch knows them now: two that were apart may have become equal."""
    return [x.node.expr if isinstance(x, _NUMBERS) else x for x in call]


def _tracked(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph has a node for each of these tensors, which are as any other."""
    mode = get_proxy_mode()
    if mode is None or any(t.layout is not torch.strided for t in tensors):
        return False
    return all(get_proxy_slot(t, mode.tracer, None) is not None for t in tensors)


def _decided(given: Sequence[torch.Tensor]) -> int:
    """How many sizes the trace has so far that values decide."""
    env = getattr(detect_fake_mode(given), "shape_env", None)
    return 0 if env is None else int(env.counter["create_unbacked_symbol"])


def write_out(module: fx.GraphModule) -> None:
    """Put the copies that the opaque nodes of a graph stand for in their places.

    Raises:
        NotRepeated: Some node is elsewhere than its pattern, or reads what has no counterpart.
    """
    graph = module.graph
    starts: dict[int, fx.Node] = {}
    ends: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is START:
            starts[node.args[1]] = node
        elif node.target is END:
            ends[node.args[1]] = node
        elif node.target is AGAIN:
            key = node.args[1]
            if key not in starts or key not in ends:
                raise NotRepeated
            _copy(module, starts[key], ends[key], node)
    for mark in (*starts.values(), *ends.values()):
        graph.erase_node(mark)
    marks = {START, END, AGAIN}
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and any(n.target in marks for n in part.graph.nodes):
            raise NotRepeated


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (*_NUMBERS, int, float))


def _copy(module: fx.GraphModule, start: fx.Node, end: fx.Node, call: fx.Node) -> None:
    graph = module.graph
    given, theirs, made = (cast("list[fx.Node]", n.args[0]) for n in (start, call, end))
    env = dict(zip(given, theirs, strict=True))
    inside, at = list[fx.Node](), start
    while (at := at.next) is not end:
        inside.append(at)
    here = {*given, *inside, end}
    with graph.inserting_before(call):
        for inner in inside:
            if _is_number(inner) or inner.target in (START, END, aten._assert_scalar.default):
                continue  # numbers are the same in every call
            read = {n for n in inner.all_input_nodes if n.op != "get_attr" and not _is_number(n)}
            if inner.op != "get_attr" and inner not in made:
                read.update(inner.users)
            if read - here:  # other calls would not share it
                raise NotRepeated
            new = graph.node_copy(inner, lambda n: env.get(n, n))
            new.meta["nn_module_stack"] = _moved(inner, start, call)
            body = getattr(module, str(inner.target), None) if inner.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):  # passes edit a body for the one call of it
                new.target = f"{inner.target}_{new.name}"
                module.add_submodule(new.target, deepcopy(body))
            env[inner] = new
    for user in list(call.users):
        if user.target is operator.getitem:
            result = made[cast("int", user.args[1])]
            user.replace_all_uses_with(env.get(result, result))
            graph.erase_node(user)
    graph.erase_node(call)


def _moved(node: fx.Node, start: fx.Node, call: fx.Node) -> dict[str, tuple[str, object]]:
    """The modules that a copied node was made in: those of the call, and then the node's own."""
    stack, outer, here = (n.meta.get("nn_module_stack") or {} for n in (node, start, call))
    if list(stack)[: len(outer)] != list(outer) or not outer or not here:
        return dict(stack)
    (old, (old_path, _)), (new, (new_path, _)) = (list(s.items())[-1] for s in (outer, here))
    inner = list(stack.items())[len(outer) :]
    moved = {
        new + k.removeprefix(old): (new_path + path.removeprefix(old_path), kind)
        for k, (path, kind) in inner
    }
    return {**here, **moved}
