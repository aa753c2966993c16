"""Families of blocks: modules of one class and structure, with their traced calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from lora_fx.fx.capture.cache_layer import CacheLayer
from lora_fx.fx.capture.snapshot import Snapshot, Token, attributes_of_module
from lora_fx.fx.trees import LeafSpec, TreeSpec

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
CLASS = ""
"""The attribute name under which a module's class is listed."""
Place = tuple[str, str]
"""The place of an attribute in a block: (path of the module, name of the attribute)."""
Tokens = Mapping[Place, Token]
"""Place → the token of the attribute at this place."""


@dataclass(eq=False)
class Block:
    """A module of a family of similar modules, with its inner modules by path."""

    modules: dict[str, nn.Module]
    family: BlockFamily
    called: bool = False

    @property
    def top(self) -> nn.Module:
        """The module itself."""
        return self.modules[""]

    def tensors(self) -> list[torch.Tensor]:
        """Return the current parameters and buffers, which a trace replaces by others."""
        tensors: list[torch.Tensor] = []
        for module in self.modules.values():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensors.append(tensor)
        return tensors

    def attributes(self) -> dict[Place, object]:
        """Return the attributes of the block's modules, except tensors, modules and hooks."""
        attributes: dict[Place, object] = {}
        for path, module in self.modules.items():
            for name, attribute in attributes_of_module(module).items():
                attributes[path, name] = attribute
        return attributes

    def tokens(self, now: Snapshot) -> dict[Place, Token]:
        """Return the tokens of the block's attributes and of its modules' classes."""
        classes = {(path, CLASS): now.token(type(m)) for path, m in self.modules.items()}
        attributes = {place: now.token(x) for place, x in self.attributes().items()}
        return attributes | classes

    def state(self) -> list[object]:
        """Return the ids of what the modules hold, to see whether a call replaced anything."""
        attributes = self.attributes()
        return [*attributes, *map(id, attributes.values()), *map(id, self.tensors())]

    def is_as_compared(self) -> bool:
        """Whether the block still has the modules that were compared, and no hooks."""
        now = dict(self.top.named_modules(remove_duplicate=False))
        module_ids = [id(module) for module in now.values()]
        compared_ids = [id(module) for module in self.modules.values()]
        return module_ids == compared_ids and not is_altered(now)


@dataclass(eq=False)
class BlockFamily:
    """Modules of one class and structure.

    Attributes:
        blocks: The modules.
        differ: The places where not all blocks have the same.
        fixed: Places of `differ` of which it cannot be seen whether they are read: the class has
            the name too, or is what differs, or its code reads attributes by `vars`.
        patterns: Calls that were traced, which later ones may be copies of.
        broken: True once a call was such that no other can be its copy.
    """

    blocks: list[Block] = field(default_factory=list)
    differ: set[Place] = field(default_factory=set)
    fixed: set[Place] = field(default_factory=set)
    patterns: list[TracedCall] = field(default_factory=list)
    broken: bool = False

    @cached_property
    def numbers(self) -> frozenset[Place]:
        """Return the places where the blocks hold different whole numbers."""
        places: set[Place] = set()
        for path, name in self.differ - self.fixed:
            held = [block.modules[path].__dict__.get(name) for block in self.blocks]
            if all(type(x) is int for x in held) and len(set(held)) == len(held):
                places.add((path, name))
        return frozenset(places)


@dataclass(eq=False)
class TracedCall:
    """One traced call.

    Attributes:
        key: The number of the call, which its marks in the graph have too.
        block: The block that was called.
        call: How it was called; its sizes may be symbols.
        inputs: The tensors that it was called with, and those of its block.
        tokens: The tokens of what its block held then, and of what its code could reach.
        read: Those of the family's differing places that it read.
        layer: The layer of a cache that it was given.
        strays: True once it touched another layer of the cache.
        outputs: Its outputs and the tensors of the layer after it, flat.
        spec: Their tree.
    """

    key: int
    block: Block
    call: Sequence[object]
    inputs: Sequence[torch.Tensor]
    tokens: Tokens
    read: set[Place]
    layer: CacheLayer | None = None
    strays: bool = False
    outputs: list[object] = field(default_factory=list)
    spec: TreeSpec = field(default_factory=LeafSpec)

    def reads(self, module: nn.Module, name: str) -> None:
        """Record that the call read an attribute of a module, if blocks differ in it."""
        self.read |= self._differing_places_of(module, name)

    def _differing_places_of(self, module: nn.Module, name: str) -> set[Place]:
        """Return the family's differing places to which an attribute of a module belongs."""
        places: set[Place] = set()
        for path, differing_name in self.block.family.differ:
            is_of_block = self.block.modules[path].__dict__ is module.__dict__
            if differing_name == name and is_of_block:
                places.add((path, name))
        return places

    def knows_layer_by(self, module: nn.Module, name: str) -> bool:
        """Whether an attribute of a module is the number of the layer that the call received."""
        if self.layer is None:
            return False
        return bool(self.layer.places & self._differing_places_of(module, name))

    def holds_for(self, tokens: Tokens) -> bool:
        """Whether everything that the call may have read is the same in a block of these tokens."""
        unread = self.block.family.differ - self.read
        return differing_places(self.tokens, tokens) <= unread


def differing_places(tokens: Tokens, others: Tokens) -> set[Place]:
    """Return the places with different tokens, or with a token on one side only."""
    places = tokens.keys() ^ others.keys()
    for place in tokens.keys() & others.keys():
        if tokens[place] != others[place]:
            places.add(place)
    return places


def is_altered(modules: Mapping[str, nn.Module]) -> bool:
    """Whether hooks or a replaced forward change what some module does.

    Hooks of the first module, whose path is empty, run outside of its forward.
    """
    if any("forward" in module.__dict__ for module in modules.values()):
        return True
    for path, module in modules.items():
        if path and any(getattr(module, hooks, ()) for hooks in _HOOKS):
            return True
    return False
