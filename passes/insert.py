"""insert: a low-rank branch at every use of a target.

    output form    y' = y + B(A x)·s        where the kind of contraction has such a form
    weight form    y' = op(x, view(W + s·B·A))   for every other use

`a` [*batch, rank, in] and `b` [*batch, out, rank] are new tensors beside the parameter, named
`PATH.lora_A.LEAF` and `PATH.lora_B.LEAF`; with b = 0 the output form adds an exact zero. The
scale multiplies b, the smaller factor. In training, dropout acts on the branch's own copy of x
(the weight form has none, and says so). One update serves all uses of its target; a use that
reads the tensor the other way round takes a = bᵀ, b = aᵀ. Updates of parts of one weight add up at
its use, each with zeros around its factors.

Frozen ranks, −b₀a₀ of a start that was taken from W, are a branch of their own: at the start both
have the same numbers but for a sign, so that their sum is an exact zero. Dropout leaves them
alone. A variant whose g [out] multiplies the rows of V = W + s·b·a, as DoRA's m/‖V‖ does, has

    output form    y' = y + (g − 1)·(y − bias) + g·s·B(A x)   where out is one axis of the result
    weight form    y' = op(x, view(W + (g·V − W)))            for every other use

Where d = g − 1 was computed before, for one base, d is a tensor and b holds g already:

    output form    y' = y + d·(y − bias) + s·B(A x)           where out is one axis of the result
    weight form    y' = op(x, view(W + d·W + s·B·A))          for every other use
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fx.adapter.factor_tensors import FactorTensor, Half, halves, slots_of
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.scaled_rows import GAINS, has_gains
from lora_fx.adapter.variant import variant_of
from lora_fx.adapter.variant_protocol import Read
from lora_fx.errors import LoraFxError
from lora_fx.ir import kinds
from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Emitter, Factors, Graph, Role, Site, TokenMask
from lora_fx.ir.kinds import swap_last
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find, site_layout
from lora_fx.targets.found import Found
from lora_fx.targets.keys import applies, base_name
from lora_fx.targets.regions import contains, relative, widen, widen_rows
from lora_fx.targets.target import Target

Pair = tuple[Target, LowRank]


@dataclass(frozen=True)
class Insert:
    """Insert the branches of `updates` (key → LowRank) wherever the graph uses their targets.

    Attributes:
        updates: Initial values; their shapes are checked by bind.
        dropout: The probability of dropout on a branch's input, in training graphs only.
        training: True when this graph is one.
        missing: What a key that is no target of the graph means: error, or skip for calls
            that do not reach every target.
        role: What the new tensors are for.
        weight_form: Take the weight form everywhere, as a reference for the output forms.
        mask: The tokens on which the updates act; None for all.
        branched: Ids of the only sites that may have the output form; None where all may.
    """

    updates: Updates
    dropout: float = 0.0
    training: bool = False
    role: Role = Role.TRAIN
    missing: str = "error"
    weight_form: bool = False
    mask: TokenMask | None = None
    branched: frozenset[str] | None = None

    def __call__(self, graph: Graph[V]) -> PassResult[V]:
        """Edit the graph; sites that already have a branch are not changed."""
        hint = "capture with these arguments as the example"
        required = self.missing == "error"
        uses = {key: update.use for key, update in self.updates.items()}
        targets, sites = reached(find(graph), uses, required=required, hint=hint)
        adapted = graph.adapted()
        bare = [(site, keys) for site, keys in sites if site.id not in adapted]
        operand_counts = Counter(_op(site) for site, _ in bare)
        for site, keys in bare:
            pairs = [(targets[key], self.updates[key]) for key in keys]
            # One update of a site without an output form puts all of them into the weight form: the
            # two do not mix at one op. Updates of two operands of one op multiply each other, as
            # in (W + ΔW)(U + ΔU), which branches beside it do not.
            is_product_of_updates = operand_counts[_op(site)] > 1
            if is_product_of_updates or not self._output_form(graph, site, pairs):
                if self.mask is not None:
                    raise _unmasked(site)
                self._weight_form(graph, site, pairs)
        return PassResult(graph, bool(bare))

    def _output_form(self, graph: Graph[V], site: Site, pairs: Sequence[Pair]) -> bool:
        """Add the branches to the site's result; return False if only the weight form exists.

        Nothing is emitted in that case.
        """
        if self.weight_form or not site.kind.has_branch:
            return False
        if self.branched is not None and site.id not in self.branched:
            return False
        read = site_layout(site, pairs[0][0].parameter.shape)
        if read is None:
            return False
        directions = [_direction(read, target, update) for target, update in pairs]
        if "" in directions or not _picks_batches(site, read[1]):
            return False
        if any(has_gains(update) for _, update in pairs):
            return self._form_with_gains(graph, site, pairs, directions)
        if any(variant_of(update).reads_weight for _, update in pairs):
            if self.mask is not None:
                return False
            return self._stretched_form(graph, site, pairs, directions)

        e = graph.emit(site)
        total = graph.output(site)
        for pair, direction in zip(pairs, directions, strict=True):
            total = e.op("add", total, self._branch(graph, e, site, pair, direction))
        self._put(graph, e, site, total)
        return True

    def _put(self, graph: Graph[V], e: Emitter[V], site: Site, total: V) -> None:
        """Replace the result of a site, where the mask is true if there is one."""
        if self.mask is not None:
            total = e.op("where", self.mask.of(graph, site), total, graph.output(site))
        graph.replace_output(site, total)

    def _branch(
        self,
        graph: Graph[V],
        e: Emitter[V],
        site: Site,
        pair: Pair,
        direction: str,
        g: V | None = None,
    ) -> V:
        """Emit the branch s·b(a x) in the shape of the result.

        Args:
            graph: The graph of the site.
            e: An emitter at the site.
            site: The use of the target.
            pair: The target and its update.
            direction: See _direction.
            g: [*batch, out, 1], multiplies the rows of b; of a variant that stretches W.
        """
        target, update = pair
        read = site_layout(site, target.parameter.shape)
        assert read is not None
        region, layout = read
        layout_of_update = update.layout or target.layout
        if direction == "flipped":
            layout_of_update = layout_of_update.transposed()
        start = layout.starts(relative(target.region, region))

        # A lookup takes ids: there is nothing to drop, and no dtype to compute in.
        is_lookup = site.kind.name == "embedding"
        total: V | None = None
        for half in halves(target.key, update, split=self.role is Role.TRAIN):
            x = graph.kept_activation(site)
            if self.training and self.dropout and half.trained and not is_lookup:
                x = e.op("dropout", x, p=self.dropout)
            like = graph.output(site) if is_lookup else x
            a, b = factors(e, half, like, self.role, update.scale * site.gain)
            if g is not None:
                b = e.op("mul", b, g)
            if direction == "flipped":
                b_transposed = e.op("transpose", b, perm=swap_last(0))
                b = e.op("transpose", a, perm=swap_last(0))
                a = b_transposed
            a, b = widen(e, layout, layout_of_update, start, a, b, half.rank)
            if site.view.picked is not None:
                ids = graph.picked(site, e)
                a = e.op("gather", a, ids)
                b = e.op("gather", b, ids)
            branch = site.kind.branch(e, site, x, Factors(a, b, half.rank, layout))
            total = branch if total is None else e.op("add", total, branch)
        assert total is not None
        return total

    def _stretched_form(
        self, graph: Graph[V], site: Site, pairs: Sequence[Pair], directions: Sequence[str]
    ) -> bool:
        """Add the branch for W' = g·V to the op's output; False if the result has no such form.

        The form exists if one update, which stretches, changes all of the weight as the site reads
        it, if out is one axis of the result, and if the branch has no dropout. Where nothing trains
        it saves nothing, since V and its norm are computed in any case.
        """
        if len(pairs) != 1 or directions[0] != "straight" or self.role is not Role.TRAIN:
            return False
        target, update = pairs[0]
        layout = update.layout or target.layout
        is_whole = target.region == tuple((0, size) for size in target.parameter.shape)
        if not is_whole or layout.batch or site.gain != 1.0:
            return False
        variant = variant_of(update)
        if not variant.stretches:
            return False
        shape = site.kind.along_out(site, layout.out_size)
        if not shape or self.dropout:
            return False
        stored = graph.weight(site)
        e = graph.emit(site)
        product = graph.product(site, e)
        if product is None:
            return False

        # The norm is no function of a and b for gradients (section 4.3 of the paper), as in PEFT.
        delta = e.op("detach", _delta(e, target, update, stored, self.role))
        v = e.op("add", stored, delta)
        column = variant.stretch(e, layout, v, _beside(e, target, update, stored, self.role))
        y = graph.output(site)
        g = e.op("cast_like", column, y)
        branch = self._branch(graph, e, site, pairs[0], "straight", g)
        g_less_one = e.op("add", e.op("reshape", g, shape=shape), -1.0)
        stretched = e.op("mul", product, g_less_one)
        graph.replace_output(site, e.op("add", y, e.op("add", stretched, branch)))
        return True

    def _form_with_gains(
        self, graph: Graph[V], site: Site, pairs: Sequence[Pair], directions: Sequence[str]
    ) -> bool:
        """Add the branches, and d·(y − bias) of updates with d; False if there is no such form.

        The form exists if out is one axis of the result, and if every update is of whole rows.
        """
        target, _ = pairs[0]
        read = site_layout(site, target.parameter.shape)
        assert read is not None
        region, layout = read
        shape = site.kind.along_out(site, layout.out_size)
        if layout.batch or not shape or "flipped" in directions:
            return False
        for target, update in pairs:
            if has_gains(update) and not _has_whole_rows(target, update, layout):
                return False
        e = graph.emit(site)
        product = graph.product(site, e)
        if product is None:
            return False

        total = graph.output(site)
        for pair in pairs:
            target, update = pair
            total = e.op("add", total, self._branch(graph, e, site, pair, "straight"))
            if has_gains(update):
                gains = _beside(e, target, update, product, self.role)(GAINS)
                narrow = update.layout or target.layout
                if narrow.out_size != layout.out_size:
                    column = e.op("reshape", gains, shape=(narrow.out_size, 1))
                    start = layout.starts(relative(target.region, region))
                    gains = widen_rows(e, layout, narrow, start, column, 1)
                if shape != (narrow.out_size,):
                    gains = e.op("reshape", gains, shape=shape)
                total = e.op("add", total, e.op("mul", product, gains))
        self._put(graph, e, site, total)
        return True

    def _weight_form(self, graph: Graph[V], site: Site, pairs: Sequence[Pair]) -> None:
        """Make the site read W with the updates added."""
        e = graph.emit(site, before=True)
        stored = graph.weight(site)
        w = stored
        for target, update in pairs:
            w = changed(e, target, update, stored, w, self.role)
        graph.rebase(site, w)


def _unmasked(site: Site) -> LoraFxError:
    """Return the error for a use whose updates cannot be masked by token."""
    return LoraFxError(
        f"{site.parameter!r} ({site.op}, node {site.id}): an aLoRA acts on some tokens only, and "
        "an update of this use changes the weight itself, for all of them",
        f"pass --exclude {base_name(site.parameter).removesuffix('.weight')}",
    )


def _op(site: Site) -> str:
    """Return the id of a site's node, without the slot that may follow it; see Site.id."""
    return site.id.partition(":")[0]


