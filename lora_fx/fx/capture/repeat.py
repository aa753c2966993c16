"""Repeated blocks: a call of a block like a traced one becomes a copy of the traced nodes.

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
from lora_fx.fx.capture.cache_layer import CacheLayer
from lora_fx.fx.capture.call import is_cache
from lora_fx.fx.capture.layer_number import LayerNumber, WatchedLayers, layer_of
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
"""The fewest modules in a block, itself included; copying fewer saves no time."""
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_MISSING = object()


_KEYS = count()
_patterns: dict[int, TracedCall] = {}
"""The patterns of the current trace by key; the opaque op reads output shapes from them."""


def _again(given: Sequence[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Return empty tensors like the outputs of a pattern."""
    return [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        for x in _patterns[key].outputs
        if isinstance(x, torch.Tensor)
    ]


torch.library.impl("lora_fx::block_again", _ALL, _again)
# outputs require gradients where those of the block would; no graph with such a node is run
torch.library.register_autograd("lora_fx::block_again", lambda *_: (None, None))


class Repeats:
    """The repeated blocks of a model, and their traced calls.

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
        """Find the places in which the blocks of a family differ."""
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
        """A block that traces the model; a call of a block like an earlier one is a single node."""
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
        """Return (class, attribute) of the attributes that differ between blocks, if watchable."""
        watched: set[tuple[type, str]] = set()
        for family in self.families:
            for path, name in family.differ - family.fixed:
                watched.update((type(block.modules[path]), name) for block in family.blocks)
        return watched

    def _attribute(self, name: str) -> property:
        """Return a property that records when an attribute is read."""

        def get(module: nn.Module) -> object:
            with_layer = self._open_with_layer(module, name)
            for pattern in self._open:
                if pattern not in with_layer:
                    pattern.reads(module, name)
            if name not in module.__dict__:
                raise AttributeError(name)  # nn.Module looks among its tensors then
            if with_layer:
                return LayerNumber(module, name, with_layer)
            return module.__dict__[name]

        def put(module: nn.Module, value: object) -> None:
            module.__dict__[name] = value

        return property(get, put, lambda module: module.__dict__.pop(name))

    def _open_with_layer(self, module: nn.Module, name: str) -> list[TracedCall]:
        """Return the open calls whose layer has the number in an attribute of a module."""
        return [pattern for pattern in self._open if pattern.knows_layer_by(module, name)]

    def _without_empty_cache(self, argument: Any) -> Any:
        """Return None for an empty cache, which holds no values; other arguments are returned."""
        if not is_cache(argument) or isinstance(vars(argument).get("layers"), WatchedLayers):
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
        """Return the forward of a class of blocks during a trace."""

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
        """Call a block: copy a traced call if one is the same; otherwise trace it as a pattern.

        A call that cannot be told from others is run as it is.
        """
        leaves, spec = tree_flatten((args, kwargs))
        layer = layer_of(block, leaves)
        cached = [*layer.tensors().values()] if layer else []
        arguments = [*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), *cached]
        inputs = [*arguments, *block.tensors()]
        now = Snapshot(self._around)
        call = None
        if block.is_as_compared():
            call = _described([*leaves, *cached], spec, inputs, layer, now)
        if call is None:
            return run(*args, **kwargs)
        call.append(run.func)
        call += [module.__dict__["training"] for module in block.modules.values()]

        tokens = block.tokens(now)
        sized_call = _sized(call)
        for pattern in block.family.patterns:
            if _sized(pattern.call) == sized_call and pattern.holds_for(tokens):
                return self._copy(pattern, block, inputs, layer)
        read = {*block.family.fixed}
        pattern = TracedCall(next(_KEYS), block, call, inputs, tokens, read, layer)
        return self._trace(pattern, run, args, kwargs)

    def _copy(
        self,
        pattern: TracedCall,
        block: Block,
        inputs: Sequence[torch.Tensor],
        layer: CacheLayer | None,
    ) -> object:
        """Add one opaque node for a call, fill the layer, and return the outputs as a tree."""
        self.copies += 1
        for outer in self._open:
            for path, name in pattern.read:
                outer.reads(block.modules[path], name)
        if layer is not None:
            for path, name in layer.places:
                WatchedLayers(layer.layers, self._open).asked_for_by(
                    self._open_with_layer(block.modules[path], name)
                )

        copied_outputs = iter(AGAIN(inputs, pattern.key))
        # an output that is an input of the pattern is that input of this call
        passed_on = {id(theirs): ours for theirs, ours in zip(pattern.inputs, inputs, strict=True)}
        outputs: list[object] = []
        for output in pattern.outputs:
            copied = next(copied_outputs) if isinstance(output, torch.Tensor) else output
            outputs.append(passed_on.get(id(output), copied))
        result, filled = tree_unflatten(outputs, pattern.spec)
        if layer is not None:
            layer.fill(filled)
        return result

    def _trace(
        self,
        pattern: TracedCall,
        run: partial[object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """Run a call between two marks; keep it as a pattern if it has no side effects."""
        block = pattern.block
        inputs = pattern.inputs
        layer = pattern.layer

        def left_behind() -> object:
            """Return the present state of everything that the call may change."""
            snapshot = Snapshot(self._around)
            tokens: list[object] = []
            for leaf in tree_leaves((args, kwargs)):
                if layer is None or leaf is not layer.cache:
                    tokens.append(snapshot.token(leaf))
            if layer is not None:
                # the other layers: WatchedLayers sees who asks the cache for them, and the
                # snapshots of the blocks hold those that their code reaches in another way
                tokens.append(layer.kind(snapshot))
            versions = [tensor._version for tensor in inputs]
            return versions, _count_of_unbacked_sizes(inputs), block.state(), tokens

        before = left_behind()
        START(inputs, pattern.key)
        self._open.append(pattern)
        watched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if layer is not None:
            watched = patched(layer.cache, layers=WatchedLayers(layer.layers, self._open))
        try:
            with watched:
                result = run(*args, **kwargs)
        finally:
            self._open.pop()

        filled = layer.tensors() if layer is not None else {}
        pattern.outputs, pattern.spec = tree_flatten((result, filled))
        tensors = [output for output in pattern.outputs if isinstance(output, torch.Tensor)]
        are_plain = all(isinstance(x, (torch.Tensor, torch.Size, *PLAIN)) for x in pattern.outputs)
        left_nothing = before == left_behind() and not pattern.strays
        still_holds = left_nothing and pattern.holds_for(block.tokens(Snapshot(self._around)))
        if are_plain and _are_tracked(tensors) and still_holds:
            END([*tensors, *inputs], pattern.key)  # a cast that does nothing is now an argument
            _patterns[pattern.key] = pattern
            block.family.patterns.append(pattern)
        else:
            block.family.broken = True
        return result


def _families(model: nn.Module, modules: Sequence[nn.Module]) -> list[BlockFamily]:
    """Return the modules of a model that are worth copying, grouped by structure."""
    families: dict[object, BlockFamily] = {}
    for module in modules:
        below = dict(module.named_modules(remove_duplicate=False))
        if module is model or len(below) < FEWEST or is_altered(below):
            continue
        family = families.setdefault(_structure(below), BlockFamily())
        family.blocks.append(Block(below, family))
    return list(families.values())


def _structure(modules: Mapping[str, nn.Module]) -> object:
    """Return the structure that blocks of a family share: classes, modes and tensors, by path."""
    structure: list[object] = []
    for path, module in modules.items():
        structure += [path, type(module), module.training]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            structure.append((name, _form(tensor)))
    return tuple(structure)


def _form(tensor: torch.Tensor | None) -> object:
    """Return the properties of a tensor that nodes computed from it depend on."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _holds_tokens(layer: object) -> bool:
    """Whether a layer of a cache holds keys and values."""
    tensors = (x for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return any(tensor.dim() > 1 for tensor in tensors)


def _described(
    leaves: Sequence[object],
    spec: object,
    inputs: Sequence[torch.Tensor],
    layer: CacheLayer | None,
    now: Snapshot,
) -> list[object] | None:
    """Return a description of a block's call; None if calls cannot be compared.

    Args:
        leaves: The arguments, and the tensors of the layer.
        spec: The tree of the arguments.
        inputs: The tensors among the leaves, and those of the block.
        layer: The layer that it fills of a cache among the arguments.
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
        elif layer is not None and leaf is layer.cache:
            call.append(layer.kind(now))
        else:
            return None
    return call


def _sized(call: Sequence[object]) -> list[object]:
    """Return a call with its sizes as torch has them now, since two sizes may have become equal."""
    return [x.node.expr if isinstance(x, NUMBERS) else x for x in call]


def _are_tracked(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors are strided and have nodes in the graph."""
    mode = get_proxy_mode()
    if mode is None or any(tensor.layout is not torch.strided for tensor in tensors):
        return False
    return all(get_proxy_slot(tensor, mode.tracer, None) is not None for tensor in tensors)


def _count_of_unbacked_sizes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the number of sizes in the trace so far that depend on values."""
    env = getattr(detect_fake_mode(tensors), "shape_env", None)
    if env is None:
        return 0
    return int(env.counter["create_unbacked_symbol"])
