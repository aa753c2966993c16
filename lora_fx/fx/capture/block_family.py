"""Modules of one class and structure, and the calls of them that were traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_fx.fx.capture.snapshot import Snapshot, Token, held
from lora_fx.fx.trees import LeafSpec, TreeSpec

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
CLASS = ""
"""Stands for a module's class among the names of what it holds."""
Tokens = Mapping[tuple[str, str], Token]
"""(path in a block, attribute) → the token of what is held there."""


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
        classes = {(p, CLASS): now.token(type(m)) for p, m in self.modules.items()}
        return {at: now.token(v) for at, v in self.held().items()} | classes

    def state(self) -> list[object]:
        """Which things its modules hold, to see whether a call has put others in their places."""
        things = self.held()
        return [*things, *map(id, things.values()), *map(id, self.tensors())]

    def as_found(self) -> bool:
        """Whether it has the modules still that it was compared with others by, and no hooks."""
        now = dict(self.modules[""].named_modules(remove_duplicate=False))
        return [*map(id, now.values())] == [*map(id, self.modules.values())] and not is_altered(now)


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
        return differing_tokens(self.told, told) <= self.block.family.differ - self.read


def is_altered(modules: Mapping[str, nn.Module]) -> bool:
    """Whether some module does more, or other things, than the forward of its class."""
    own = any("forward" in m.__dict__ for m in modules.values())
    return own or any(getattr(m, k, ()) for path, m in modules.items() if path for k in _HOOKS)


def differing_tokens(a: Tokens, b: Tokens) -> set[tuple[str, str]]:
    """What has another token in the one than in the other, or is in one of them only."""
    return {n for n in a.keys() | b.keys() if n not in a or n not in b or a[n] != b[n]}
