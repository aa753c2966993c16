"""Targets, refusals, and the result of find: what an adapter can attach to, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx.ir.emitter import Parameter
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region
from lora_fx.text import human, table


def make_key(name: str, region: Region, shape: tuple[int, ...]) -> str:
    """`NAME`, or `NAME[a:b, c:d]` for a region: stored axes, half-open, full tail left out.

    >>> make_key("w", ((0, 4), (0, 6)), (4, 6)), make_key("w", ((1, 4), (0, 6)), (4, 6))
    ('w', 'w[1:4]')
    >>> make_key("w", ((0, 4), (2, 6)), (4, 6)), make_key("e", ((3, 4), (0, 6)), (8, 6))
    ('w[:, 2:6]', 'e[3]')
    """
    bounds = list(zip(region, shape, strict=True))
    while bounds and bounds[-1][0] == (0, bounds[-1][1]):
        bounds.pop()
    if not bounds:
        return name
    if len(bounds) == 1 and bounds[0][0][1] - bounds[0][0][0] == 1 and len(shape) > 1:
        return f"{name}[{bounds[0][0][0]}]"
    text = ", ".join(":" if (lo, hi) == (0, n) else f"{lo}:{hi}" for (lo, hi), n in bounds)
    return f"{name}[{text}]"


def split_key(key: str, shape: tuple[int, ...]) -> tuple[str, Region]:
    """The parameter's name and the region of a key, given the stored shape.

    >>> split_key("w[:, 2:6]", (4, 6))
    ('w', ((0, 4), (2, 6)))
    """
    if not key.endswith("]"):
        return key, tuple((0, n) for n in shape)
    name, _, text = key[:-1].rpartition("[")
    region = []
    for part, n in zip(text.split(","), shape, strict=False):
        lo, colon, hi = part.strip().partition(":")
        first = int(lo or 0)
        region.append((first, int(hi or n)) if colon else (first, first + 1))
    return name, (*region, *((0, n) for n in shape[len(region) :]))


def base_name(key: str) -> str:
    """The parameter's name of a key.

    >>> base_name("w[1:4]"), base_name("embed.weight@head.weight"), base_name("w@call:1[2:4]")
    ('w', 'embed.weight', 'w')
    """
    name = key.rpartition("[")[0] if key.endswith("]") else key
    return name.partition("@")[0]


def split_use(key: str) -> tuple[str, str]:
    """The key without its use, and the use; empty where it stands for all uses.

    >>> split_use("w@call:1[2:4]"), split_use("w[2:4]")
    (('w[2:4]', 'call:1'), ('w[2:4]', ''))
    """
    name, bracket, region = key.partition("[")
    name, _, use = name.partition("@")
    return name + bracket + region, use


@dataclass(frozen=True)
class Target:
    """A tensor, or a region of one, that an update can attach to.

    `op` is that of the first use that is no lookup; `uses` has every op that reads the tensor.
    `parts` are (role, key) of what a fused weight holds.
    """

    key: str
    parameter: Parameter
    region: Region
    layout: Layout
    op: str
    sites: tuple[Site, ...]
    role: str = ""
    default: bool = True
    why_not: str = ""
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def flops(self) -> int:
        """2 · multiply-adds of all uses at the example's sizes."""
        return sum(s.flops for s in self.sites)

    @property
    def no_grad(self) -> bool:
        """True when the model switches gradients off around every use."""
        return bool(self.sites) and all(s.no_grad for s in self.sites)

    @property
    def uses(self) -> tuple[str, ...]:
        """The ops that read this tensor, each once, in execution order."""
        return tuple(dict.fromkeys(s.op for s in self.sites))

    def to_json(self, rank: int | None = None, alpha: float | None = None) -> dict[str, Any]:
        """One row of `targets[]` in docs/json.md; with the rank and alpha of an update there."""
        return {
            "key": self.key,
            "aliases": list(self.parameter.aliases),
            "op": self.op,
            "uses": list(self.uses),
            "shape": list(self.layout.stored),
            "in": self.layout.in_size,
            "out": self.layout.out_size,
            "batch": list(self.layout.batch_shape),
            "dtype": self.parameter.dtype,
            "sites": len(self.sites),
            "flops": self.flops,
            "role": self.role,
            "default": self.default,
            "why_not": self.why_not,
            "parts": [{"role": r, "key": k} for r, k in self.parts],
            "rank": rank,
            "alpha": alpha,
        }


@dataclass(frozen=True)
class Refusal:
    """A use of a parameter that cannot be adapted, and why."""

    key: str
    op: str
    reason: str
    flops: int = 0

    def to_json(self) -> dict[str, Any]:
        """One row of `refusals[]`."""
        return {"key": self.key, "op": self.op, "reason": self.reason, "flops": self.flops}


@dataclass(frozen=True)
class Unreached:
    """A parameter of two or more dimensions that no weight matmul uses."""

    key: str
    shape: tuple[int, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """One row of `unreached[]`."""
        return {"key": self.key, "shape": list(self.shape), "reason": self.reason}


@dataclass(frozen=True)
class Found:
    """What find saw: targets, refusals and unreached parameters, in definition order.

    `optional` are weights that are refused by default only: `include` can name them.
    """

    targets: tuple[Target, ...]
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    data_flops: int = 0
    pinned: tuple[Any, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    optional: tuple[Target, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: str) -> Target:
        """The target of a key, of one of its aliases, of a region within it, or of one use."""
        target = self.get(key)
        if target is None:
            raise KeyError(key)
        return target

    def get(self, key: str) -> Target | None:
        """As indexing; None where there is none."""
        from lora_fx.regions import part  # a part is a target: both know this module
        from lora_fx.uses import of_use

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
        """FLOPs reached by targets, refused, and between activations."""
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
        return flops["reached"] / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        """targets, refusals, unreached, pinned and FLOPs, as docs/json.md says."""
        return {
            "targets": [t.to_json() for t in self.targets],
            "refusals": [r.to_json() for r in self.refusals],
            "unreached": [u.to_json() for u in self.unreached],
            "pinned": [p.to_json() for p in self.pinned],
            "flops": self.flops,
            "reached_share": round(self.reached_share, 6),
        }

    def __str__(self) -> str:
        """A table for people."""
        head = ("key", "op", "in", "out", "sites", "share", "role", "default")
        total = max(1, self.flops["reached"] + self.flops["refused"])
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
            )
            for t in self.targets
        ]
        lines = table([head, *rows]) if rows else ["no target"]
        if any(t.sites for t in self.targets):
            lines.append(
                f"{len(self.targets)} targets reach {self.reached_share:.1%} of the weight FLOPs "
                f"({human(self.flops['reached'])} of {human(total)}; "
                f"between activations {human(self.data_flops)})"
            )
        lines += [f"refused: {r.key} ({r.op}): {r.reason}" for r in self.refusals]
        lines += [f"unreached: {u.key} {list(u.shape)}: {u.reason}" for u in self.unreached]
        lines += [f"pinned: {p}" for p in self.pinned]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines)
