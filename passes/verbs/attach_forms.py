"""The forms that attach gives to targets, so that a live module computes what insert would.

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_fx.adapter.lowrank import Updates
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import Form, Planner
from lora_fx.fx.attach.live import ALWAYS, INSIDE, OUTSIDE
from lora_fx.fx.attach.module_bodies import bodies_of, is_one_op, takes_one_tensor
from lora_fx.fx.attach.recording import Program, Recorder, Value
from lora_fx.fx.dotted_names import named_tensors, owner
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import argument, aten_ops
from lora_fx.ir import kinds
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.view import Permute, View
from lora_fx.passes.find import site_layout
from lora_fx.passes.insert import Insert, Pair, changed
from lora_fx.targets.found import Found
from lora_fx.targets.keys import applies, split_use
from lora_fx.targets.target import Target
from lora_fx.text import by_key

Owner = tuple[str, str]
"""(module path, attribute name) of a parameter."""


REPEATS = aten_ops("expand repeat")


class GraphPlanner(Planner):
    """A planner that chooses forms from an eval graph.

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
        first_paths = {id(module): path for path, module in root.named_modules()}
        self.path_of = {
            path: first_paths[id(module)]
            for path, module in root.named_modules(remove_duplicate=False)
        }
        self.owners: dict[str, dict[Owner, None]] = {}  # each once, in order
        for name, canonical in named_tensors(root)[0].items():
            module, leaf = owner(root, name)
            self.owners.setdefault(canonical, {})[first_paths[id(module)], leaf] = None

        self.lone_ops: frozenset[str] = frozenset()
        self.stacks: dict[str, Site] = {}
        if whole:
            self.lone_ops = self._lone_ops(graph)
            self.stacks = self._stacks()
        self.with_stacks = self._with_stacks()

    def _lone_ops(self, graph: FxGraph) -> frozenset[str]:
        """Return the ids of the sites whose module's forward is just that op."""
        fixed = graph.flow().behind
        bodies = bodies_of(graph.graph)
        ids = set()
        for site in graph.sites():
            if site.refusal or isinstance(site.kind, (kinds.WeightForm, kinds.Grouped)):
                continue
            if site.scope not in self.path_of:
                continue
            if not takes_one_tensor(graph.root.get_submodule(site.scope)):
                continue
            if is_one_op(site, graph.output(site), graph.activation(site), fixed, bodies):
                ids.add(site.id)
        return frozenset(ids)

    def _stacks(self) -> dict[str, Site]:
        """Return the sites that are a product with a whole stack, as a Grouped site by site id."""
        stacks = {}
        for target in self.found.targets:
            for site in target.sites:
                stack = stack_of(site, target.parameter.shape)
                if stack is not None and site.id not in self.lone_ops:
                    stacks[site.id] = stack
        return stacks

    def _with_stacks(self) -> Found:
        """Return the targets, with uses of stacks replaced by these grouped products."""
        targets = []
        for target in self.found.targets:
            sites = tuple(self.stacks.get(site.id, site) for site in target.sites)
            targets.append(replace(target, sites=sites))
        return replace(self.found, targets=tuple(targets))

    def forms(self, updates: Updates, by_weight: frozenset[str] = frozenset()) -> dict[str, Form]:
        """Return the form of each module to change, by module path.

        Raises:
            LoraFxError: An update that reaches only some of the uses in one forward.
        """
        branches = self._branches(updates)
        for key, reason in self.unreached(updates, by_weight).items():
            raise LoraFxError(reason, f"pass exclude={key!r}, or use lora_fx.insert")

        pairs = [(self.found[key], update) for key, update in updates.items()]
        by_parameter = by_key((pair[0].parameter.name, pair) for pair in pairs)
        result: dict[str, Form] = {}
        for name, group in by_parameter.items():
            if not name.endswith("~"):
                self._place(name, group, branches, by_weight, result)
                continue
            # a computed weight is no parameter: there is only the output form
            for target, _ in group:
                for site in target.sites:
                    form = result.setdefault(self.path_of[site.scope], Form())
                    form.output = branches[site.id]
        return result

    def _branches(self, updates: Updates) -> dict[str, tuple[Program, Program]]:
        """Return the programs of the new outputs by site id: one for eval, one for train mode."""
        if self.graph is None:
            return {}
        in_eval = _Recorded(self.graph, self.with_stacks).run(updates, self.dropout, training=False)
        in_training = _Recorded(self.graph, self.with_stacks).run(
            updates, self.dropout, training=True
        )
        return {
            site_id: (program, in_training[site_id])
            for site_id, program in in_eval.items()
            if site_id in self.lone_ops or site_id in self.stacks
        }

    def unreached(
        self, updates: Updates, by_weight: frozenset[str] = frozenset()
    ) -> dict[str, str]:
        """Return the computed weights that no module's output shows, each with the reason."""
        computed = {
            key: update
            for key, update in updates.items()
            if self.found[key].parameter.name.endswith("~")
        }
        if not computed:
            return {}
        branches = self._branches(computed)
        reasons = {}
        for key in computed:
            for site in self.found[key].sites:
                behind = f"the model computes this weight from {', '.join(site.behind)}"
                if site.id not in self.lone_ops or self.path_of[site.scope] in by_weight:
                    reasons[key] = f"{key}: {behind}, and no module's forward is this op alone"
                elif site.id not in branches:  # DoRA's norms are those of W + s·B·A
                    reasons[key] = f"{key}: {behind}, and this update needs the weight itself"
        return reasons

    def lost(self, updates: Updates) -> dict[str, str]:
        """Return the updates that no form of attach can carry out, with reasons; insert can."""
        reasons = self.unreached(updates)
        placeable = {key: update for key, update in updates.items() if key not in reasons}
        while placeable:
            try:
                forms = self.forms(placeable)
            except InseparableError as e:
                reasons[e.key] = e.message
                del placeable[e.key]
                continue
            return reasons | self._misread(placeable, forms)
        return reasons

    def repeated(self, keys: Iterable[str]) -> set[str]:
        """Return the keys whose weight is another tensor, repeated for every row."""
        repeated: set[str] = set()
        if self.graph is None:
            return repeated
        for key in keys:
            site = self.found[key].sites[0]
            if self.graph.weight(site).target in REPEATS:
                repeated.add(key)
        return repeated

    def _misread(self, updates: Updates, forms: Mapping[str, Form]) -> dict[str, str]:
        """Return the updates whose weight form other ops than matmuls would read, with reasons."""
        reasons = {}
        for key in updates:
            target = self.found[key]
            if not target.other_readers:
                continue
            for path, leaf in self.owners.get(target.parameter.name, ()):
                if path in forms and leaf in forms[path].weights:
                    reasons[key] = (
                        f"{target.said}, and the forward of another module also uses it in a matmul"
                    )
        return reasons

    def _place(
        self,
        name: str,
        group: Sequence[Pair],
        branches: Mapping[str, tuple[Program, Program]],
        by_weight: frozenset[str],
        result: dict[str, Form],
    ) -> None:
        """Choose the form of each module that owns a parameter, and write the form into `result`.

        1. A stack gets the branch of its products, and the weight form.
        2. A module gets the branch where the update reaches all of its uses and none outside it.
           An output head whose uses all lie inside gets the weight form outside its forward too.
        3. Any other gets the weight form, where its uses are reached.
        """
        self._refuse_one_use_in_parts(name, group)
        owners = self.owners[name]
        homes = {path for path, _ in owners}
        for path, leaf in owners:
            reach = self._reach(path, homes, group)
            if not reach.places:
                continue
            if len(set(reach.places.values())) > 1:
                where = f"{path or 'the model'}.{leaf}"
                raise InseparableError(
                    group[0][0],
                    f"{where} would need one update inside the module and another one outside it",
                )

            reached = [pair for pair in group if pair[0].key in reach.places]
            branch = reach.branch(branches)
            form = result.setdefault(path, Form())
            where = next(iter(reach.places.values()))
            if branch is not None and reach.sites[0].id in self.stacks:
                if path not in by_weight and where == ALWAYS:
                    form.stacks[leaf] = branch
            elif branch is not None and reach.is_alone and path not in by_weight:
                form.output = branch
                # A parameter with W + s·B·A would change what else reads it in the module.
                if not any(target.other_readers for target, _ in group):
                    form.merged = (leaf, weight_form(reached))
                    form.sites = frozenset(site.id for site in reach.sites)
                where = OUTSIDE
                is_head = any(target.role == "head" for target, _ in group)
                if reach.has_uses_outside or reach.is_lookup or not is_head:
                    continue
            form.weights[leaf] = weight_form(reached), where

    def _refuse_one_use_in_parts(self, name: str, group: Sequence[Pair]) -> None:
        """Raise for an update of one use if only partial graphs exist: these know no modules."""
        if self.graph is not None:
            return
        for target, update in group:
            if update.use or split_use(target.key)[1]:
                raise LoraFxError(
                    f"{target.key}: partial graphs cannot tell the uses of a tied tensor apart "
                    f"({', '.join(target.uses)})",
                    f"pass exclude={target.key!r}, or adapt all its uses: include='re:{name}'",
                )

    def _module_of(self, site: Site) -> str | None:
        """Return the first path of the module whose forward holds a use; None in partial graphs."""
        if self.graph is None:
            return None
        return self.path_of.get(site.scope)

    def _reach(self, path: str, homes: Collection[str], group: Sequence[Pair]) -> _Reach:
        """Find the uses that a group of updates reaches, inside one module and outside it.

        Args:
            path: The module.
            homes: All modules that have the parameter; uses in another of them count for that one.
            group: The updates of the parameter.

        Raises:
            InseparableError: An update reaches only some of the uses inside, or outside.
        """
        reach = _Reach()
        for target, update in group:
            inside = set()
            outside = set()
            for site in self.found[split_use(target.key)[0]].sites:
                scope = self._module_of(site)
                is_reached = site in target.sites and applies(update.use, site)
                if scope == path:
                    reach.sites.append(site)
                    inside.add(is_reached)
                elif scope not in homes:
                    outside.add(is_reached)

            if len(inside) > 1 or len(outside) > 1:
                raise InseparableError(
                    target,
                    f"{path or 'the model'}.forward has both uses with the update and uses "
                    "without it",
                )
            if outside:
                reach.has_uses_outside = True
            if True not in inside and True not in outside:
                continue
            if len(inside | outside) == 1:
                reach.places[target.key] = ALWAYS
            elif True in inside:
                reach.places[target.key] = INSIDE
            else:
                reach.places[target.key] = OUTSIDE
            if inside != {True} or True in outside:
                reach.is_alone = False
        return reach


