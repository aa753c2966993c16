"""What an update can attach to: a tensor of a model, or a region of one, with its uses."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lora_fx.errors import LoraFxError
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region
from lora_fx.targets.keys import applies, base_name, make_key, split_key, split_use
from lora_fx.targets.regions import contains, overlap, relative
from lora_fx.text import Json


@dataclass(frozen=True)
class Target:
    """A tensor, or a region of one, that an update can attach to.

    Attributes:
        key: `NAME` or `NAME[region]`, and `NAME@USE` for one use of a shared tensor.
        parameter: The stored tensor, with all its names.
        region: Half-open bounds for each stored axis.
        layout: How [*batch, out, in] of an update lies in the region.
        op: The op of the first use that is no lookup; `uses` has every op.
        sites: Every use in the graph; empty where targets come from tensor names alone.
        role: One of `lora_fx.targets.selectors.ROLES`, or an empty text.
        default: Whether the default plan takes it; if not, `why_not` is the reason.
        parts: (role, key) of each part that a fused weight holds.
        other_readers: Ops that read the tensor for more than these products, such as a norm: an
            update does not reach them, and a merge into a checkpoint would.
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
    other_readers: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What its other readers mean for an update, for people; empty where there are none."""
        ops = ", ".join(self.other_readers)
        return f"{self.key}: read by {ops} too, where no update reaches it" if ops else ""

    @property
    def flops(self) -> int:
        """2 · multiply-adds of all uses, at the example's sizes."""
        return sum(s.flops for s in self.sites)

    @property
    def no_fold(self) -> str:
        """Why nothing can be stored into the weight of one of its uses; empty where it can."""
        return next((s.no_fold for s in self.sites if s.no_fold), "")

    @property
    def no_grad(self) -> bool:
        """True when the model switches gradients off around every use."""
        return bool(self.sites) and all(s.no_grad for s in self.sites)

    @property
    def uses(self) -> tuple[str, ...]:
        """The ops that read this tensor, each once, in execution order."""
        return tuple(dict.fromkeys(s.op for s in self.sites))

    def holds(self, other: Target) -> bool:
        """True where the other's region is of the same tensor, and lies in this one's."""
        same = self.parameter.name == other.parameter.name
        return same and contains(self.region, other.region)

    @property
    def tied(self) -> bool:
        """True when a lookup shares the tensor with another op."""
        return "embedding" in self.uses and len(self.uses) > 1

    @property
    def of_several(self) -> bool:
        """True for one update of all uses, where a lookup or several modules share the tensor.

        No file of another tool can say that.
        """
        return not split_use(self.key)[1] and (self.tied or len(self.modules) > 1)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of a tensor in whose modules it is used."""
        scopes = {s.scope for s in self.sites if s.scope}
        return tuple(n for n in self.parameter.names if n.rpartition(".")[0] in scopes)

    def names_of(self, site: Site) -> list[str]:
        """The names of the tensor that lie in the module of one use."""
        scope = site.scope
        return [n for n in self.parameter.names if scope and n.rpartition(".")[0] == scope]

    @property
    def each_use(self) -> tuple[str, ...]:
        """A name for every use: its alias or op where that is its alone, else the call."""
        result = []
        for i, site in enumerate(self.sites):
            options = [*self.names_of(site), f"op:{site.op}"]
            alone = (u for u in options if [s.id for s in self.sites if applies(u, s)] == [site.id])
            result.append(next(alone, f"call:{i}"))
        return tuple(result)

    def named_use(self, name: str, *, lookup: bool) -> str:
        """The use that one name of a tied tensor means: its own module's, else the matmul's.

        Of an update of a lookup it is the lookup, whatever the name.
        """
        scope = name.rpartition(".")[0]
        if not lookup and any(s.scope == scope for s in self.sites):
            return name
        op = ""
        for site in (s for s in self.sites if (s.op == "embedding") == lookup):
            if own := self.names_of(site):
                return own[0]
            op = op or f"op:{site.op}"
        return op

    def of_use(self, use: str) -> Target | None:
        """The target with some of its uses, under the key `NAME@USE`; None where it has none."""
        known = use.startswith(("op:", "call:")) or use in self.parameter.names
        if use.startswith("call:"):
            sites = tuple(s for i, s in enumerate(self.sites) if use == f"call:{i}")
        else:
            sites = tuple(s for s in self.sites if known and applies(use, s))
        if not sites:
            return None
        name, bracket, region = self.key.partition("[")
        op = next((s.op for s in sites if s.op != "embedding"), "embedding")
        return replace(self, key=f"{name}@{use}{bracket}{region}", sites=sites, op=op, parts=())

    def keys_of(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """Keys of the updates that reach some uses and no other; its own for all uses."""
        left = {s.id for s in sites}
        if all(s.id in left for s in self.sites):
            return (self.key,)
        calls = (f"call:{i}" for i in range(len(self.sites)))
        names = (*self.modules, *(f"op:{o}" for o in self.uses), *calls)
        known = [one for n in names if (one := self.of_use(n)) is not None]
        reached = [(one.key, {s.id for s in one.sites}) for one in known]
        result = [key for key, ids in reached if ids == left][:1]
        for key, ids in reached if not result else ():
            if ids <= left:
                result.append(key)
                left -= ids
        return tuple(result)

    def part(self, key: str, role: str = "") -> Target | None:
        """The target of a key that names a region within this one; None where it names none."""
        if base_name(key) not in self.parameter.names or key == base_name(key):
            return None
        try:
            _, region = split_key(key, self.parameter.shape)
        except ValueError:
            return None
        if len(region) != len(self.region) or not contains(self.region, region):
            return None
        layout = self.layout.narrow(relative(region, self.region))
        if layout is None:
            return None
        name = make_key(self.parameter.name, region, self.parameter.shape)
        found = role or next((r for r, k in self.parts if k == name), self.role)
        return replace(self, key=name, region=region, layout=layout, role=found, parts=())

    def to_json(self, rank: int | None = None, alpha: float | None = None) -> Json:
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
            "format": self.parameter.format,
            "bits": self.parameter.bits,
            "sites": len(self.sites),
            "flops": self.flops,
            "role": self.role,
            "default": self.default,
            "why_not": self.why_not,
            "parts": [{"role": r, "key": k} for r, k in self.parts],
            "other_readers": list(self.other_readers),
            "rank": rank,
            "alpha": alpha,
        }


def check_storable(target: Target, what: str) -> None:
    """Raise where something needs the weight itself, or a place for a sum in it.

    Args:
        target: The target of an update.
        what: What needs it, and why: a clause that follows a colon.
    """
    if target.no_fold:
        raise not_storable(target, what)


def not_storable(target: Target, what: str) -> LoraFxError:
    """The error of `check_storable`."""
    return LoraFxError(
        f"{target.key!r}: {target.no_fold}: {what}",
        "a branch beside it has no such need: plain LoRA by insert, or export --mode switch",
    )


def check_disjoint(targets: Iterable[Target]) -> None:
    """Raise where two regions of one tensor overlap at one of its uses."""
    by_name: dict[str, list[Target]] = {}
    for t in targets:
        for other in by_name.setdefault(t.parameter.name, []):
            common = {s.id for s in t.sites} & {s.id for s in other.sites}
            if overlap(t.region, other.region) and (common or not t.sites):
                raise LoraFxError(
                    f"{other.key!r} and {t.key!r} share elements of one tensor",
                    "regions of one parameter, and its uses, must not overlap",
                )
        by_name[t.parameter.name].append(t)


def __getattr__(name: str) -> object:
    """Find the classes that pickles of older versions name in this module."""
    if name in ("Found", "Refusal", "Unreached"):
        return getattr(importlib.import_module("lora_fx.targets.found"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
