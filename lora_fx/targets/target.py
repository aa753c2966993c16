"""Targets: tensors of a model, or regions of them, that an update can attach to."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
        """A sentence about other operations that read the weight; empty if there are none."""
        if not self.other_readers:
            return ""
        ops = ", ".join(self.other_readers)
        return f"{self.key}: read by {ops} too, where the update does not apply"

    @property
    def flops(self) -> int:
        """2 · multiply-adds of all uses, at the example's sizes."""
        return sum(site.flops for site in self.sites)

    @property
    def no_fold(self) -> str:
        """Why a sum cannot be stored in the weight of one of its uses; empty if it can."""
        for site in self.sites:
            if site.no_fold:
                return site.no_fold
        return ""

    @property
    def no_grad(self) -> bool:
        """True when the model switches gradients off around every use."""
        return bool(self.sites) and all(site.no_grad for site in self.sites)

    @property
    def uses(self) -> tuple[str, ...]:
        """The ops that read this tensor, each once, in execution order."""
        return tuple(dict.fromkeys(site.op for site in self.sites))

    def holds(self, other: Target) -> bool:
        """True if the other target is of the same tensor and its region is inside this one's."""
        if self.parameter.name != other.parameter.name:
            return False
        return contains(self.region, other.region)

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
        scopes = {site.scope for site in self.sites if site.scope}
        return tuple(name for name in self.parameter.names if _module(name) in scopes)

    def names_of(self, site: Site) -> list[str]:
        """The names of the tensor that lie in the module of one use."""
        if not site.scope:
            return []
        return [name for name in self.parameter.names if _module(name) == site.scope]

    @property
    def each_use(self) -> tuple[str, ...]:
        """A name for every use: its alias or op if only one use has it, else the call."""
        return tuple(self._name_of_use(i, site) for i, site in enumerate(self.sites))

    def _name_of_use(self, number: int, site: Site) -> str:
        for use in (*self.names_of(site), f"op:{site.op}"):
            reached = [other.id for other in self.sites if applies(use, other)]
            if reached == [site.id]:
                return use
        return f"call:{number}"

    def named_use(self, name: str, *, lookup: bool) -> str:
        """The use that one name of a tied tensor means.

        The first of these that there is:

        1. The use in the module of that name, unless the update is of a lookup.
        2. The lookup, or the matmul, by its module's name.
        3. The same by its op.

        Args:
            name: A name of the tensor.
            lookup: The update is of a lookup, whatever the name.
        """
        if not lookup and any(site.scope == _module(name) for site in self.sites):
            return name
        sites = [site for site in self.sites if (site.op == "embedding") == lookup]
        for site in sites:
            names = self.names_of(site)
            if names:
                return names[0]
        return f"op:{sites[0].op}" if sites else ""

    def of_use(self, use: str) -> Target | None:
        """The target with some of its uses, under the key `NAME@USE`; None where it has none."""
        sites = self._sites_of(use)
        if not sites:
            return None
        name, bracket, region = self.key.partition("[")
        ops = [site.op for site in sites if site.op != "embedding"]
        op = ops[0] if ops else "embedding"
        return replace(self, key=f"{name}@{use}{bracket}{region}", sites=sites, op=op, parts=())

    def _sites_of(self, use: str) -> tuple[Site, ...]:
        """The uses that have this name."""
        if use.startswith("call:"):
            return tuple(site for i, site in enumerate(self.sites) if use == f"call:{i}")
        if not use.startswith("op:") and use not in self.parameter.names:
            return ()
        return tuple(site for site in self.sites if applies(use, site))

    def keys_of(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """Keys of the updates that reach exactly some uses.

        The first of these that there is:

        1. Its own key, for all uses.
        2. The key of one name that has these uses: a module's, an op's, or a call.
        3. The keys of several such names, each of uses that those before it do not have.
        """
        site_ids = {site.id for site in sites}
        if all(site.id in site_ids for site in self.sites):
            return (self.key,)

        ids_by_key: dict[str, set[str]] = {}
        ops = [f"op:{op}" for op in self.uses]
        calls = [f"call:{i}" for i in range(len(self.sites))]
        for use in (*self.modules, *ops, *calls):
            target = self.of_use(use)
            if target is not None:
                ids_by_key[target.key] = {site.id for site in target.sites}

        for key, ids in ids_by_key.items():
            if ids == site_ids:
                return (key,)
        keys = []
        for key, ids in ids_by_key.items():
            if ids <= site_ids:
                keys.append(key)
                site_ids -= ids
        return tuple(keys)

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

        part_key = make_key(self.parameter.name, region, self.parameter.shape)
        role = role or self._role_of_part(part_key)
        return replace(self, key=part_key, region=region, layout=layout, role=role, parts=())

    def _role_of_part(self, part_key: str) -> str:
        """The role of a part; that of the target where the part has none."""
        for role, key in self.parts:
            if key == part_key:
                return role
        return self.role

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
            "parts": [{"role": role, "key": key} for role, key in self.parts],
            "other_readers": list(self.other_readers),
            "rank": rank,
            "alpha": alpha,
        }


def check_storable(target: Target, what: str) -> None:
    """Raise if something needs the stored weight, and the target has none that can change.

    Args:
        target: The target of an update.
        what: What needs the weight, and why, as a clause after a colon.
    """
    if target.no_fold:
        raise not_storable(target, what)


def not_storable(target: Target, what: str) -> LoraFxError:
    """The error of `check_storable`."""
    return LoraFxError(
        f"{target.key!r}: {target.no_fold}: {what}",
        "use a branch, which does not need the weight: plain LoRA with insert, or export --mode "
        "switch",
    )


def check_disjoint(targets: Iterable[Target]) -> None:
    """Raise where two regions of one tensor overlap at one of its uses."""
    by_name: dict[str, list[Target]] = {}
    for target in targets:
        targets_of_tensor = by_name.setdefault(target.parameter.name, [])
        for other in targets_of_tensor:
            if _share_elements(target, other):
                raise LoraFxError(
                    f"{other.key!r} and {target.key!r} share elements of one tensor",
                    "leave one out; regions of one parameter, and its uses, must not overlap",
                )
        targets_of_tensor.append(target)


def _share_elements(target: Target, other: Target) -> bool:
    """True where two targets of one tensor overlap at a use; one without sites is at every use."""
    if not overlap(target.region, other.region):
        return False
    if not target.sites:
        return True
    return not {site.id for site in target.sites}.isdisjoint(site.id for site in other.sites)


def _module(name: str) -> str:
    """The module of a parameter's name."""
    return name.rpartition(".")[0]


if not TYPE_CHECKING:  # so that type checkers know the names of now alone

    def __getattr__(name: str) -> object:
        """Find the classes that pickles of older versions name in this module."""
        if name in ("Found", "Refusal", "Unreached"):
            return getattr(importlib.import_module("lora_fx.targets.found"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
