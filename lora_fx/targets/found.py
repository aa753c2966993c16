"""What find saw of a model: targets, refusals, parameters out of reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_fx.compare import sizes_text
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, near, visible
from lora_fx.targets.keys import split_use
from lora_fx.targets.target import Target
from lora_fx.text import Json, by_key, counted, html, human, some, table


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
        first_names: Any name of a parameter → the first one of the same tensor.
        sizes: The shapes of the inputs that FLOPs are counted at; empty where none are known.
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
    first_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Target:
        """The target of a key, of one of its aliases, of a region within it, or of one use."""
        target = self.get(key)
        if target is None:
            raise LoraFxError(f"{key!r} is no target of the model", near(key, self.by_key))
        return target

    def get(self, key: str) -> Target | None:
        """The target of a key, as by indexing; None where there is none.

        Keys are our own language of regions and uses. What a foreign name means is looked up before
        it becomes a key, by the rules of `lora_fx.targets.names`.
        """
        whole = self.by_key.get(key)
        if whole is not None:
            return whole
        plain, use = split_use(key)
        if use:
            shared = self.get(plain)
            return None if shared is None else shared.of_use(use)
        if not key.endswith("]"):
            return None
        every = (t.part(key) for t in (*self.targets, *self.optional))
        return next((t for t in every if t is not None), None)

    @cached_property  # asked for every key of a plan and an adapter
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
            "unreached": sum(u.flops for u in self.unreached),
            "data": self.data_flops,
        }

    @property
    def weight_flops(self) -> int:
        """FLOPs of one forward of all products of weights, whether a branch can reach them."""
        flops = self.flops
        return flops["reached"] + flops["refused"] + flops["unreached"]

    @property
    def reached_share(self) -> float:
        """Share of the weight FLOPs that targets reach; 1 where no weight matmul costs any."""
        total = self.weight_flops
        unknown = any("insert" in r.verbs for r in self.refusals)  # a product of unknown size
        return self.flops["reached"] / total if total else float(not unknown)

    def to_json(self) -> Json:
        """Targets, refusals, unreached, pinned and FLOPs, as docs/json.md says."""
        names = ("targets", "refusals", "unreached", "pinned", "ranges")
        rows: Json = {name: [row.to_json() for row in getattr(self, name)] for name in names}
        rows["flops"] = self.flops
        rows["flops_at"] = {name: list(shape) for name, shape in self.sizes.items()}
        return {**rows, "reached_share": round(self.reached_share, 6)}

    def __repr__(self) -> str:
        """The targets and their shapes, and how much cannot be adapted."""
        shapes = [f"{t.key} {list(t.parameter.shape)}" for t in self.targets]
        return f"Found({some(shapes) or 'no target'}; {counted(len(self.refusals), 'refusal')})"

    def _repr_html_(self) -> str:
        """The table of targets, for notebooks."""
        return html(counted(len(self.targets), "target"), self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("key", "op", "in", "out", "sites", "share", "role", "default")
        total = max(1, self.weight_flops)
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
        total = max(1, self.weight_flops)
        lines = table(self._rows()) if self.targets else ["no target"]
        if any(t.sites for t in self.targets):
            reach = (
                "1 target reaches"
                if len(self.targets) == 1
                else f"{len(self.targets)} targets reach"
            )
            lines.append(
                f"{reach} {self.reached_share:.1%} of the weight FLOPs "
                f"({human(self.flops['reached'])} of {human(total)}; "
                f"between activations {human(self.data_flops)})"
                + (f", at {sizes_text(self.sizes)}" if self.sizes else "")
            )
        lines += [f"also read: {t.said}" for t in self.targets if t.said]
        coded = [r for r in self.refusals if r.verbs and "insert" not in r.verbs]
        if coded:
            more = f" and {len(coded) - 1} more" * (len(coded) > 1)
            verbs = " or ".join(coded[0].verbs)
            lines.append(f"no {verbs}, only branches: {coded[0].key}{more}: {coded[0].reason}")
        rest = [r for r in self.refusals if r not in coded]
        alike = by_key(((r.op, r.reason), r.key) for r in rest)
        lines += [f"refused: {some(keys)} ({op}): {why}" for (op, why), keys in alike.items()]
        lines += [f"unreached: {u.key} {list(u.shape)}: {u.said}" for u in self.unreached]
        lines += [f"pinned: {p}" for p in self.pinned]
        lines += [f"captured for: {c}" for c in self.ranges]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(map(visible, lines))  # a name from a file may have line breaks


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
    flops: int = 0
    """FLOPs of the products of what is gathered from it."""

    @property
    def said(self) -> str:
        """The reason, with what it costs."""
        if not self.flops:
            return self.reason
        return f"{self.reason}, and {human(self.flops)} FLOPs are products of what is gathered"

    def to_json(self) -> Json:
        """One row of `unreached[]`."""
        return {**vars(self), "shape": list(self.shape)}