def _has_whole_rows(target: Target, update: LowRank, layout: Layout) -> bool:
    """Whether an update changes all inputs of the rows that it changes."""
    narrow = update.layout or target.layout
    return narrow.in_size == layout.in_size


def _picks_batches(site: Site, layout: Layout) -> bool:
    """True if data picks nothing, or picks whole matrices of a stack that a and b also have."""
    axis = site.view.picked
    if axis is None:
        return True
    if site.kind.name != "linear":  # an einsum's form has sizes in it
        return False
    return (axis,) == site.kind.axes(site.operand).batch and len(layout.batch) == 1


def _direction(read: tuple[Region, Layout], target: Target, update: LowRank) -> str:
    """Return "straight" or "flipped" if the output form can serve a use, else an empty text.

    Flipped is a use that reads the tensor the other way round: it takes a = bᵀ, b = aᵀ.
    """
    region, layout_of_use = read
    layout = update.layout or target.layout
    if not contains(region, target.region):
        return ""
    narrowed = layout_of_use.narrow(relative(target.region, region))
    if narrowed == layout:
        return "straight"
    if not layout.batch_shape and narrowed == layout.transposed():
        return "flipped"
    return ""


def reached(
    found: Found, uses: Mapping[str, str], *, required: bool = False, hint: str = ""
) -> tuple[dict[str, Target], list[tuple[Site, list[str]]]]:
    """Return the targets by key, and each site that updates reach with the keys of these updates.

    Args:
        found: The targets of a graph.
        uses: Key of an update → the use that it is for; empty for all uses.
        required: Every key has to be a target of the graph.
        hint: What to do about a key that is no target, where there should be one.

    Raises:
        LoraFxError: A key that is no target and has to be; where there is a hint, also one whose
            parameter the graph uses in other parts than the key says.
    """
    targets: dict[str, Target] = {}
    sites: dict[str, tuple[Site, list[str]]] = {}
    for key, use in uses.items():
        target = found.get(key)
        if target is None:
            names = (other.parameter.name for other in found.targets)
            if required or (hint and base_name(key) in names):
                raise LoraFxError(
                    f"{key!r} is not a target of this graph: it reads other parts of the tensor",
                    hint,
                )
            continue
        targets[key] = target
        for site in target.sites:
            if applies(use, site):
                _, keys = sites.setdefault(site.id, (site, []))
                keys.append(key)
    return targets, list(sites.values())


