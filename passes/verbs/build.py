"""The module of a capture and its updates, proven; and what those updates start from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_fx.adapter.adapter import Adapter, bind, reading
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import (
    OF_DATA,
    OF_WEIGHT,
    initial,
    named_variant,
    relearning,
    variant_of,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.hub import origin
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import hint, shape_of
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.tensors import named_tensors, parameter_of, to_numpy, with_base
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fold import exact
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.effect import prove_effect
from lora_fx.passes.proofs.recorded_run import prove_drawn
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.reread import RecomputeWeights
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.calibrate import calibrate
from lora_fx.passes.verbs.options import InsertOptions
from lora_fx.targets.target import Found, check_storable, own_use


@dataclass(frozen=True)
class Start:
    """What a module with branches begins with.

    Attributes:
        adapter: Its updates, and the metadata that it goes on with.
        whole: The tensors that are trained whole.
        notes: What has to be said.
        bound: The adapter that was given, in the model's keys.
    """

    adapter: Adapter
    whole: tuple[str, ...]
    notes: tuple[str, ...] = ()
    bound: Adapter | None = None

    def without(self, idle: Collection[str]) -> Start:
        """The same, less the targets that no gradient reaches."""
        kept = {k: u for k, u in self.adapter.entries.items() if k not in idle}
        left = (f"{k}: left out, no gradient reaches it at the example's sizes" for k in idle)
        adapter = replace(self.adapter, entries=kept)
        return replace(self, adapter=adapter, notes=(*self.notes, *left))


def start_of(model: nn.Module, cap: Captured | None, found: Found, options: InsertOptions) -> Start:
    """The updates of the adapter that was given, or new ones of the targets that are asked for.

    Args:
        model: Where the tensors are.
        cap: The model's capture; None where no single graph can hold it.
        found: Its targets.
        options: What the verb is asked for.

    Raises:
        LoraFxError: No target, an adapter that does not fit, a start that cannot be had.
    """
    if options.adapter is not None:
        bound = bind(with_base(options.adapter, model), found)
        updates, metadata = relearning(bound.lowrank, bound.metadata)
        metadata["dropout"] = options.dropout
        for key, u in updates.items():
            if u.mutated or variant_of(u).reads_weight:
                check_storable(found[key], f"{u.mutated or u.variant} reads W itself")
        said = tuple(text for k in updates if (text := found[k].said))
        said += tuple(
            f"the adapter's whole tensor {row.key}: {row.reason}"
            for row in found.unreached
            if row.key in bound.full
        )
        return Start(Adapter(updates, metadata), tuple(bound.full), said, bound)
    plan = options.planned(found, named_tensors(model)[0])
    moments, said = None, tuple[str, ...]()
    if options.init in OF_DATA:
        if cap is None or options.data is None:
            raise LoraFxError(
                f"init {options.init!r} needs a model that one graph can hold, and data",
                "kaiming, gaussian, orthogonal, pissa or olora",
            )
        uses = {key: own_use(key) for key in plan.entries}
        seen = calibrate(cap, uses, options.data, options.loss, (OF_DATA[options.init],))
        moments, said = seen.moments, seen.notes
    read: Callable[[str], Array] | None = None
    if options.init in OF_WEIGHT or named_variant(options.variant).reads_weight:
        read = cap.fx_graph().read if cap else lambda name: to_numpy(parameter_of(model, name))
    made, notes = initial(found, plan, options.variant, options.seed, options.init, read, moments)
    read_too = (text for k in made if (text := found[k].said))
    pooled = [k for k, u in made.items() if variant_of(u).constant_over]
    graph = cap.fx_graph() if cap and pooled else None
    coded = [k for k in pooled if found[k].no_fold]
    lost = [(k, exact(graph, found[k], made[k])) for k in coded] if graph else []
    never = (f"{k} will not be folded: {why}" for k, why in lost if isinstance(why, str))
    notes = (*plan.notes, *options.notes, *said, *notes, *read_too, *never)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)  # of transformers
    base = origin(name) if isinstance(name, str) and name else {}
    metadata = reading(found, made, {"dropout": options.dropout, **base})
    return Start(Adapter(made, metadata), plan.also_train, notes)


def adapted_module(
    cap: Captured, found: Found, start: Start, options: InsertOptions
) -> AdaptedModule:
    """The module with these updates, before anything is proven of it."""

    def inserter(now: Updates, training: bool) -> Callable[[FxGraph], object]:
        return Insert(now, dropout=options.dropout, training=training, missing="skip")

    return AdaptedModule(
        cap,
        found,
        start.adapter,
        inserter,
        also_train=start.whole,
        norm_stats=options.norm_stats,
        notes=start.notes,
        speedups=speedups if options.fast else plainly,
    )


def build_module(cap: Captured, options: InsertOptions) -> AdaptedModule:
    """The module that insert returns: every target is proven to take effect, unless dead="allow".

    Raises:
        NoEffectError: A target that no gradient reaches, or a branch that is not W + s·b·a.
    """
    found = found_in(cap)
    start = start_of(cap.model, cap, found, options)
    module = adapted_module(cap, found, start, options)
    if options.dead != "allow" and start.adapter.entries:
        # a target is dead below a share of the median gradient, and each drop moves the median
        while idle := prove_effect(module, options.dead):
            start = start.without(idle)
            module = adapted_module(cap, found, start, options)
    if start.bound is not None and start.bound.full:
        module.load_adapter(start.bound)
    if options.adapter is not None:
        module.check_base(options.adapter)
    module.say(*prove_drawn(module))
    return module


def found_in(cap: Captured, training: bool = False, graph: FxGraph | None = None) -> Found:
    """The targets of a capture, or of a graph of it, with what was fixed and said on the way."""
    graph = graph or cap.fx_graph(training)
    found = find(graph)
    # those of the trace, where an example's one row may be two
    given = zip(leaf_names(cap.named), graph.graph.find_nodes(op="placeholder"), strict=False)
    shapes = {name: shape_of(node) for name, node in given}
    sizes = {n: tuple(hint(d) for d in s) for n, s in shapes.items() if s is not None}
    notes = tuple(cap.notes)
    return replace(found, pinned=tuple(cap.pinned), ranges=cap.ranges, notes=notes, sizes=sizes)


def speedups(blocks: Sequence[str]) -> list[Callable[[FxGraph], object]]:
    """The passes of train programs, in order."""
    paths = tuple(blocks)
    return [Clean(), Share(paths, free=True), Fuse(True), Recompute(paths), RecomputeWeights()]


def plainly(blocks: Sequence[str]) -> list[Callable[[FxGraph], object]]:
    """Those of a program that is run as it was captured: no weight as numbers is kept."""
    return [RecomputeWeights()]


def module_of(captured: FileCaptured) -> CapturedModule:
    """The module of an opened file."""
    adapter = captured.adapter
    if adapter is None:
        return CapturedModule(captured)
    options = InsertOptions(
        adapter=adapter, dropout=captured.dropout, norm_stats=captured.norm_stats
    )
    return build_module(captured.plain(), options)