@dataclass
class _Reach:
    """The uses that the updates of a parameter reach, as seen from one module that owns it.

    Attributes:
        sites: The uses in the module.
        places: Key → where its weight form holds; keys that reach nothing have none.
        is_alone: Every use in the module is reached, and none outside it.
        has_uses_outside: There is a use outside the modules that have the parameter.
    """

    sites: list[Site] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    is_alone: bool = True
    has_uses_outside: bool = False

    @property
    def is_lookup(self) -> bool:
        return any(site.op == "embedding" for site in self.sites)

    def branch(
        self, branches: Mapping[str, tuple[Program, Program]]
    ) -> tuple[Program, Program] | None:
        """Return the branch that all uses in the module share; None if they differ or have none."""
        programs = {branches.get(site.id) for site in self.sites}
        return programs.pop() if len(programs) == 1 else None


class InseparableError(LoraFxError):
    """The error of an update that reaches only some uses of its tensor in one forward."""

    def __init__(self, target: Target, why: str) -> None:
        self.key = target.key
        super().__init__(
            f"{target.key}: the update is for only some uses of the tensor, but {why}",
            f"adapt all its uses ({', '.join(target.uses)}), or use lora_fx.insert",
        )


def weight_form(group: Sequence[Pair]) -> Program:
    """Return a program that adds the updates of one parameter to W, in its stored shape."""
    recorder = Recorder()
    weight = Value(0)
    total = weight
    for target, update in group:
        total = changed(recorder, target, update, weight, total, Role.TRAIN)
    return recorder.program(total)


