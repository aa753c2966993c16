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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from lora_fx.fx.capture.block_family import (
    CLASS,
    Block,
    BlockFamily,
    TracedCall,
    differing_places,
    is_altered,
)
from lora_fx.fx.capture.call import is_cache
from lora_fx.fx.capture.snapshot import PLAIN, READS_ALL, Snapshot
from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.func_transforms import transforms_are_active
from lora_fx.fx.proxy_tracing import get_proxy_mode, get_proxy_slot
from lora_fx.fx.trees import tree_flatten, tree_leaves, tree_unflatten
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
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_MISSING = object()


_KEYS = count()
_patterns: dict[int, TracedCall] = {}
"""Patterns by key, while a model is traced: the opaque op has the shapes of their outputs."""


def _again(given: Sequence[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Empty tensors like the outputs of a pattern."""
    return [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        for x in _patterns[key].outputs
        if isinstance(x, torch.Tensor)
    ]


torch.library.impl("lora_fx::block_again", _ALL, _again)
# outputs require gradients where those of the block would; no graph with such a node is run
torch.library.register_autograd("lora_fx::block_again", lambda *_: (None, None))


class Repeats:
    """The blocks of a model that repeat, and the traces of them.

    Args:
        model: Its modules; their classes have other forwards while `watching`.

    Attributes:
        families: Modules that are alike, each family apart.
        copies: The number of calls that became copies.
    """

    def __init__(self, model: nn.Module) -> None:
        self.copies = 0
        self._open: list[TracedCall] = []
        self._patches = contextlib.ExitStack()
        torch_hooks: Any = torch_module
        # hooks of all modules run in blocks too
        modules = [] if torch_hooks._has_any_global_hook() else list(model.modules())
        self.families = _families(model, modules)
        blocks: list[Block] = []
        for family in self.families:
            blocks += family.blocks
        block_ids = {id(block.top) for block in blocks}
        self._around = frozenset(
            id(module)
            for module in modules
            if any(id(inner) in block_ids for inner in module.modules())
        )
        for family in self.families:
            self._compare(family)
        # torch calls modules by proxies over their __dict__
        self._blocks = {id(block.top.__dict__): block for block in blocks}

    def _compare(self, family: BlockFamily) -> None:
        """Find out where the blocks of a family do not all have the same."""
        now = Snapshot(self._around)
        first_tokens, *later_tokens = [block.tokens(now) for block in family.blocks]
        for tokens in later_tokens:
            family.differ |= differing_places(first_tokens, tokens)

        reads_all = bool(now.names & READS_ALL)
        modules = family.blocks[0].modules
        for path, name in family.differ:
            if name == CLASS or hasattr(type(modules[path]), name) or reads_all:
                family.fixed.add((path, name))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A block that traces the model: calls of blocks like earlier ones are one node each."""
        with self._patches as patches:
            for kind in dict.fromkeys(type(block.top) for block in self._blocks.values()):
                patches.enter_context(patched(kind, forward=self._forward(kind.forward)))
            for kind, name in self._watched_attributes():
                patches.enter_context(patched(kind, **{name: self._attribute(name)}))
            try:
                yield
            finally:
                for family in self.families:
                    for pattern in family.patterns:
                        _patterns.pop(pattern.key, None)

    def _watched_attributes(self) -> set[tuple[type, str]]:
        """(class, attribute) of objects that blocks do not share and whose reads can be seen."""
        watched: set[tuple[type, str]] = set()
        for family in self.families:
            for path, name in family.differ - family.fixed:
                watched.update((type(block.modules[path]), name) for block in family.blocks)
        return watched

    def _attribute(self, name: str) -> property:
        """An attribute that notes when it is read."""

        def get(module: nn.Module) -> object:
            for pattern in self._open:
                pattern.reads(module, name)
            if name not in module.__dict__:
                raise AttributeError(name)  # nn.Module looks among its tensors then
            return module.__dict__[name]

        def put(module: nn.Module, value: object) -> None:
            module.__dict__[name] = value

        return property(get, put, lambda module: module.__dict__.pop(name))

    def _without_empty_cache(self, argument: Any) -> Any:
        """None for an empty cache: it holds no values, and a cache is not an output."""
        if not is_cache(argument):
            return argument
        parts_of_cache = (argument, *vars(argument).values())
        layered = [x for x in parts_of_cache if hasattr(x, "layers") and x.layers is not _MISSING]
        for cache in layered:
            for layer in cache.layers:
                if _holds_tokens(layer):
                    return argument
        for cache in layered:  # a model that asks for its layers later on is traced the long way
            self._patches.enter_context(patched(cache, layers=_MISSING))
        return None

    def _forward(self, original: Callable[..., object]) -> Callable[..., object]:
        """The forward of a class of blocks while the model is traced."""

        def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
            if torch.compiler.is_dynamo_compiling():  # the body of a higher-order op
                return original(module, *args, **kwargs)
            run = partial(original, module)
            block = self._blocks.get(id(module.__dict__))
            args = tuple(map(self._without_empty_cache, args))
            kwargs = {name: self._without_empty_cache(x) for name, x in kwargs.items()}
            if block is None or block.family.broken or self._is_open(block):
                return run(*args, **kwargs)
            if len(block.family.blocks) == 1 and not block.called:
                block.called = True  # most such are never called again
                return run(*args, **kwargs)
            return self._call(block, run, args, kwargs)

        forward.__wrapped__ = original  # type: ignore[attr-defined]  # a snapshot reads its code
        return forward

    def _is_open(self, block: Block) -> bool:
        return any(pattern.block is block for pattern in self._open)

    def _call(
        self,
        block: Block,
        run: partial[object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """Call a block: as a copy where a traced call is like this one, else traced as a pattern.

        A call that cannot be told from others is run as it is.
        """
        leaves, spec = tree_flatten((args, kwargs))
        arguments = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = [*arguments, *block.tensors()]
        now = Snapshot(self._around)
        call = _described(leaves, spec, inputs, now) if block.is_as_compared() else None
        if call is None:
            return run(*args, **kwargs)
        call.append(run.func)
        call += [module.__dict__["training"] for module in block.modules.values()]

        tokens = block.tokens(now)
        sized_call = _sized(call)
        for pattern in block.family.patterns:
            if _sized(pattern.call) == sized_call and pattern.holds_for(tokens):
                return self._copy(pattern, block, inputs)
        pattern = TracedCall(next(_KEYS), block, call, inputs, tokens, {*block.family.fixed})
        return self._trace(pattern, run, args, kwargs)

    def _copy(self, pattern: TracedCall, block: Block, inputs: Sequence[torch.Tensor]) -> object:
        """The outputs of one opaque node, in the tree of the pattern's."""
        self.copies += 1
        for outer in self._open:
            for path, name in pattern.read:
                outer.reads(block.modules[path], name)

        copied_outputs = iter(AGAIN(inputs, pattern.key))
        # an output that is an input of the pattern is that input of this call
        passed_on = {id(theirs): ours for theirs, ours in zip(pattern.inputs, inputs, strict=True)}
        outputs: list[object] = []
        for output in pattern.outputs:
            copied = next(copied_outputs) if isinstance(output, torch.Tensor) else output
            outputs.append(passed_on.get(id(output), copied))
        return tree_unflatten(outputs, pattern.spec)

    def _trace(
        self,
        pattern: TracedCall,
        run: partial[object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """Run a call between two marks; it is a pattern for others if it leaves nothing behind."""
        block = pattern.block
        inputs = pattern.inputs

        def left_behind() -> object:
            """The present state of all that the call may change."""
            snapshot = Snapshot(self._around)
            tokens = [snapshot.token(leaf) for leaf in tree_leaves((args, kwargs))]
            versions = [tensor._version for tensor in inputs]
            return versions, _count_of_unbacked_sizes(inputs), block.state(), tokens

        before = left_behind()
        START(inputs, pattern.key)
        self._open.append(pattern)
        try:
            result = run(*args, **kwargs)
        finally:
            self._open.pop()

        pattern.outputs, pattern.spec = tree_flatten(result)
        tensors = [output for output in pattern.outputs if isinstance(output, torch.Tensor)]
        are_plain = all(isinstance(x, (torch.Tensor, torch.Size, *PLAIN)) for x in pattern.outputs)
        left_nothing = before == left_behind()
        still_holds = left_nothing and pattern.holds_for(block.tokens(Snapshot(self._around)))
        if are_plain and _are_tracked(tensors) and still_holds:
            END([*tensors, *inputs], pattern.key)  # a cast that does nothing is now an argument
            _patterns[pattern.key] = pattern
            block.family.patterns.append(pattern)
        else:
            block.family.broken = True
        return result


def _families(model: nn.Module, modules: Sequence[nn.Module]) -> list[BlockFamily]:
    """The modules of a model that are worth copying, grouped by structure."""
    families: dict[object, BlockFamily] = {}
    for module in modules:
        below = dict(module.named_modules(remove_duplicate=False))
        if module is model or len(below) < FEWEST or is_altered(below):
            continue
        family = families.setdefault(_structure(below), BlockFamily())
        family.blocks.append(Block(below, family))
    return list(families.values())


def _structure(modules: Mapping[str, nn.Module]) -> object:
    """The structure that blocks of one family share: classes, modes and tensors, by path."""
    structure: list[object] = []
    for path, module in modules.items():
        structure += [path, type(module), module.training]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            structure.append((name, _form(tensor)))
    return tuple(structure)


def _form(tensor: torch.Tensor | None) -> object:
    """The properties of a tensor that nodes computing with it depend on."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _holds_tokens(layer: object) -> bool:
    """Whether a layer of a cache holds keys and values."""
    tensors = (x for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return any(tensor.dim() > 1 for tensor in tensors)


def _described(
    leaves: Sequence[object], spec: object, inputs: Sequence[torch.Tensor], now: Snapshot
) -> list[object] | None:
    """A description of the call of a block; None if the call cannot be told from others.

    Args:
        leaves: The arguments.
        spec: Their tree.
        inputs: The tensors among them, and those of the block.
        now: Tells functions and classes apart.
    """
    if torch.is_autocast_enabled("cpu") or transforms_are_active():
        return None
    if not _are_tracked(inputs):
        return None
    call: list[object] = [spec, id(get_proxy_mode()), torch.is_grad_enabled()]
    first_positions: dict[int, int] = {}
    for position, tensor in enumerate(inputs):  # which of them are one tensor
        call.append(first_positions.setdefault(id(tensor), position))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            call += [leaf.dtype, leaf.device, leaf.requires_grad, *leaf.shape, *leaf.stride()]
        elif isinstance(leaf, (torch.Size, *PLAIN)):
            call.append((type(leaf), leaf))
        elif isinstance(leaf, NUMBERS):
            call.append(leaf)
        elif inspect.isroutine(leaf) or isinstance(leaf, type):
            call.append(now.token(leaf))
        else:
            return None
    return call


def _sized(call: Sequence[object]) -> list[object]:
    """A call with its sizes as torch knows them now: two that were apart may have become equal."""
    return [x.node.expr if isinstance(x, NUMBERS) else x for x in call]


def _are_tracked(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph has a node for each of these tensors, which are as any other."""
    mode = get_proxy_mode()
    if mode is None or any(tensor.layout is not torch.strided for tensor in tensors):
        return False
    return all(get_proxy_slot(tensor, mode.tracer, None) is not None for tensor in tensors)


def _count_of_unbacked_sizes(tensors: Sequence[torch.Tensor]) -> int:
    """The number of sizes in the trace so far that depend on values."""
    env = getattr(detect_fake_mode(tensors), "shape_env", None)
    if env is None:
        return 0
    return int(env.counter["create_unbacked_symbol"])
