"""Forms of attach: the targets and the maths of insert on a live module instead of a graph.

    output form    the module's forward returns y + B(A x)·s: only where the graph shows that
                   this forward is one op on the weight, and that every use of the weight that
                   the update reaches is in it
    stacks         the products of `module.leaf` [experts, …] give y + B(A x)·s, whichever op
                   they are: transformers has several, and takes another one to decode
    weight form    every read of `module.leaf` gives W + s·B·A, or DoRA's W': everywhere else

An output head whose uses all lie inside has both: trainers that never make all logits read its
weight outside its forward.

The branch of the output form is what the Insert pass emits for the site, recorded by an eager
Emitter; the weight form is kinds.delta. Where a tied tensor's update reaches one use only
(LowRank.use), the reads of that module are adapted and the others are not; a module whose own
forward holds both kinds of use cannot tell them apart, and is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_fx.adapter.lowrank import Updates
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import Form, Planner
from lora_fx.fx.attach.live import ALWAYS, INSIDE, OUTSIDE, Program, Recorder, Value
from lora_fx.fx.attach.partial import bodies_of, one_argument, one_op
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import argument, aten_ops
from lora_fx.fx.tensors import named_tensors, owner
from lora_fx.ir import kinds
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.view import Permute, View
from lora_fx.passes.find import site_layout
from lora_fx.passes.insert import Insert, Pair, changed
from lora_fx.targets.target import Found, Target, applies, split_use
from lora_fx.text import by_key

Owner = tuple[str, str]
"""Module path and leaf."""


REPEATS = aten_ops("expand repeat")


class GraphPlanner(Planner):
    """Forms from an eval graph.

    Args:
        graph: The model's graph before anything is attached; it is never changed.
        found: Its targets, and what the report has to say.
        dropout: The dropout of the branches in train mode.
        whole: False where the sites come from parts of the model and know no module: then the
            weight form serves every target.
    """

    def __init__(self, graph: Any, found: Found, dropout: float, *, whole: bool = True) -> None:
        self.found = found
        self.dropout = dropout
        self.graph = graph if whole else None
        root = graph.root
        paths = {id(m): path for path, m in root.named_modules()}
        self.path_of = {p: paths[id(m)] for p, m in root.named_modules(remove_duplicate=False)}
        self.owners: dict[str, dict[Owner, None]] = {}  # each once, in order
        for name, canonical in named_tensors(root)[0].items():
            module, leaf = owner(root, name)
            self.owners.setdefault(canonical, {})[paths[id(module)], leaf] = None
        self.clean = self._clean(graph) if whole else frozenset()
        uses = (
            (s, stack_of(s, t.parameter.shape)) for t in found.targets for s in t.sites if whole
        )
        self.stacks = {s.id: stack for s, stack in uses if stack and s.id not in self.clean}
        targets = (
            replace(t, sites=tuple(self.stacks.get(s.id, s) for s in t.sites))
            for t in found.targets
        )
        self.stacked = replace(found, targets=tuple(targets))

    def _clean(self, graph: FxGraph) -> frozenset[str]:
        """Ids of the sites whose module's forward is that op alone."""
        fixed, bodies = graph.flow().behind, bodies_of(graph.graph)
        return frozenset(
            site.id
            for site in graph.sites()
            if not site.refusal
            and not isinstance(site.kind, (kinds.WeightForm, kinds.Grouped))
            and site.scope in self.path_of
            and one_argument(graph.root.get_submodule(site.scope))
            and one_op(site, graph.output(site), graph.activation(site), fixed, bodies)
        )

    def forms(self, updates: Updates, by_weight: frozenset[str] = frozenset()) -> dict[str, Form]:
        """Module path → Form.

        Raises:
            LoraFxError: An update that reaches only some of the uses in one forward.
        """
        branches = self._branches(updates)
        for key, why in self.unreached(updates, by_weight).items():
            raise LoraFxError(why, f"exclude={key!r}, or use lora_fx.insert")
        pairs = [(self.found[key], update) for key, update in updates.items()]
        result: dict[str, Form] = {}
        for name, group in by_key((t.parameter.name, (t, u)) for t, u in pairs).items():
            if not name.endswith("~"):
                self._place(name, group, branches, by_weight, result)
                continue
            # a computed weight is no parameter: there is only the output form
            for site in (s for t, _ in group for s in t.sites):
                result.setdefault(self.path_of[site.scope], Form()).output = branches[site.id]
        return result

    def _branches(self, updates: Updates) -> dict[str, tuple[Program, Program]]:
        """Site id → the programs of its new output, in eval and in train mode."""
        if self.graph is None:
            return {}
        evals, trains = (
            _Recorded(self.graph, self.stacked).run(updates, self.dropout, training=t)
            for t in (False, True)
        )
        return {k: (evals[k], trains[k]) for k in evals if k in self.clean | {*self.stacks}}

    def unreached(
        self, updates: Updates, by_weight: frozenset[str] = frozenset()
    ) -> dict[str, str]:
        """Computed weights that no module's output shows, and why each is out of reach."""
        computed = {k: u for k, u in updates.items() if self.found[k].parameter.name.endswith("~")}
        branches = self._branches(computed) if computed else {}
        lost = {}
        for key in computed:
            for site in self.found[key].sites:
                behind = f"the model computes this weight from {', '.join(site.behind)}"
                if site.id not in self.clean or self.path_of[site.scope] in by_weight:
                    lost[key] = f"{key}: {behind}, and no module's forward is that op alone"
                elif site.id not in branches:  # DoRA's norms are those of W + s·B·A
                    lost[key] = f"{key}: {behind}, and this update needs the weight itself"
        return lost

    def lost(self, updates: Updates) -> dict[str, str]:
        """Updates that no form carries out as the graph has them, and why; insert does."""
        lost = self.unreached(updates)
        left = {k: u for k, u in updates.items() if k not in lost}
        while left:
            try:
                forms = self.forms(left)
            except InseparableError as e:
                lost[e.key] = e.message
                del left[e.key]
                continue
            misread = self._misread(left, forms)
            return lost | misread
        return lost

    def repeated(self, keys: Iterable[str]) -> set[str]:
        """Those of some keys whose weight is another tensor, repeated."""
        if self.graph is None:
            return set()
        sites = {key: self.found[key].sites[0] for key in keys}
        return {k for k, site in sites.items() if self.graph.weight(site).target in REPEATS}

    def _misread(self, updates: Updates, forms: Mapping[str, Form]) -> dict[str, str]:
        """Updates in every read of a weight that more than matmuls read, and why they are wrong."""
        return {
            k: f"{self.found[k].said}, and a matmul reads it outside a module of its own"
            for k in updates
            if self.found[k].other_readers
            for path, leaf in self.owners.get(self.found[k].parameter.name, ())
            if path in forms and leaf in forms[path].weights
        }

    def _place(
        self,
        name: str,
        group: Sequence[Pair],
        branches: Mapping[str, tuple[Program, Program]],
        by_weight: frozenset[str],
        result: dict[str, Form],
    ) -> None:
        owners = self.owners[name]
        homes = {path for path, _ in owners}
        for target, update in group:
            if self.graph is None and (update.use or split_use(target.key)[1]):
                raise LoraFxError(
                    f"{target.key}: partial graphs cannot tell the uses of a tied tensor apart "
                    f"({', '.join(target.uses)})",
                    f"exclude={target.key!r}, or adapt all its uses: include='re:{name}'",
                )
        for path, leaf in owners:
            own: list[Site] = []
            places: dict[str, str] = {}  # key → where its weight form holds
            alone = True  # no use outside this module is reached
            known = False  # a use outside this module was found
            for target, update in group:
                inside, outside = set(), set()
                for site in self.found[split_use(target.key)[0]].sites:
                    scope = self.path_of.get(site.scope) if self.graph is not None else None
                    hit = site in target.sites and applies(update.use, site)
                    if scope == path:
                        own.append(site)
                        inside.add(hit)
                    elif scope not in homes:
                        outside.add(hit)
                known = known or bool(outside)
                if len(inside) > 1 or len(outside) > 1:
                    raise InseparableError(target, f"{path or 'the model'}.forward has both uses")
                if True in inside | outside:
                    apart = INSIDE if True in inside else OUTSIDE
                    places[target.key] = apart if len(inside | outside) > 1 else ALWAYS
                    alone = alone and inside == {True} and True not in outside
            if not places:
                continue
            if len(set(places.values())) > 1:
                raise InseparableError(group[0][0], f"{path or 'the model'}.{leaf} has two readers")
            programs = {branches.get(s.id) for s in own}
            (only,) = programs if len(programs) == 1 else (None,)
            form = result.setdefault(path, Form())
            where = places[next(iter(places))]
            if only is not None and own[0].id in self.stacks:
                if path not in by_weight and where == ALWAYS:
                    form.stacks[leaf] = only
            elif alone and path not in by_weight and only is not None:
                form.output, where = only, OUTSIDE
                lookup = any(site.op == "embedding" for site in own)
                if known or lookup or all(t.role != "head" for t, _ in group):
                    continue
            form.weights[leaf] = weight_form([(t, u) for t, u in group if t.key in places]), where