def stack_of(site: Site, shape: tuple[int, ...]) -> Site | None:
    """Return a use as a grouped product with a whole stack [experts, …], or None."""
    region_and_layout = site_layout(site, shape)
    if region_and_layout is None or len(shape) != 3:
        return None
    layout = region_and_layout[1]
    if layout.shape != shape or layout.batch != (0,):
        return None
    axes = (0, *layout.in_, *layout.out)
    return replace(
        site,
        kind=kinds.Grouped(),
        view=View((Permute(axes),)),
        operand=tuple(shape[axis] for axis in axes),
        # rows of whole 16 bytes, whatever dtype and kernel the model is switched to
        attrs={"rank_multiple": 8},
    )


class _Recorded:
    """A stand-in for a Graph that records what Insert would add to each site's output."""

    def __init__(self, graph: FxGraph, found: Found) -> None:
        self.graph = graph
        self.found = found
        self.emitters: dict[str, Recorder] = {}
        self.programs: dict[str, Program] = {}

    def run(self, updates: Updates, dropout: float, *, training: bool) -> dict[str, Program]:
        """Return the program of the new output by site id; sites in weight form have none."""
        Insert(updates, dropout=dropout, training=training, missing="skip")(self)  # type: ignore[arg-type]
        return self.programs

    def kept(self, what: str, compute: object, *, by_name: bool = False) -> Found:
        return self.found  # the one analysis that Insert asks for

    def changed(self) -> None: ...

    def adapted(self) -> frozenset[str]:
        return frozenset()

    def emit(self, site: Site, *, before: bool = False) -> Recorder:
        if site.id not in self.emitters:
            self.emitters[site.id] = Recorder(self._padding(site))
        return self.emitters[site.id]

    def _padding(self, site: Site) -> int | None:
        """Return the index of the row of a lookup table that stays zero, or None."""
        if site.op != "embedding":
            return None
        index = int(argument(self.graph.output(site), "padding_idx", -1))
        return None if index < 0 else index

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
