"""Keys of targets: a tensor, a region of it, and one of its uses.

Which uses of a tied, shared or repeated tensor an update reaches.

A tensor has one key, and by default one update for all its uses. A use is named by

==========  ===================================================================
alias       a name of the parameter: the uses inside that name's module
op:NAME     the uses by that op
call:N      the N-th use in execution order, from 0
==========  ===================================================================

A key without `@` is an update of all uses, and `NAME@USE` one of these uses alone, so that
another use of the tensor can have an update of its own. `LowRank.use` says the same where an
update is not bound to a model: there a key is a file's name of a module.
"""

from __future__ import annotations

from lora_fx.ir.graph import Site
from lora_fx.ir.view import Region


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

    A name for which this is another one (`a[0]`, `u@v`) is no key: it means a part, or a use.

    >>> base_name("w[1:4]"), base_name("embed.weight@head.weight"), base_name("w@call:1[2:4]")
    ('w', 'embed.weight', 'w')
    """
    return split_region(key)[0].partition("@")[0]


def split_region(key: str) -> tuple[str, str]:
    """The key without its region, and that region's text, brackets included.

    >>> split_region("a[0].weight[1:4]"), split_region("a[0].weight")
    (('a[0].weight', '[1:4]'), ('a[0].weight', ''))
    """
    name, bracket, text = key.rpartition("[") if key.endswith("]") else (key, "", "")
    return name, bracket + text


def split_use(key: str) -> tuple[str, str]:
    """The key without its use, and the use; empty where it stands for all uses.

    >>> split_use("w@call:1[2:4]"), split_use("w[2:4]")
    (('w[2:4]', 'call:1'), ('w[2:4]', ''))
    """
    name, region = split_region(key)
    name, _, use = name.partition("@")
    return name + region, use


def applies(use: str, site: Site) -> bool:
    """True when an update with this `use` reaches a site of its target."""
    if not use or use.startswith("call:"):  # a call is in the key, and its target has no other site
        return True
    if use.startswith("op:"):
        return site.op == use[3:]
    return site.scope == use.rpartition(".")[0]


def own_use(key: str) -> str:
    """What `LowRank.use` says of a key's use: nothing of a call, which no other place can tell."""
    use = split_use(key)[1]
    return "" if use.startswith("call:") else use
