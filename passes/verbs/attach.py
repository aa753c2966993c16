"""attach and detach: the user's own live module adapted in place, proven equal to its graph.

One eval graph, at the sizes of the example, shows the targets: the live model runs at all sizes.
The proof runs the attached model and the graph with random A and B on the example inputs, in
eval mode, and only then writes the initial values. A module whose branch did not run there (a
fused path reads its weight raw) changes to the weight form first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import Init, VariantName, learning
from lora_fx.errors import CaptureError, LoraFxError, one_line
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.attach.attachment import Attachment, Form, Planner, attachment, is_attached
from lora_fx.fx.attach.live import ALWAYS, INSIDE, OUTSIDE, REGISTRY, Program, Recorder, Value
from lora_fx.fx.attach.partial import bodies_of, one_argument, one_op, partial_graphs
from lora_fx.fx.capture.call import Called, Signature, unwrapped, wrappers
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.quantised_layers import keep_trainable, let_pack
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import argument, aten_ops
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import named_tensors, owner, refuse_inference
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.untie import lone_names, untie
from lora_fx.inputs import Dynamic, Named
from lora_fx.ir import kinds
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.view import Permute, View
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.find import site_layout
from lora_fx.passes.insert import Insert, Pair, changed
from lora_fx.passes.proofs import attached
from lora_fx.passes.proofs.live_model import eval_mode
from lora_fx.passes.verbs.build import found_in, start_of
from lora_fx.passes.verbs.open import captured_again, captured_of, user_module
from lora_fx.passes.verbs.options import CaptureOptions, Dead, InsertOptions, NormStats, Selectors
from lora_fx.progress import Listener, said, told
from lora_fx.targets.plan import GivenRanks, Plan
from lora_fx.targets.target import Found, Target, applies, split_use
from lora_fx.text import by_key


@told
def attach(
    model: Any,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    also_train: Selectors = None,
    variant: VariantName | None = None,
    dropout: float = 0.0,
    plan: Plan | GivenRanks | None = None,
    adapter: AdapterLike | None = None,
    seed: int | None = None,
    *,
    dynamic: Dynamic | None = None,
    norm_stats: NormStats = "frozen",
    dead: Dead = "auto",
    init: Init | None = None,
    data: Iterable[Named] | None = None,
    loss: str | Loss | None = None,
    progress: Listener | None = None,
) -> Any:
    """Adapt a live module in place, with the targets and numbers that insert would give.

    The model keeps its class's methods, Python control flow and hooks; A and B become parameters
    beside their weights, everything else stops requiring grad. While attached it has `adapter()`,
    `load_adapter(adapter)` and `report()`. `detach` gives the original back.

    Args:
        model: An nn.Module, or a Captured of one. It is changed.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        rank: As in insert, like alpha, include, exclude, also_train, variant, plan, seed, init,
            data and loss.
        dropout: On the input of each branch, in train mode; a weight that is computed as
            W + s·B·A has none.
        adapter: As in insert: start from this adapter, which brings its own of all of these.
        dynamic: As in capture.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they do what they did before.
        dead: As in insert: what becomes of targets that no gradient reaches.

    Returns:
        The same object.

    Raises:
        LoraFxError: As insert; an update that cannot reach one use of a tied tensor alone; a
            target whose effect on the live model is not that of the graph.
    """
    asked: Named = {
        "rank": rank, "alpha": alpha, "include": include, "exclude": exclude,
        "also_train": also_train, "variant": variant, "dropout": dropout, "plan": plan,
        "adapter": None if adapter is None else as_adapter(adapter), "seed": seed,
        "norm_stats": norm_stats, "dead": dead, "init": init, "data": data, "loss": loss,
    }  # fmt: skip
    options = InsertOptions.of(asked)
    if is_attached(model):
        raise LoraFxError(
            "an adapter is attached to this model already", "detach it, or use load_adapter"
        )
    with torch.inference_mode(False), contextlib.ExitStack() as ties:  # A and B train
        live = model if isinstance(model, Captured) else _module(model)
        if options.adapter is not None:
            live = _apart(live, options.adapter, ties)
        example = CaptureOptions(
            args=args, kwargs=kwargs, dynamic=dynamic, example_sizes=not dynamic
        )
        adapted = _attached(live, example, options, ties)
    return adapted if isinstance(model, Captured) else model


def _apart(
    model: Captured | nn.Module, adapter: Adapter, ties: contextlib.ExitStack
) -> Captured | nn.Module:
    """The model with a tensor of its own for every name of a tied one that is saved alone.

    Args:
        model: A module, which is changed, or a capture, in whose place comes another.
        adapter: What is to be attached.
        ties: Gets what ties the names again.
    """
    cap = model if isinstance(model, Captured) else None
    live = model if isinstance(model, nn.Module) else _module(user_module(model))
    names = lone_names(adapter, live)
    for step in reversed(untie(live, names)):  # the stack runs them from its end
        ties.callback(step)
    if cap is None or not names:
        return model
    return captured_again(cap, live)


def _attached(
    model: Any, example: CaptureOptions, options: InsertOptions, ties: contextlib.ExitStack
) -> Any:
    """The module that was adapted.

    Args:
        model: A module or a capture.
        example: How it is captured: its example inputs, and their sizes.
        options: What is asked for.
        ties: Goes to the attachment, which ties names again when it is taken off.
    """
    args, kwargs = example.args, example.kwargs
    source = model
    model = _module(user_module(source)) if isinstance(source, Captured) else source
    refuse_inference(model)
    cap: Captured | None
    try:
        cap = copy.deepcopy(captured_of(source, example))  # a capture of the caller stays as it is
        cap.live = True
        planner = GraphPlanner(cap.fx_graph(root=cap.model), found_in(cap), options.dropout)
    except CaptureError as e:
        call = partial(model, *args, **(kwargs or {}))
        cap, planner = None, _partial(model, call, options.dropout, e)
    start = start_of(model, cap, planner.found, options)
    updates, notes = start.adapter.lowrank, start.notes
    lost = planner.lost(updates)
    # where sizes are free, as insert has them, what is repeated for every row is no target
    repeated = planner.repeated(lost) if options.adapter is None else set()
    refused = {} if options.dead == "drop" else {k: lost[k] for k in lost if k not in repeated}
    if len(lost) == len(updates):
        refused = lost
    for key, why in refused.items():
        raise LoraFxError(why, f"exclude={key!r}, or use lora_fx.insert")
    for key, why in lost.items():
        reached = "" if key in repeated else ", lora_fx.insert reaches it"
        notes = (*notes, f"{why}: left out{reached}")
    updates = {k: u for k, u in updates.items() if k not in lost}
    # what the values of a recorded run decided need not be so with an adapter
    alone = (
        cap is not None
        and cap.recorded
        and not any(k.endswith("~") or u.use for k, u in updates.items())
    )
    probe = {k: attached.random_values(k, u) for k, u in updates.items()}
    state = Attachment(
        model,
        planner,
        also_train=start.whole,
        frozen_norms=options.norm_stats == "frozen",
        notes=notes,
        metadata=start.adapter.metadata,
    )
    state.lost = lost
    state.ties = ties.pop_all()
    signature = Signature(model.forward) if cap is None else cap.signature
    named = signature.bind(tuple(args), dict(kwargs or {})) if cap is None else cap.named
    model.__dict__[REGISTRY] = state
    try:
        state.install(probe)
        if updates:
            reference: attached.InGraph | attached.Explicit
            if cap is None or alone:
                reference = attached.Explicit(state, signature, named)
            else:
                reference = attached.InGraph(state, cap, Adapter(probe, learning(probe)))
            attached.prove_live(state, reference, probe)
        if updates and options.dead != "allow":
            idle = attached.prove_trained(state, cap, signature, named, options.dead)
            if idle:
                state.say(*start.without(idle).notes[len(start.notes) :])
                updates = {k: u for k, u in updates.items() if k not in idle}
                state.install(updates)
        for line in state.weight_form():
            said(line)
        state.fill(updates)
        state.proven = {k: u.use for k, u in updates.items()}
        if start.bound is not None and start.bound.full:
            state.load_adapter(start.bound)
        if options.adapter is not None:
            state.check_base(options.adapter)
    except BaseException:
        detach(model)
        raise
    return model


def detach(model: Any) -> Any:
    """The model as it was before attach: classes, flags, tensors and attributes; A and B go.

    Returns:
        The same object.

    Raises:
        LoraFxError: Nothing is attached, or another tool changed a module's class since.
    """
    attachment(model).uninstall()
    del unwrapped(model).__dict__[REGISTRY]
    return model


def _module(model: object) -> nn.Module:
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in wrappers(model)):
        raise LoraFxError(
            "a DistributedDataParallel synchronises the parameters that its module had when it was "
            "made: A and B would differ from process to process",
            "attach to its module, model.module, then wrap that in DistributedDataParallel again",
        )
    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        raise LoraFxError("this module is a captured graph already", "attach to the original model")
    if not isinstance(model, nn.Module) or isinstance(model, Called):
        raise LoraFxError(
            f"attach adapts a live nn.Module, not a {type(model).__name__}",
            "lora_fx.insert takes functions of tensors",
        )
    return model


def _partial(
    model: nn.Module, call: Callable[[], object], dropout: float, error: CaptureError
) -> GraphPlanner:
    """Targets from dynamo's partial graphs; the report says so.

    Raises:
        CaptureError: The model does not run on these inputs, or no graph shows a weight.
    """
    layers = keep_trainable(model)
    with eval_mode(model):
        try:
            graphs = partial_graphs(model, call)
        except Exception as e:
            raise error from e
        finally:
            let_pack(layers)
    found = find_graph(graphs)  # type: ignore[arg-type]
    if not found.targets:
        raise error
    note = (
        f"targets found in {len(graphs.graphs) + len(graphs.failed)} partial graphs, at the "
        f"example inputs: {one_line(error.message, 200)}"
    )
    found = replace(found, notes=(note, *graphs.failed))
    return GraphPlanner(graphs, found, dropout, whole=False)


# Forms of attach: the targets and the maths of insert on a live module instead of a graph.
#
#     output form    the module's forward returns y + B(A x)·s: only where the graph shows that
#                    this forward is one op on the weight, and that every use of the weight that
#                    the update reaches is in it
#     stacks         the products of `module.leaf` [experts, …] give y + B(A x)·s, whichever op
#                    they are: transformers has several, and takes another one to decode
#     weight form    every read of `module.leaf` gives W + s·B·A, or DoRA's W': everywhere else
#
# An output head whose uses all lie inside has both: trainers that never make all logits read its
# weight outside its forward.
#
# The branch of the output form is what the Insert pass emits for the site, recorded by an eager
# Emitter; the weight form is kinds.delta. Where a tied tensor's update reaches one use only
# (LowRank.use), the reads of that module are adapted and the others are not; a module whose own
# forward holds both kinds of use cannot tell them apart, and is refused.


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