class InseparableError(LoraFxError):
    """An update that reaches only some of the uses that one forward has of its tensor."""

    def __init__(self, target: Target, why: str) -> None:
        self.key = target.key
        super().__init__(
            f"{target.key}: the update reaches only some uses of the tensor, and {why}",
            f"adapt all its uses ({', '.join(target.uses)}), or use lora_fx.insert",
        )


def weight_form(group: Sequence[Pair]) -> Program:
    """W with the updates of one parameter in it, in its stored shape."""
    e = Recorder()
    w = total = Value(0)
    for target, update in group:
        total = changed(e, target, update, w, total, Role.TRAIN)
    return e.program(total)


def stack_of(site: Site, shape: tuple[int, ...]) -> Site | None:
    """The use as a grouped product with all of a stack [experts, …]; None where it is none."""
    read = site_layout(site, shape)
    if read is None or len(shape) != 3 or read[1].shape != shape or read[1].batch != (0,):
        return None
    axes = (0, *read[1].in_, *read[1].out)
    view, operand = View((Permute(axes),)), tuple(shape[axis] for axis in axes)
    # rows of whole 16 bytes, whatever dtype and kernel the model is switched to
    attrs = {"rank_multiple": 8}
    return replace(site, kind=kinds.Grouped(), view=view, operand=operand, attrs=attrs)


