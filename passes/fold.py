"""fold: W + s·b·a into the constants, per site.

    W'[region] = W[region] + cast(s · (b @ a)),   b @ a, then s, then + W in fp32, rounded once

Uses of a parameter that take the same updates share one constant. When these are all uses of the
parameter (or, in a graph alone with its constants, the rest read none of the regions that change)
its own constant is replaced; tied uses that differ get a constant of their own, so an update of a
head never reaches the embedding that shares its tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.errors import LoraFxError
from lora_fx.graph import Graph, Site, V
from lora_fx.kinds import delta
from lora_fx.lowrank import LowRank
from lora_fx.numeric import NumpyEmitter
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find
from lora_fx.passes.insert import reads_otherwise
from lora_fx.regions import overlap
from lora_fx.target import Found, Target
from lora_fx.uses import applies
from lora_fx.view import Region


@dataclass(frozen=True)
class Folded:
    """What fold did to one parameter: where the value went and what rounding lost.

    `kept` is ⟨applied, Δ⟩/⟨Δ, Δ⟩: 1 when the stored dtype holds the whole change, 0 when rounding
    swallowed it. `grew` is the bytes of a constant that had to be added.
    """

    parameter: str
    stored_as: str
    keys: tuple[str, ...]
    kept: float
    grew: int = 0


@dataclass(frozen=True)
class Fold:
    """Fold `updates` (key → LowRank, bound) into a graph's constants."""

    updates: Mapping[str, LowRank]
    report: list[Folded] = field(default_factory=list, compare=False)
    applied: dict[str, str] = field(default_factory=dict, compare=False)

    def __call__(self, graph: Graph[V]) -> PassResult[V]:
        """Edit the graph's constants; what this pass has folded once it does not fold again."""
        found = find(graph)
        groups: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
        targets: dict[str, Target] = {}
        for key in self.updates:
            target = found.get(key)
            if target is None:
                if not self.applied or reads_otherwise(found, key):
                    raise LoraFxError(
                        f"{key!r} is no target of this graph: it reads other parts of the tensor",
                        "fold with these arguments as the example",
                    )
                continue
            why = next((s.no_fold for s in target.sites if s.no_fold), "")
            if why:
                raise LoraFxError(
                    f"{key!r}: {why}",
                    "insert adds a floating branch beside it (include names the weight)",
                )
            targets[key] = target
        sites = {s.id: s for t in targets.values() for s in t.sites}
        for site in sites.values():
            keys = tuple(
                k
                for k, t in targets.items()
                if t.parameter.name == site.parameter
                and _reads(t, site)
                and applies(self.updates[k].use, site)
            )
            if keys:
                groups.setdefault((site.parameter, keys), []).append(site)
        modified = False
        for (name, keys), members in groups.items():
            ident = f"{name}|{'|'.join(keys)}"
            pairs = [(targets[k], self.updates[k]) for k in keys]
            readers = list(members)
            if graph.alone:
                readers += _elsewhere(found, name, [t.region for t, _ in pairs])
            if ident in self.applied:  # another graph over the same constants
                modified |= self._again(graph, name, members, readers, self.applied[ident])
                continue
            value, kept = fold_value(graph.read(name), pairs)
            alone = readers if graph.covers(name, readers) else members
            stored = graph.replace_parameter(name, alone, value)
            self.applied[ident] = stored
            self.report.append(
                Folded(name, stored, keys, kept, 0 if stored == name else value.nbytes)
            )
            modified = True
        return PassResult(graph, modified)

    def _again(
        self,
        graph: Graph[V],
        name: str,
        members: list[Site],
        readers: list[Site],
        stored: str,
    ) -> bool:
        if stored != name:
            graph.repoint(members, stored)
            return True
        if not graph.covers(name, readers):
            raise LoraFxError(
                f"{name!r} was folded in place, and this graph has another use of it",
                "fold again with these arguments as the example",
            )
        return False


def _elsewhere(found: Found, name: str, regions: list[Region]) -> list[Site]:
    """The uses of a parameter that read nothing of these regions of it."""
    return [
        s
        for t in (*found.targets, *found.optional)
        if t.parameter.name == name and not any(overlap(t.region, r) for r in regions)
        for s in t.sites
    ]


def _reads(t: Target, site: Site) -> bool:
    return any(s.id == site.id for s in t.sites)


def fold_value(
    base: npt.NDArray[Any], updates: list[tuple[Target, LowRank]]
) -> tuple[npt.NDArray[Any], float]:
    """The stored tensor with its updates added, rounded once, and the share that was kept."""
    work = np.float64 if base.dtype == np.float64 else np.float32
    wide = np.array(base, dtype=work)
    e = NumpyEmitter()
    for target, low in updates:
        a, b = low.a.astype(work), low.b.astype(work)
        change = delta(e, low.layout or target.layout, a, b, float(low.scale))
        part = tuple(slice(lo, hi) for lo, hi in target.region)
        wide[part] = wide[part] + change
    value = wide.astype(base.dtype)
    wanted = wide.astype(np.float64) - base.astype(np.float64)
    got = value.astype(np.float64) - base.astype(np.float64)
    square = float(np.vdot(wanted, wanted))
    return value, float(np.vdot(got, wanted)) / square if square else 1.0
