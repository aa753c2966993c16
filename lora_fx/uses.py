"""Which uses of a tied tensor an update reaches.

A tensor that a lookup and a matmul share has one key and one update. `use` says where the update
applies: an alias of the parameter means the uses inside that alias's module, `op:NAME` the uses
by that op, and an empty text all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_fx.graph import Site
from lora_fx.target import Target


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
    """True when an update with this `use` reaches a site."""
    if not use:
        return True
    if use.startswith("op:"):
        return site.op == use[3:]
    return site.scope == use.rpartition(".")[0]


def op_of(t: Target, use: str) -> str:
    """The op that an update reaches: what a file format needs to know."""
    return next((s.op for s in t.sites if applies(use, s) and s.op != "embedding"), "embedding")
