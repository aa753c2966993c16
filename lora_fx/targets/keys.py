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
    axes = list(zip(region, shape, strict=True))
    while axes and _is_full(*axes[-1]):
        axes.pop()
    if not axes:
        return name
    (first, end), _ = axes[0]
    if len(axes) == 1 and end - first == 1 and len(shape) > 1:
        return f"{name}[{first}]"

    texts = []
    for bounds, size in axes:
        first, end = bounds
        texts.append(":" if _is_full(bounds, size) else f"{first}:{end}")
    return f"{name}[{', '.join(texts)}]"


def _is_full(bounds: tuple[int, int], size: int) -> bool:
    """True for the bounds of a whole axis."""
    return bounds == (0, size)


def split_key(key: str, shape: tuple[int, ...]) -> tuple[str, Region]:
    """The parameter's name and the region of a key, given the stored shape.

    >>> split_key("w[:, 2:6]", (4, 6))
    ('w', ((0, 4), (2, 6)))
    """
    if not key.endswith("]"):
        return key, tuple((0, size) for size in shape)
    name, _, text = key[:-1].rpartition("[")
    region = []
    for bounds, size in zip(text.split(","), shape, strict=False):
        first_text, colon, end_text = bounds.strip().partition(":")
        first = int(first_text or 0)
        end = int(end_text or size) if colon else first + 1
        region.append((first, end))
    region += [(0, size) for size in shape[len(region) :]]
    return name, tuple(region)


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
    if not key.endswith("]"):
        return key, ""
    name, bracket, bounds = key.rpartition("[")
    return name, bracket + bounds


def split_use(key: str) -> tuple[str, str]:
    """(key without its use, use); the use is empty if the key means all uses.

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
        return site.op == use.removeprefix("op:")
    return site.scope == use.rpartition(".")[0]


def own_use(key: str) -> str:
    """`LowRank.use` of a key: its use, but empty for a call, which only the key identifies."""
    _, use = split_use(key)
    return "" if use.startswith("call:") else use
