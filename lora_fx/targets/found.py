"""The result of find: a model's targets, its refusals, and parameters that no matmul uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """The targets of a model, and what cannot be adapted, in definition order.

    Attributes:
        targets: The tensors that can be adapted.
        refusals: Uses of parameters that cannot, with the reason.
        unreached: Parameters of two or more dimensions that no weight matmul uses.
        data_flops: FLOPs of the matmuls between activations, at the example's sizes.
        pinned: Dimensions that the capture had to fix.
        ranges: The sizes that the captured graph is true for; elsewhere another one is captured.
        notes: Sentences on the search for the user.
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
        """Return the target of a key, of an alias, of a region within a target, or of one use."""
        target = self.get(key)
        if target is None:
            raise LoraFxError(f"{key!r} is not a target of the model", near(key, self.by_key))
        return target

    def __contains__(self, key: object) -> bool:
        """Whether indexing with the key gives a target."""
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        """The keys of the targets, in definition order."""
        return iter(self.by_key)

    def get(self, key: str) -> Target | None:
        """Return the target of a key, as by indexing; None if there is none.

        Keys are our own language of regions and uses. What a foreign name means is looked up before
        it becomes a key, by the rules of `lora_fx.targets.names`.
        """
        target = self.by_key.get(key)
        if target is not None:
            return target
        plain, use = split_use(key)
        if use:
            target_of_all_uses = self.get(plain)
            if target_of_all_uses is None:
                return None
            return target_of_all_uses.of_use(use)
        if not key.endswith("]"):
            return None
        for target in (*self.targets, *self.optional):
            part = target.part(key)
            if part is not None:
                return part
        return None

    @cached_property  # asked for every key of a plan and an adapter
    def by_key(self) -> Mapping[str, Target]:
        """Targets by key, and by alias for whole parameters; optional targets included."""
        by_alias: dict[str, Target] = {}
        by_own_key: dict[str, Target] = {}
        for target in (*self.targets, *self.optional):
            by_own_key[target.key] = target
            if "[" not in target.key:
                by_alias |= dict.fromkeys(target.parameter.aliases, target)
        return {**by_alias, **by_own_key}

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of one forward: of targets, refused and unreached weights, and pure activations."""
        return {
            "reached": sum(target.flops for target in self.targets),
            "refused": sum(refusal.flops for refusal in self.refusals),
            "unreached": sum(parameter.flops for parameter in self.unreached),
            "data": self.data_flops,
        }

    @property
    def weight_flops(self) -> int:
        """FLOPs of one forward in all products of weights, including refused and unreached ones."""
        flops = self.flops
        return flops["reached"] + flops["refused"] + flops["unreached"]

    @property
    def reached_share(self) -> float:
        """The share of the weight FLOPs that targets reach; 1 if no weight matmul costs any."""
        total = self.weight_flops
        if total:
            return self.flops["reached"] / total
        has_unknown_product = any("insert" in refusal.verbs for refusal in self.refusals)
        return 0.0 if has_unknown_product else 1.0

    def to_json(self) -> Json:
        """Return targets, refusals, unreached, pinned and FLOPs, as in docs/json.md."""
        names = ("targets", "refusals", "unreached", "pinned", "ranges")
        rows: Json = {name: [row.to_json() for row in getattr(self, name)] for name in names}
        rows["flops"] = self.flops
        rows["flops_at"] = {name: list(shape) for name, shape in self.sizes.items()}
        return {**rows, "reached_share": round(self.reached_share, 6)}

    def __repr__(self) -> str:
        """The targets and their shapes, and the count of what cannot be adapted."""
        shapes = [f"{target.key} {list(target.parameter.shape)}" for target in self.targets]
        refusals = counted(len(self.refusals), "refusal")
        return f"Found({some(shapes) or 'no target'}; {refusals})"

    def _repr_html_(self) -> str:
        """The table of targets, for notebooks."""
        return html(counted(len(self.targets), "target"), self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        """A table of the targets; its first row has the names of the columns."""
        header = ["key", "op", "in", "out", "sites", "share", "role", "default"]
        with_format = any(target.parameter.format for target in self.targets)
        if with_format:
            header.append("format")
        rows = [tuple(header)]
        total = max(1, self.weight_flops)
        for target in self.targets:
            in_sizes = (*target.layout.batch_shape, target.layout.in_size)
            row = [
                target.key,
                "+".join(target.uses),
                "×".join(map(str, in_sizes)),
                str(target.layout.out_size),
                str(len(target.sites)),
                f"{target.flops / total:6.1%}",
                target.role or _roles_of_parts(target),
                "yes" if target.default else f"no: {target.why_not}",
            ]
            if with_format:
                row.append(f"{target.parameter.format} {target.parameter.bits or ''}".strip())
            rows.append(tuple(row))
        return rows

    def __str__(self) -> str:
        """A table for people."""
        lines = table(self._rows()) if self.targets else ["no target"]
        if any(target.sites for target in self.targets):
            lines.append(self._reach())
        lines += [f"also read: {target.said}" for target in self.targets if target.said]
        lines += self._refusal_lines()
        for parameter in self.unreached:
            lines.append(f"unreached: {parameter.key} {list(parameter.shape)}: {parameter.said}")
        lines += [f"pinned: {dimension}" for dimension in self.pinned]
        lines += [f"captured for: {condition}" for condition in self.ranges]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(map(visible, lines))  # a name from a file may have line breaks

    def _reach(self) -> str:
        """Return a line on the share of the FLOPs that the targets reach."""
        count = len(self.targets)
        targets = "1 target reaches" if count == 1 else f"{count} targets reach"
        total = max(1, self.weight_flops)
        sizes = f", at {sizes_text(self.sizes)}" if self.sizes else ""
        return (
            f"{targets} {self.reached_share:.1%} of the weight FLOPs "
            f"({human(self.flops['reached'])} of {human(total)}; "
            f"between activations {human(self.data_flops)}){sizes}"
        )

    def _refusal_lines(self) -> list[str]:
        """Lines on refusals: one for weights with branches, then one for each other reason."""
        lines = []
        only_branches = []
        refused = []
        for refusal in self.refusals:
            if refusal.verbs and "insert" not in refusal.verbs:
                only_branches.append(refusal)
            else:
                refused.append(refusal)
        if only_branches:
            first = only_branches[0]
            keys_text = first.key
            if len(only_branches) > 1:
                keys_text += f" and {len(only_branches) - 1} more"
            verbs = " or ".join(first.verbs)
            lines.append(f"no {verbs}, only branches: {keys_text}: {first.reason}")
        alike = by_key(((refusal.op, refusal.reason), refusal.key) for refusal in refused)
        for (op, reason), keys in alike.items():
            lines.append(f"refused: {some(keys)} ({op}): {reason}")
        return lines


def _roles_of_parts(target: Target) -> str:
    """Return the roles of a fused weight's parts in words, such as q+k+v, or 3 parts.

    Parts without a role are counted: `gate+1 part`.
    """
    roles = [role for role, _ in target.parts if role]
    others = len(target.parts) - len(roles)
    if others:
        roles.append(counted(others, "part"))
    return "+".join(roles)


@dataclass(frozen=True)
class Refusal:
    """A use of a parameter that cannot be adapted; `verbs` refuse it even if it is named."""

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
    """FLOPs of the products with rows that are gathered from the parameter."""

    @property
    def said(self) -> str:
        """The reason, and the FLOPs if there are any."""
        if not self.flops:
            return self.reason
        return f"{self.reason}; {human(self.flops)} FLOPs are products with gathered rows"

    def to_json(self) -> Json:
        """One row of `unreached[]`."""
        return {**vars(self), "shape": list(self.shape)}
