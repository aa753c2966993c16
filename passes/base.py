"""The result of a pass.

A pass is a frozen dataclass that is called on a graph, which it edits in place; its fields are its
options. A second run on the same graph changes nothing, and reports modified=False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Graph


@dataclass(frozen=True)
class PassResult(Generic[V]):
    """The graph that a pass was given, edited, and whether anything changed."""

    graph: Graph[V]
    modified: bool

    def __post_init__(self) -> None:
        """Drop all analyses of the graph from before the edit."""
        if self.modified:
            self.graph.changed()