def changed(e: Emitter[V], target: Target, update: LowRank, stored: V, w: V, role: Role) -> V:
    """Return a weight with one update added.

    Args:
        e: An emitter of any IR.
        target: The target of the update.
        update: The update, bound.
        stored: The parameter as it is stored.
        w: The same, with the updates of other regions in it already.
        role: What the tensors of the update are for.
    """
    variant = variant_of(update)
    change = _delta(e, target, update, stored, role)
    if variant.reads_weight:
        layout = update.layout or target.layout
        beside = _beside(e, target, update, stored, role)
        change = variant.change(e, layout, _part(e, stored, target), change, beside)
    return e.op("add", w, kinds.pad_region(e, change, target.region, target.parameter.shape))


def _delta(e: Emitter[V], target: Target, update: LowRank, stored: V, role: Role) -> V:
    """Emit s·b·a in the stored shape of the target's region, in the dtype of `stored`."""
    layout = update.layout or target.layout
    total: V | None = None
    for half in halves(target.key, update, split=role is Role.TRAIN):
        a, b = factors(e, half, stored, role)
        change = kinds.delta(e, layout, a, b, update.scale)
        total = change if total is None else e.op("add", total, change)
    assert total is not None
    return total


def _beside(e: Emitter[V], target: Target, update: LowRank, stored: V, role: Role) -> Read[V]:
    """Return a reader of the tensors that only a change of W needs, in the dtype of `stored`."""
    fields = variant_of(update).beside(update)
    values: dict[str, V] = {}
    for slot in slots_of(target.key, update):
        if slot.field in fields:
            values[slot.field] = e.op("cast_like", _stored(e, slot, role), stored)
    return values.__getitem__