class _Recorded:
    """A Graph whose emitters record: what Insert would add to each output, site by site."""

    def __init__(self, graph: FxGraph, found: Found) -> None:
        self.graph, self.found = graph, found
        self.emitters: dict[str, Recorder] = {}
        self.programs: dict[str, Program] = {}

    def run(self, updates: Updates, dropout: float, *, training: bool) -> dict[str, Program]:
        """Site id → the program of its new output; sites in weight form have none."""
        Insert(updates, dropout=dropout, training=training, missing="skip")(self)  # type: ignore[arg-type]
        return self.programs

    def kept(self, what: str, compute: object, *, by_name: bool = False) -> Found:
        return self.found  # the one analysis that Insert asks for

    def changed(self) -> None: ...

    def adapted(self) -> frozenset[str]:
        return frozenset()

    def emit(self, site: Site, *, before: bool = False) -> Recorder:
        if site.id not in self.emitters:
            padding = None
            if site.op == "embedding":
                index = int(argument(self.graph.output(site), "padding_idx", -1))
                padding = None if index < 0 else index
            self.emitters[site.id] = Recorder(padding)
        return self.emitters[site.id]

    def activation(self, site: Site) -> Value:
        return Value(0)

    kept_activation = activation

    def weight(self, site: Site) -> Value:
        return Value(0)

    def picked(self, site: Site, e: Recorder) -> Value:
        return e.op("picked")  # by operands of the op's own: no primitive, so no output form

    def output(self, site: Site) -> Value:
        return Value(1)

    def replace_output(self, site: Site, y: Value) -> None:
        with contextlib.suppress(LoraFxError):  # a primitive without a torch function
            self.programs[site.id] = self.emitters[site.id].program(y)

    def product(self, site: Site, e: object) -> Value | None:
        return None

    def rebase(self, site: Site, w: Value) -> None: ...
