"""What every pass returns and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Graph


@dataclass(frozen=True)
class PassResult(Generic[V]):
    """The graph that a pass was given, edited, and whether anything changed."""

    graph: Graph[V]
    modified: bool

    def __post_init__(self) -> None:
        """Drop what was computed of the graph before it was edited."""
        if self.modified:
            self.graph.changed()


class Pass(Protocol):
    """A frozen dataclass that is called on a graph; its fields are its options.

    A second run on the same graph must change nothing and report modified=False.
    """

    def __call__(self, graph: Graph[Any]) -> PassResult[Any]:
        """Edit the graph in place and say whether anything changed."""
