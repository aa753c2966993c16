"""What find saw of a model: its targets, its refusals and the parameters that nothing reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, near
from lora_fx.targets.regions import of_use, part
from lora_fx.targets.target import Target, split_use
from lora_fx.text import Json, html, human, some, table


@dataclass(frozen=True)
class Found:
    """What find saw of a model, in definition order.

    Attributes:
        targets: What can be adapted.
        refusals: Uses of parameters that cannot, with the reason.
        unreached: Parameters of two or more dimensions that no weight matmul uses.
        data_flops: FLOPs of the matmuls between activations, at the example's sizes.
        pinned: Dimensions that the capture had to fix.
        ranges: The sizes that the captured graph is true for; elsewhere another one is captured.
        notes: What had to be said on the way.
        optional: Weights that are refused by default only: `include` can name them.
        shapes: Stored shape by parameter name, aliases too.
    """

    targets: tuple[Target, ...]
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    data_flops: int = 0
    pinned: tuple[Any, ...] = ()
    ranges: tuple[Condition, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    optional: tuple[Target, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: str) -> Target:
        """The target of a key, of one of its aliases, of a region within it, or of one use."""
        target = self.get(key)
        if target is None:
            raise LoraFxError(f"{key!r} is no target of the model", near(key, self.by_key))
        return target

    def get(self, key: str) -> Target | None:
        """The target of a key, as by indexing; None where there is none."""
        whole = self.by_key.get(key)
        if whole is not None:
            return whole
        plain, use = split_use(key)
        if use:
            shared = self.get(plain)
            return None if shared is None else of_use(shared, use)
        if not key.endswith("]"):
            return None
        every = (part(t, key) for t in (*self.targets, *self.optional))
        return next((t for t in every if t is not None), None)

    @property
    def by_key(self) -> Mapping[str, Target]:
        """Targets by key, and by alias where the key is a whole parameter; optional ones too."""
        every = (*self.targets, *self.optional)
        names = {a: t for t in every if "[" not in t.key for a in t.parameter.aliases}
        return {**names, **{t.key: t for t in every}}

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of one forward that targets reach, that no branch does, and between activations."""
        return {
            "reached": sum(t.flops for t in self.targets),
            "refused": sum(r.flops for r in self.refusals),
            "data": self.data_flops,
        }

    @property
    def reached_share(self) -> float:
        """Share of the weight FLOPs that targets reach; 1 where no weight matmul costs any."""
        flops = self.flops
        total = flops["reached"] + flops["refused"]
        unknown = any("insert" in r.verbs for r in self.refusals)  # a product of unknown size
        return flops["reached"] / total if total else float(not unknown)

    def to_json(self) -> Json:
        """Targets, refusals, unreached, pinned and FLOPs, as docs/json.md says."""
        return {
            "targets": [t.to_json() for t in self.targets],
            "refusals": [r.to_json() for r in self.refusals],
            "unreached": [u.to_json() for u in self.unreached],
            "pinned": [p.to_json() for p in self.pinned],
            "ranges": [c.to_json() for c in self.ranges],
            "flops": self.flops,
            "reached_share": round(self.reached_share, 6),
        }

    def __repr__(self) -> str:
        """The targets and their shapes, and how much cannot be adapted."""
        shapes = [f"{t.key} {list(t.parameter.shape)}" for t in self.targets]
        return f"Found({some(shapes) or 'no target'}; {len(self.refusals)} refusals)"

    def _repr_html_(self) -> str:
        """The table of targets, for notebooks."""
        return html(f"{len(self.targets)} targets", self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("key", "op", "in", "out", "sites", "share", "role", "default")
        total = max(1, self.flops["reached"] + self.flops["refused"])
        formats = any(t.parameter.format for t in self.targets)
        head += ("format",) * formats
        rows = [
            (
                t.key,
                "+".join(t.uses),
                "×".join(map(str, (*t.layout.batch_shape, t.layout.in_size))),
                str(t.layout.out_size),
                str(len(t.sites)),
                f"{t.flops / total:6.1%}",
                t.role or "+".join(r or "?" for r, _ in t.parts),
                "yes" if t.default else f"no: {t.why_not}",
                *(f"{t.parameter.format} {t.parameter.bits or ''}".strip(),) * formats,
            )
            for t in self.targets
        ]
        return [head, *rows]

    def __str__(self) -> str:
        """A table for people."""
        total = max(1, self.flops["reached"] + self.flops["refused"])
        lines = table(self._rows()) if self.targets else ["no target"]
        if any(t.sites for t in self.targets):
            lines.append(
                f"{len(self.targets)} targets reach {self.reached_share:.1%} of the weight FLOPs "
                f"({human(self.flops['reached'])} of {human(total)}; "
                f"between activations {human(self.data_flops)})"
            )
        lines += [f"also read: {t.said}" for t in self.targets if t.said]
        coded = [r for r in self.refusals if r.verbs and "insert" not in r.verbs]
        if coded:
            more = f" and {len(coded) - 1} more" * (len(coded) > 1)
            verbs = " or ".join(coded[0].verbs)
            lines.append(f"no {verbs}, only branches: {coded[0].key}{more}: {coded[0].reason}")
        rest = [r for r in self.refusals if r not in coded]
        lines += [f"refused: {r.key} ({r.op}): {r.reason}" for r in rest]
        lines += [f"unreached: {u.key} {list(u.shape)}: {u.reason}" for u in self.unreached]
        lines += [f"pinned: {p}" for p in self.pinned]
        lines += [f"captured for: {c}" for c in self.ranges]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Refusal:
    """A use of a parameter that cannot be adapted, and why; `verbs` refuse it even by its name."""

    key: str
    op: str
    reason: str
    flops: int = 0
    verbs: tuple[str, ...] = ("insert", "attach", "fold", "merge", "export")

    def to_json(self) -> Json:
        """One row of `refusals[]`."""
        return {**vars(self), "verbs": list(self.verbs)}


@dataclass(frozen=True)
class Unreached:
    """A parameter of two or more dimensions that no weight matmul uses."""

    key: str
    shape: tuple[int, ...]
    reason: str

    def to_json(self) -> Json:
        """One row of `unreached[]`."""
        return {**vars(self), "shape": list(self.shape)}
