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
    differing_tokens,
    is_altered,
)
from lora_fx.fx.capture.call import is_cache
from lora_fx.fx.capture.snapshot import PLAIN, READS_ALL, Snapshot
from lora_fx.fx.fake_tensors import detect_fake_mode
from lora_fx.fx.interception import get_proxy_mode, get_proxy_slot, transforms_are_active
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
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_MISSING = object()


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
            if len(below) >= FEWEST and module is not model and not is_altered(below):
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
        family.differ = {n for told in every for n in differing_tokens(every[0], told)}
        family.fixed = {
            (path, name)
            for path, name in family.differ
            if name == CLASS or hasattr(type(first[path]), name) or now.names & READS_ALL
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


def _structure(modules: Mapping[str, nn.Module]) -> object:
    """What blocks have to share: classes, modes and shapes of tensors, by path."""

    def shape(t: torch.Tensor | None) -> object:
        return t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)

    parts: list[object] = []
    for path, m in modules.items():
        tensors = (*m._parameters.items(), *m._buffers.items())
        parts += [path, type(m), m.training, *((n, shape(t)) for n, t in tensors)]
    return tuple(parts)


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
