"""Targets, their keys and their roles: what an adapter can attach to, how text names it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.errors import LoraFxError
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.layout import Layout, Region
from lora_fx.text import Json


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
        role: One of ROLES, or an empty text.
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


# What a weight is for: q k v o gate up down head embedding router.
#
# A lookup is an embedding. A matmul is a head when its weight is tied to an embedding table, or
# has such a table's shape. The rest is read from the module's name, by the names that the
# published architectures use.


ROLES = ("q", "k", "v", "o", "gate", "up", "down", "head", "embedding", "router")
HEAD_ROWS = 1000
"""A table of fewer rows is no vocabulary: a small classifier is adapted like any other layer."""

_NAMES = (
    ("router", r"router|(mlp|moe|block_sparse_moe|feed_forward)\.gate"),
    ("q", r"q_proj|query|query_proj|to_q|q_lin|wq|q|linear_q"),
    ("k", r"k_proj|key|key_proj|to_k|k_lin|wk|k|linear_k"),
    ("v", r"v_proj|value|value_proj|to_v|v_lin|wv|v|linear_v"),
    (
        "o",
        r"o_proj|out_proj|to_out(\.0)?|out_lin|wo|o|(attention|attn|self)\.(output\.)?(dense|c_proj|proj)",
    ),
    ("gate", r"gate_proj|w1|wi_0|gate"),
    ("up", r"up_proj|w3|wi_1|wi|fc1|c_fc|intermediate\.dense|lin1|linear1"),
    ("down", r"down_proj|w2|fc2|output\.dense|lin2|linear2|mlp\.c_proj"),
)
_RULES = tuple((role, re.compile(rf"(^|\.)({names})$")) for role, names in _NAMES)


def role_of(
    names: Sequence[str], sites: Sequence[Site], layout: Layout, tables: Sequence[tuple[int, int]]
) -> str:
    """The role of a target, or an empty text.

    Args:
        names: All names of the target, without `.weight`.
        sites: Its uses.
        layout: How it lies in its parameter.
        tables: (rows, width) of every lookup table of the model.
    """
    ops = {s.op for s in sites}
    if ops == {"embedding"}:
        return "embedding"
    if "embedding" in ops or (
        not layout.batch_shape and (layout.out_size, layout.in_size) in tables
    ):
        return "head"
    return next((role for n in names if (role := role_by_name(n))), "")


def role_by_name(name: str) -> str:
    """The role that a name (without `.weight`) tells, or an empty text.

    >>> role_by_name("h.0.attn.q_proj"), role_by_name("h.0.attn.qkv")
    ('q', '')
    """
    return next((role for role, rule in _RULES if rule.search(name)), "")