def _part(e: Emitter[V], stored: V, target: Target) -> V:
    """Slice a target's region out of the stored tensor, unless the region is the whole tensor."""
    bounds = zip(target.region, target.parameter.shape, strict=True)
    for axis, ((lo, hi), size) in enumerate(bounds):
        if (lo, hi) != (0, size):
            stored = e.op("slice", stored, axis=axis, start=lo, stop=hi)
    return stored


def factors(
    e: Emitter[V], half: Half, like: V, role: Role, scale: float | None = None
) -> tuple[V, V]:
    """Return a and scale·b of one branch as values in the dtype of `like`."""

    def read(field: str) -> V:
        return _stored(e, half.tensors[field], role)

    a = e.op("cast_like", half.variant.a(e, read), like)
    # the scale goes to b before the cast: once in fp32, on the smaller factor
    b = half.variant.b(e, read)
    if scale is not None and not (half.variant.scale_is_one and scale == 1.0):
        b = e.op("mul", b, float(scale))
    return a, e.op("cast_like", b, like)


def _stored(e: Emitter[V], slot: FactorTensor, role: Role) -> V:
    """Add a tensor of an update to the graph as a parameter."""
    if role is Role.TRAIN and not slot.trained:
        role = Role.FROZEN
    return e.parameter(slot.name, slot.value, role)
