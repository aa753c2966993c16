"""What each module of an attached model gets, as plain data by module path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx.adapter.lowrank import LowRank
from lora_fx.fx.eager import Program
from lora_fx.targets.found import Found


@dataclass
class Form:
    """What one module gets: programs by leaf and where they apply, or a branch."""

    weights: dict[str, tuple[Program, str]] = field(default_factory=dict)
    output: tuple[Program, Program] | None = None


class Planner:
    """Decides the forms of a set of updates; see passes/forms.py. Copies share it."""

    found: Found
    notes: tuple[str, ...] = ()

    def forms(
        self, updates: Mapping[str, LowRank], by_weight: frozenset[str] = frozenset()
    ) -> dict[str, Form]:
        """Module path → Form. Modules in `by_weight` get no branch."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        """The graph behind it is never changed."""
        return self
