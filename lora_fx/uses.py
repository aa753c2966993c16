"""Which uses of a tied, shared or repeated tensor an update reaches.

A tensor has one key, and by default one update for all its uses. A use is named by

==========  ===================================================================
alias       a name of the parameter: the uses inside that name's module
op:NAME     the uses by that op
call:N      the N-th use in execution order, from 0
==========  ===================================================================

`LowRank.use` limits the one update to some uses. `NAME@USE` is the key of an update that has these
uses for itself, so that another use of the tensor can have an update of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lora_fx.ir.graph import Site
from lora_fx.target import Target, split_use


def tied(t: Target) -> bool:
    """True when a lookup shares the tensor with another op."""
    return "embedding" in t.uses and len(t.uses) > 1


def matmul_use(t: Target) -> str:
    """The use that leaves the lookup of a tied tensor alone; empty where nothing is tied."""
    return _use(t, (s for s in t.sites if s.op != "embedding")) if tied(t) else ""


def lookup_use(t: Target) -> str:
    """The use that means the lookup of a tied tensor only; empty where nothing is tied."""
    return _use(t, (s for s in t.sites if s.op == "embedding")) if tied(t) else ""


def named_use(t: Target, name: str) -> str:
    """The use that one name of a tied tensor means: its own module's, else the matmul's."""
    if not tied(t):
        return ""
    scope = name.rpartition(".")[0]
    return name if any(s.scope == scope for s in t.sites) else matmul_use(t)


def _use(t: Target, sites: Iterable[Site]) -> str:
    op = ""
    for site in sites:
        for name in (t.parameter.name, *t.parameter.aliases):
            if site.scope and name.rpartition(".")[0] == site.scope:
                return name
        op = op or f"op:{site.op}"
    return op


def applies(use: str, site: Site) -> bool:
    """True when an update with this `use` reaches a site of its target."""
    if not use or use.startswith("call:"):  # a call is in the key, and its target has no other site
        return True
    if use.startswith("op:"):
        return site.op == use[3:]
    return site.scope == use.rpartition(".")[0]


def of_use(t: Target, use: str) -> Target | None:
    """The target with some of its uses only, under the key `NAME@USE`; None where it has none."""
    known = use.startswith(("op:", "call:")) or use in (t.parameter.name, *t.parameter.aliases)
    if use.startswith("call:"):
        sites = tuple(s for i, s in enumerate(t.sites) if use == f"call:{i}")
    else:
        sites = tuple(s for s in t.sites if known and applies(use, s))
    if not sites:
        return None
    name, bracket, region = t.key.partition("[")
    op = next((s.op for s in sites if s.op != "embedding"), "embedding")
    return replace(t, key=f"{name}@{use}{bracket}{region}", sites=sites, op=op, parts=())


def each_use(t: Target) -> tuple[str, ...]:
    """A name for every use of a target: its alias or op where that is its alone, else the call."""
    names = (t.parameter.name, *t.parameter.aliases)
    result = []
    for i, site in enumerate(t.sites):
        own = [n for n in names if site.scope and n.rpartition(".")[0] == site.scope]
        options = [*own, f"op:{site.op}"]
        alone = (u for u in options if [s.id for s in t.sites if applies(u, s)] == [site.id])
        result.append(next(alone, f"call:{i}"))
    return tuple(result)


def own_use(key: str) -> str:
    """What `LowRank.use` says of a key's use: nothing of a call, which no other place can tell."""
    use = split_use(key)[1]
    return "" if use.startswith("call:") else use


def disjoint(targets: Iterable[Target]) -> bool:
    """True when no site is among the uses of two of these targets of one tensor."""
    ids = [s.id for t in targets for s in t.sites]
    return len(ids) == len(set(ids))


def modules(t: Target) -> tuple[str, ...]:
    """The names of a tensor in whose modules it is used."""
    names = (t.parameter.name, *t.parameter.aliases)
    scopes = {s.scope for s in t.sites if s.scope}
    return tuple(n for n in names if n.rpartition(".")[0] in scopes)


def op_of(t: Target, use: str) -> str:
    """The op that an update reaches: what a file format needs to know."""
    return next((s.op for s in t.sites if applies(use, s) and s.op != "embedding"), "embedding")
