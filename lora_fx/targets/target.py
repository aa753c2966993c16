"""Targets, their keys, roles, parts and uses, and what find saw of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lora_fx.compare import sizes_text
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, near, visible
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.graph import Parameter, Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region
from lora_fx.text import Json, by_key, counted, html, human, some, table


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
        role: One of `lora_fx.targets.plan.ROLES`, or an empty text.
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


# What a weight is for: q k v o gate up down head embedding router.
#
# A lookup is an embedding. A matmul is a head when its weight is tied to an embedding table, or
# has such a table's shape. The rest is read from the module's name, by the names that the
# published architectures use.


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


# Parts of a target: a region of its tensor as a target of its own.
#
# A fused weight (q, k, v in one matrix; gate and up; a stack of experts) is one target unless a
# selector, a plan or an adapter asks for its parts. The part's factors are the whole's with zeros
# around them, so every op that serves the whole serves a part:
#
#     ΔW[part] = s·b·a   ⇔   ΔW = s·pad(b)·pad(a)


def overlap(r: Region, s: Region) -> bool:
    """True when two regions of one tensor share an element."""
    return all(a < d and c < b for (a, b), (c, d) in zip(r, s, strict=True))


def contains(outer: Region, inner: Region) -> bool:
    """True when a region lies within another."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def relative(inner: Region, outer: Region) -> Region:
    """The bounds of a region within another."""
    return tuple((c - a, d - a) for (a, _), (c, d) in zip(outer, inner, strict=True))


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


def widen(
    e: Ops[V], whole: Layout, narrow: Layout, start: tuple[int, ...], a: V, b: V, rank: int
) -> tuple[V, V]:
    """Factors of a part with zeros around them, as factors of the whole.

    Args:
        whole: Layout of the whole target.
        narrow: Layout of the part.
        start: Where the part begins, for each axis of the layouts' `shape`.
        a: The factor [*batch, rank, in] of the part.
        b: The factor [*batch, out, rank] of the part.
        rank: The rank of both.
    """
    lead = len(whole.batch)

    def spread(x: V, axes: tuple[int, ...], *, rank_first: bool) -> V:
        order = (*whole.batch, *axes)
        if all(whole.shape[i] == narrow.shape[i] for i in order):
            return x
        at = lead if rank_first else len(order)
        before = [start[i] for i in order]
        split = [narrow.shape[i] for i in order]
        after = [whole.shape[i] - narrow.shape[i] - start[i] for i in order]
        for values, filler in ((before, 0), (after, 0), (split, rank)):
            values.insert(at, filler)
        if len(axes) != 1:
            x = e.op("reshape", x, shape=tuple(split))
        x = e.op("pad", x, before=tuple(before), after=tuple(after))
        if len(axes) != 1:
            size = whole.in_size if rank_first else whole.out_size
            side = (rank, size) if rank_first else (size, rank)
            x = e.op("reshape", x, shape=(*whole.batch_shape, *side))
        return x

    return spread(a, whole.in_, rank_first=True), spread(b, whole.out, rank_first=False)


# Which uses of a tied, shared or repeated tensor an update reaches.
#
# A tensor has one key, and by default one update for all its uses. A use is named by
#
# ==========  ===================================================================
# alias       a name of the parameter: the uses inside that name's module
# op:NAME     the uses by that op
# call:N      the N-th use in execution order, from 0
# ==========  ===================================================================
#
# A key without `@` is an update of all uses, and `NAME@USE` one of these uses alone, so that
# another use of the tensor can have an update of its own. `LowRank.use` says the same where an
# update is not bound to a model: there a key is a file's name of a module.


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


# What find saw of a model: targets, refusals, parameters out of reach.


