"""What `model.report()` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_fx.fx.effect import Effect
from lora_fx.targets.found import Found
from lora_fx.text import human


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

    @property
    def adapted_share(self) -> float:
        """Share of the weight FLOPs that run through an adapted target."""
        total = self.found.flops["reached"] + self.found.flops["refused"]
        return sum(t[3] for t in self.targets) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """The parts of docs/json.md that an adapted module knows."""
        return {
            **self.found.to_json(),
            "targets": [self.found[k].to_json(r, a) for k, r, a, _ in self.targets],
            "also_train": list(self.also_train),
            "trained": self.trained,
            "frozen": self.frozen,
            "adapted_share": round(self.adapted_share, 6),
            "effect": None if self.effect is None else str(self.effect),
        }

    def __str__(self) -> str:
        """A few lines."""
        lines = [
            f"{len(self.targets)} targets adapted ({self.adapted_share:.1%} of the weight FLOPs), "
            f"{human(self.trained)} of {human(self.trained + self.frozen)} parameters trained"
        ]
        lines += [f"  {k}: rank {r}, alpha {a:g}" for k, r, a, _ in self.targets]
        lines += [f"  {n}: trained whole" for n in self.also_train]
        if self.effect is not None:
            lines.append(f"  effect: {self.effect}")
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)
