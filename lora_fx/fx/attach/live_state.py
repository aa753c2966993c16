"""The state of a module of an attached model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_fx.fx.attach.recording import Bound

Watcher = Callable[[nn.Module, Callable[[], Any], Any, Any], None]
"""Is told of a module's forward: it itself, to run again, its result, and that with the branch."""


@dataclass
class ActiveAdapter:
    """The switch that all modules of one model share; off means the base model's numbers.

    Attributes:
        on: Whether the updates count.
        watcher: Is told of every forward with a branch, while a proof asks for it.
    """

    on: bool = True
    watcher: Watcher | None = None


@dataclass
class Live:
    """The state of one module of an attached model.

    Attributes:
        switch: The switch of the model.
        weights: For each leaf, the program of W + ΔW and which reads it serves: always, or only
            those inside or outside of this module's own forward.
        output: The programs of the branch in eval and in train mode.
        merged: The leaf that has the branch, and the program of its W + ΔW, for a proof.
        stacks: The same for the products of each leaf that is a stack of matrices.
        formed: The leaves among these whose W + ΔW something has asked for.
        inside: True while the module's own forward runs, where a weight asks for that.
    """

    switch: ActiveAdapter
    weights: dict[str, tuple[Bound, str]] = field(default_factory=dict)
    output: tuple[Bound, Bound] | None = None
    merged: tuple[str, Bound] | None = None
    stacks: dict[str, tuple[Bound, Bound]] = field(default_factory=dict)
    formed: set[str] = field(default_factory=set)
    inside: bool = False
    frozen: bool = False
    gained: tuple[str, ...] = ()