@dataclass(frozen=True)
class Found:
    """What find saw of a model, in definition order.

    Attributes:
        targets: What can be adapted.
        refusals: Uses of parameters that cannot, with the reason.
        unreached: Parameters of two or more dimensions that no weight matmul uses.
        data_flops: FLOPs of the matmuls between activations, at the example's sizes.
        pinned: Dimensions that the capture had to fix.
        ranges: The sizes that the captured graph is true for; elsewhere another one is captured.
        notes: What had to be said on the way.
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
        """The target of a key, of one of its aliases, of a region within it, or of one use."""
        target = self.get(key)
        if target is None:
            raise LoraFxError(f"{key!r} is no target of the model", near(key, self.by_key))
        return target

    def get(self, key: str) -> Target | None:
        """The target of a key, as by indexing; None where there is none.

        Keys are our own language of regions and uses. What a foreign name means is looked up before
        it becomes a key, by the rules of `lora_fx.targets.names`.
        """
        whole = self.by_key.get(key)
        if whole is not None:
            return whole
        plain, use = split_use(key)
        if use:
            shared = self.get(plain)
            return None if shared is None else shared.of_use(use)
        if not key.endswith("]"):
            return None
        every = (t.part(key) for t in (*self.targets, *self.optional))
        return next((t for t in every if t is not None), None)

    @cached_property  # asked for every key of a plan and an adapter
    def by_key(self) -> Mapping[str, Target]:
        """Targets by key, and by alias where the key is a whole parameter; optional ones too."""
        every = (*self.targets, *self.optional)
        names = {a: t for t in every if "[" not in t.key for a in t.parameter.aliases}
        return {**names, **{t.key: t for t in every}}

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of one forward that targets reach, that no branch does, and between activations."""
        return {
            "reached": sum(t.flops for t in self.targets),
            "refused": sum(r.flops for r in self.refusals),
            "unreached": sum(u.flops for u in self.unreached),
            "data": self.data_flops,
        }

    @property
    def weight_flops(self) -> int:
        """FLOPs of one forward of all products of weights, whether a branch can reach them."""
        flops = self.flops
        return flops["reached"] + flops["refused"] + flops["unreached"]

    @property
    def reached_share(self) -> float:
        """Share of the weight FLOPs that targets reach; 1 where no weight matmul costs any."""
        total = self.weight_flops
        unknown = any("insert" in r.verbs for r in self.refusals)  # a product of unknown size
        return self.flops["reached"] / total if total else float(not unknown)

    def to_json(self) -> Json:
        """Targets, refusals, unreached, pinned and FLOPs, as docs/json.md says."""
        names = ("targets", "refusals", "unreached", "pinned", "ranges")
        rows: Json = {name: [row.to_json() for row in getattr(self, name)] for name in names}
        rows["flops"] = self.flops
        rows["flops_at"] = {name: list(shape) for name, shape in self.sizes.items()}
        return {**rows, "reached_share": round(self.reached_share, 6)}

    def __repr__(self) -> str:
        """The targets and their shapes, and how much cannot be adapted."""
        shapes = [f"{t.key} {list(t.parameter.shape)}" for t in self.targets]
        return f"Found({some(shapes) or 'no target'}; {counted(len(self.refusals), 'refusal')})"

    def _repr_html_(self) -> str:
        """The table of targets, for notebooks."""
        return html(counted(len(self.targets), "target"), self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("key", "op", "in", "out", "sites", "share", "role", "default")
        total = max(1, self.weight_flops)
        formats = any(t.parameter.format for t in self.targets)
        head += ("format",) * formats
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
                *(f"{t.parameter.format} {t.parameter.bits or ''}".strip(),) * formats,
            )
            for t in self.targets
        ]
        return [head, *rows]

    def __str__(self) -> str:
        """A table for people."""
        total = max(1, self.weight_flops)
        lines = table(self._rows()) if self.targets else ["no target"]
        if any(t.sites for t in self.targets):
            reach = (
                "1 target reaches"
                if len(self.targets) == 1
                else f"{len(self.targets)} targets reach"
            )
            lines.append(
                f"{reach} {self.reached_share:.1%} of the weight FLOPs "
                f"({human(self.flops['reached'])} of {human(total)}; "
                f"between activations {human(self.data_flops)})"
                + (f", at {sizes_text(self.sizes)}" if self.sizes else "")
            )
        lines += [f"also read: {t.said}" for t in self.targets if t.said]
        coded = [r for r in self.refusals if r.verbs and "insert" not in r.verbs]
        if coded:
            more = f" and {len(coded) - 1} more" * (len(coded) > 1)
            verbs = " or ".join(coded[0].verbs)
            lines.append(f"no {verbs}, only branches: {coded[0].key}{more}: {coded[0].reason}")
        rest = [r for r in self.refusals if r not in coded]
        alike = by_key(((r.op, r.reason), r.key) for r in rest)
        lines += [f"refused: {some(keys)} ({op}): {why}" for (op, why), keys in alike.items()]
        lines += [f"unreached: {u.key} {list(u.shape)}: {u.said}" for u in self.unreached]
        lines += [f"pinned: {p}" for p in self.pinned]
        lines += [f"captured for: {c}" for c in self.ranges]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(map(visible, lines))  # a name from a file may have line breaks


@dataclass(frozen=True)
class Refusal:
    """A use of a parameter that cannot be adapted, and why; `verbs` refuse it even by its name."""

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
    """FLOPs of the products of what is gathered from it."""

    @property
    def said(self) -> str:
        """The reason, with what it costs."""
        if not self.flops:
            return self.reason
        return f"{self.reason}, and {human(self.flops)} FLOPs are products of what is gathered"

    def to_json(self) -> Json:
        """One row of `unreached[]`."""
        return {**vars(self), "shape": list(self.shape)}
