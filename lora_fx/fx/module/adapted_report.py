"""The report of a model with an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import (
    asked,
)
from lora_fx.compare import Parity, sizes_text
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.targets.target import Found
from lora_fx.text import Json, by_key, counted, html, human, short


def adapted_report(
    root: nn.Module, updates: Updates, found: Found, also: tuple[str, ...], notes: tuple[str, ...]
) -> AdaptedReport:
    """The report on a tree that holds the tensors of these updates."""
    rows = tuple((key, *asked(u), found[key].flops) for key, u in updates.items())
    trained = sum(p.numel() for p in root.parameters() if p.requires_grad)
    still = (n for n, p in root.named_parameters() if not p.requires_grad)
    # of codes the weights are counted, and not the bytes
    frozen = sum(math.prod(found.shapes.get(n) or parameter_of(root, n).shape) for n in still)
    return AdaptedReport(rows, also, trained, frozen, found, notes)


@dataclass(frozen=True)
class AdaptedReport:
    """What `model.report()` returns; prints as text."""

    targets: tuple[tuple[str, int, float, int], ...]
    also_train: tuple[str, ...]
    trained: int
    frozen: int
    found: Found
    notes: tuple[str, ...]
    effect: Effect | None = None
    adapters: tuple[str, ...] = ()
    parity: tuple[Parity, ...] = ()

    __repr__ = short

    def _repr_html_(self) -> str:
        """What is adapted, as a table for notebooks."""
        rows = [("key", "rank", "alpha"), *((k, str(r), f"{a:g}") for k, r, a, _ in self.targets)]
        return html(str(self).partition("\n")[0], rows)

    @property
    def adapted_share(self) -> float:
        """Share of the weight FLOPs that run through an adapted target."""
        total = self.found.weight_flops
        return sum(t[3] for t in self.targets) / total if total else 0.0

    def to_json(self) -> Json:
        """The parts of docs/json.md that an adapted module knows."""
        return {
            **self.found.to_json(),
            "targets": [self.found[k].to_json(r, a) for k, r, a, _ in self.targets],
            "also_train": list(self.also_train),
            "trained": self.trained,
            "frozen": self.frozen,
            "adapted_share": round(self.adapted_share, 6),
            "effect": None if self.effect is None else str(self.effect),
            "parity": [p.to_json() for p in self.parity],
        }

    def __str__(self) -> str:
        """A few lines."""
        targets = counted(len(self.targets), "target")
        lines = [
            f"{targets} adapted ({self.adapted_share:.1%} of the weight FLOPs), "
            f"{human(self.trained)} of {human(self.trained + self.frozen)} parameters trained"
        ]
        lines += [f"  {k}: rank {r}, alpha {a:g}" for k, r, a, _ in self.targets]
        lines += [f"  {n}: trained whole" for n in self.also_train]
        if self.effect is not None:
            lines.append(f"  effect: {self.effect}")
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        for of, rows in by_key((p.of, sizes_text(p.sizes)) for p in self.parity).items():
            lines.append(f"  {of}: compared with the model at {'; '.join(rows)}")
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Effect:
    """What the proof found.

    Attributes:
        dead: Key → the modes in which no gradient reaches it.
        modes: The modes that were proven.
        notes: What could not be proven, and why; and what training moves beside the adapter.
    """

    dead: Mapping[str, tuple[str, ...]]
    modes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        dead = ", ".join(f"{k} ({'/'.join(m)})" for k, m in self.dead.items())
        text = f"gradients reach every target in {' and '.join(self.modes) or 'no mode'}"
        if dead:
            text = f"no gradient reaches {dead}"
        return "; ".join([text, *self.notes])
