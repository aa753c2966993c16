"""insert: a low-rank branch at every use of a target.

    output form    y' = y + B(A x)·s        where the kind of contraction has such a form
    weight form    y' = op(x, view(W + s·B·A))   for every other use

`a` [*batch, rank, in] and `b` [*batch, out, rank] are new tensors beside the parameter, named
`PATH.lora_A.LEAF` and `PATH.lora_B.LEAF`; with b = 0 the output form adds an exact zero. The
scale multiplies b, the smaller factor. In training, dropout acts on the branch's own copy of x
(the weight form has none, and says so). One update serves all uses of its target; a use that
reads the tensor the other way round takes a = bᵀ, b = aᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx import kinds
from lora_fx.errors import LoraFxError
from lora_fx.graph import Graph, Role, Site, V
from lora_fx.kinds import Factors, swap_last
from lora_fx.lowrank import LowRank, slot_names
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find, site_layout
from lora_fx.target import Found, Target, base_name
from lora_fx.uses import applies


@dataclass(frozen=True)
class Insert:
    """Insert the branches of `updates` (key → LowRank) wherever the graph uses their targets.

    Attributes:
        updates: Initial values; their shapes are checked by bind.
        dropout: Probability on the branch's input, in training graphs only.
        training: Whether this graph is one.
        missing: error, or skip for calls that do not reach every target.
        role: What the new tensors are for.
        weight_form: Take the weight form everywhere, as a reference for the output forms.
    """

    updates: Mapping[str, LowRank]
    dropout: float = 0.0
    training: bool = False
    role: Role = Role.TRAIN
    missing: str = "error"
    weight_form: bool = False
    notes: list[str] = field(default_factory=list, compare=False)

    def __call__(self, graph: Graph[V]) -> PassResult[V]:
        """Edit the graph; sites that carry a branch already are left alone."""
        done = graph.adapted()
        found = find(graph)
        modified = False
        for key, update in self.updates.items():
            target = found.by_key.get(key)
            if target is None:
                if self.missing == "error" or reads_otherwise(found, key):
                    raise LoraFxError(
                        f"{key!r} is no target of this graph: it reads other parts of the tensor",
                        "capture with these arguments as the example",
                    )
                continue
            for site in target.sites:
                if site.id in done or not applies(update.use, site):
                    continue
                self._site(graph, target, site, update)
                modified = True
        return PassResult(graph, modified)

    def _site(self, graph: Graph[V], target: Target, site: Site, update: LowRank) -> None:
        layout = update.layout or target.layout
        here = site_layout(site, target.parameter.shape)
        flipped = here is not None and here == (target.region, layout.transposed())
        straight = here == (target.region, layout)
        if self.weight_form or isinstance(site.kind, kinds.WeightForm):
            self._weight_form(graph, target, site, update)
            return
        e = graph.emit(site)
        if straight or (flipped and not layout.batch_shape):
            x = graph.activation(site)
            if self.training and self.dropout and site.kind.name != "embedding":
                x = e.op("dropout", x, p=self.dropout)
            like = x if site.kind.name != "embedding" else graph.output(site)
            scale = update.scale * site.gain
            a, b = factors(e, target.key, update, like, self.role, scale)
            if flipped:
                a, b = (e.op("transpose", t, perm=swap_last(0)) for t in (b, a))
                layout = layout.transposed()
            y = site.kind.branch(e, site, x, Factors(a, b, update.rank, layout))
            if y is not None:
                graph.replace_output(site, e.op("add", graph.output(site), y))
                return
        self._weight_form(graph, target, site, update)

    def _weight_form(self, graph: Graph[V], target: Target, site: Site, update: LowRank) -> None:
        e = graph.emit(site, before=True)
        w = graph.weight(site)
        a, b = factors(e, target.key, update, w, self.role)
        change = kinds.delta(e, update.layout or target.layout, a, b, update.scale)
        change = kinds.pad_region(e, change, target.region, target.parameter.shape)
        graph.rebase(site, e.op("add", w, change))


def reads_otherwise(found: Found, key: str) -> bool:
    """True when a graph uses a key's parameter, but in other parts than the key says."""
    return any(t.parameter.name == base_name(key) for t in found.targets)


def factors(
    e: Any, key: str, update: LowRank, like: V, role: Role, scale: float | None = None
) -> tuple[V, V]:
    """A and scale·b as values in the dtype of `like`, from the tensors of one update."""
    a_name, b_name = slot_names(key)
    a = e.op("cast_like", e.parameter(a_name, update.a, role), like)
    b = e.parameter(b_name, update.b, role)
    if scale is not None:
        b = e.op("mul", b, float(scale))
    return a, e.op("cast_like", b, like)
