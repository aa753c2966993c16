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
from lora_fx.targets.found import Found
from lora_fx.text import Json, by_key, counted, html, human, short


def adapted_report(
    root: nn.Module, updates: Updates, found: Found, also: tuple[str, ...], notes: tuple[str, ...]
) -> AdaptedReport:
    """Make the report on a tree that holds the tensors of these updates."""
    rows = []
    for key, update in updates.items():
        rank, alpha = asked(update)
        rows.append((key, rank, alpha, found[key].flops))
    trained = 0
    frozen = 0
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            # of codes the weights are counted, and not the bytes
            frozen += math.prod(found.shapes.get(name) or parameter.shape)
    return AdaptedReport(tuple(rows), also, trained, frozen, found, notes)


@dataclass(frozen=True)
class AdaptedReport:
    """The report on a model with an adapter; it prints as text."""

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
        """Return a table of the adapted targets, for notebooks."""
        rows = [("key", "rank", "alpha")]
        for key, rank, alpha, _ in self.targets:
            rows.append((key, str(rank), f"{alpha:g}"))
        return html(str(self).partition("\n")[0], rows)

    @property
    def adapted_share(self) -> float:
        """The share of the weight FLOPs that run through an adapted target."""
        total = self.found.weight_flops
        if not total:
            return 0.0
        return sum(flops for *_, flops in self.targets) / total

    def to_json(self) -> Json:
        """Return the fields of docs/json.md that concern an adapted module."""
        targets = [self.found[key].to_json(rank, alpha) for key, rank, alpha, _ in self.targets]
        return {
            **self.found.to_json(),
            "targets": targets,
            "also_train": list(self.also_train),
            "trained": self.trained,
            "frozen": self.frozen,
            "adapted_share": round(self.adapted_share, 6),
            "effect": None if self.effect is None else str(self.effect),
            "parity": [parity.to_json() for parity in self.parity],
        }

    def __str__(self) -> str:
        """Return the report as a few lines of text."""
        targets = counted(len(self.targets), "target")
        lines = [
            f"{targets} adapted ({self.adapted_share:.1%} of the weight FLOPs), "
            f"{human(self.trained)} of {human(self.trained + self.frozen)} parameters trained"
        ]
        for key, rank, alpha, _ in self.targets:
            lines.append(f"  {key}: rank {rank}, alpha {alpha:g}")
        lines += [f"  {name}: trained whole" for name in self.also_train]
        if self.effect is not None:
            lines.append(f"  effect: {self.effect}")
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        compared = by_key((parity.of, sizes_text(parity.sizes)) for parity in self.parity)
        for output, sizes in compared.items():
            lines.append(f"  {output}: compared with the model at {'; '.join(sizes)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Effect:
    """The result of the proof of effect.

    Attributes:
        dead: Key → the modes in which no gradient reaches it.
        modes: The modes that were proven.
        notes: Cases without a proof, and why; tensors that training moves beside the adapter.
    """

    dead: Mapping[str, tuple[str, ...]]
    modes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the result as one line."""
        text = f"gradients reach every target in {' and '.join(self.modes) or 'no mode'}"
        dead = [f"{key} ({'/'.join(modes)})" for key, modes in self.dead.items()]
        if dead:
            text = f"no gradient reaches {', '.join(dead)}"
        return "; ".join([text, *self.notes])
