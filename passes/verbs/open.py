"""What a verb is given, as a capture or as a module: opened, quantised, built and proven.

It may be a module, a function, a file, or a module of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath

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
from lora_fx.errors import LoraFxError, NoSay, given_options, refuse_no_say
from lora_fx.files.hub import origin
from lora_fx.fx.attach.attachment import is_attached
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.capture.root_module import unwrapped
from lora_fx.fx.codes import beside, taken, tensors_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import hint, shape_of
from lora_fx.fx.load.huggingface import LoadedModel
from lora_fx.fx.load.models import load_model
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured, is_program, open_program
from lora_fx.fx.tensors import named_tensors, parameter_of, to_numpy, with_base
from lora_fx.fx.untie import lone_names, untied
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fold import exact
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.effect import prove_effect
from lora_fx.passes.proofs.recorded import prove_drawn
from lora_fx.passes.quantise import Quantise, turned_rows
from lora_fx.passes.recompute import Recompute, RecomputeWeights
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.calibrate import calibrate
from lora_fx.passes.verbs.options import ExportAdapters, InsertOptions, Selectors
from lora_fx.targets.plan import make_plan
from lora_fx.targets.target import Found, Target, check_storable, own_use
from lora_fx.text import human


def captured_of(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    *,
    meta: bool = False,
    repeat: bool = True,
    adapter: Adapter | None = None,
) -> Captured:
    """The capture of a model; a Captured or a captured module brings its own.

    A text or path is loaded as on the command line (a Hugging Face folder, file.py:factory …),
    without its weights where `meta` is given. Where the adapter saves one name of a tied tensor,
    the capture is of a copy of the model in which this name has a tensor of its own.
    """
    model = unwrapped(model)
    if isinstance(model, (Captured, CapturedModule)):
        refuse_dynamic(dynamic)
        return apart(model, adapter) if isinstance(model, Captured) else model.captured
    if is_attached(model):
        raise LoraFxError(
            f"an adapter is attached to this {type(model).__name__}",
            "keep model.adapter(), then lora_fx.detach(model), and pass the adapter",
        )
    if is_program(model):
        return apart(open_program(model, args, kwargs, dynamic, meta=meta), adapter)
    if isinstance(model, (str, PathLike)):
        model = load_model(fspath(model), meta=meta)
    module = model.module if isinstance(model, LoadedModel) else model
    if adapter is None or not isinstance(module, nn.Module):
        return capture(model, args, kwargs, dynamic, repeat=repeat)
    names = lone_names(adapter, module)
    if not names:
        return capture(model, args, kwargs, dynamic, repeat=repeat)
    changed = untied(module, names)
    source = replace(model, module=changed) if isinstance(model, LoadedModel) else changed
    cap = capture(source, args, kwargs, dynamic, repeat=repeat)
    cap.notes.append(said_of_names(names))
    return cap


def apart(cap: Captured, adapter: Adapter | None) -> Captured:
    """The capture; another one where the adapter saves one name of a tied tensor.

    Raises:
        LoraFxError: There is such a name, and no source that could be captured again.
    """
    names = lone_names(adapter, cap.model) if adapter else ()
    if not names:
        return cap
    if isinstance(cap, FileCaptured):
        raise LoraFxError(
            f"{cap.path} holds one tensor for {names[0]!r} and other names, and the adapter's "
            "whole tensor is for that name alone",
            "give the model itself, instead of a file of its graph",
        )
    model = untied(cap.quantised or cap.model, names)
    new = Captured(model, (), cap.named, cap.requested, repeat=cap.repeat)
    new.notes += [*cap.notes, said_of_names(names)]
    return new


def said_of_names(names: Sequence[str]) -> str:
    """What a report says of names that have tensors of their own."""
    return f"saved alone, and so no longer tied: {', '.join(names)}"


def refuse_dynamic(dynamic: Dynamic | None) -> None:
    """Refuse other free dimensions of a model that is captured already.

    Example inputs are let be: a caller who passes those of the capture again asks for nothing else.
    """
    asked = {"dynamic": dynamic or None}
    captured = NoSay[Named](tuple(asked), bool, "beside a captured model, which has its sizes")
    refuse_no_say([captured], asked, given_options(asked))


def with_cache(
    model: object, adapters: ExportAdapters | None = None
) -> tuple[Captured, ExportAdapters | None]:
    """The capture of a decoder with its cache as tensors, and the adapters.

    A module that insert returned brings its own adapter where none are given.

    Raises:
        LoraFxError: No decoder; or a module of ours whose weights the original has no more.
    """
    model = opened(model)
    if is_attached(model):
        return captured_of(model), adapters  # raises
    if isinstance(model, CapturedModule):
        if hasattr(model, "folded") or not _shares(model):
            raise LoraFxError(
                "this module's weights are no longer those of the model that was captured",
                "export the original with adapters=…",
            )
        if adapters is None and isinstance(model, AdaptedModule):
            adapters = model.adapter()
        model = model.captured
    elif isinstance(model, (str, PathLike)):
        loaded = load_model(fspath(model))
        captured = decoder(loaded.module)
        captured.notes += loaded.notes
        return captured, adapters
    return decoder(model), adapters


def _shares(module: CapturedModule) -> bool:
    """True where the frozen weights of a module are the captured model's own."""
    theirs = dict(module.captured.model.named_parameters())
    return all(
        p.requires_grad or p.data_ptr() == theirs[n].data_ptr()
        for n, p in module.named_parameters()
        if n in theirs
    )


def opened(model: object) -> object:
    """A .pt2 file, or its capture, that holds branches as its module; a wrapper's own module."""
    model = unwrapped(model)
    if is_program(model):
        model = open_program(model)
    if isinstance(model, FileCaptured) and model.adapter is not None:
        return module_of(model)
    return model


def load_program(path: str | PathLike[str], *, trust: bool = False) -> CapturedModule:
    """The module that a .pt2 file holds: an AdaptedModule where it has branches.

    The adapter, its dropout and the norms are as they were saved; training goes on from there.
    Outputs are plain: where the model returned a class with fields, a dict.

    Args:
        path: The file.
        trust: As in `open_program`.

    Raises:
        LoraFxError: As `open_program`.
    """
    return module_of(open_program(path, trust=trust))


def module_of(captured: FileCaptured) -> CapturedModule:
    """The module of an opened file."""
    adapter = captured.adapter
    if adapter is None:
        return CapturedModule(captured)
    options = InsertOptions(
        adapter=adapter, dropout=captured.dropout, norm_stats=captured.norm_stats
    )
    return build_module(captured.plain(), options)


def capture(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    *,
    repeat: bool = True,
) -> Captured:
    """Capture a model with example inputs.

    Args:
        model: An nn.Module, a function of tensors, a bound method of a module, the path of a .pt2
            file, which needs no inputs, or what load_model returned, which has an example.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        dynamic: {input: {dimension: name}} or {input: (dimensions)}, beside the defaults:
            dimension 0 of every tensor, dimension 1 of integers, masks and 3-d floats.
        static: Inputs (`NAME` or `NAME:DIM`) that stay fixed.
        repeat: Trace a block that repeats once, and copy its nodes; the graph is then compared
            with the model where it has weights. False traces each one: slower, and the same.

    Raises:
        CaptureError: The model cannot be traced; the message names the line of its code.
        LoraFxError: The inputs do not fit the signature.
    """
    if is_program(model):
        return open_program(model, args, kwargs, dynamic, static)
    if isinstance(model, LoadedModel):
        if not args and not kwargs:
            args, kwargs = model.args, model.kwargs
        cap = capture(model.module, args, kwargs, dynamic, static, repeat=repeat)
        cap.notes += model.notes
        return cap
    cap = Captured(model, args, kwargs, dynamic, static, repeat=repeat)
    cap.traced(False, cap.named)
    return cap


# The module of a capture and its updates, proven; and what those updates start from.


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


# A capture whose weights are quantised: the base of an insert, a training or an export.


KINDS = ("nf4", "int4", "int8")
Wanted = str | Sequence[str] | Mapping[str, Selectors]
"""KIND, for the default plan's weights, KIND=SELECTORS, or several; or {kind: selectors}."""


def quantised(cap: Captured, wanted: Wanted, leave: Collection[str] = ()) -> Captured:
    """The same capture over another tree, which holds codes for some weights.

    Args:
        cap: The capture; neither it nor its model is changed.
        wanted: What is quantised, and how.
        leave: Parameters that are trained whole, and stay as they are.

    Raises:
        LoraFxError: A kind that is not known, a selector without a match, a model that cannot be
            copied.
    """
    found = find(cap.fx_graph())
    kinds, notes = _chosen(cap.model, found, parse(wanted), leave)
    new = copy.copy(cap)
    new.model = beside(cap.model)
    new.tracings = {k: [replace(t, analyses={}) for t in v] for k, v in cap.tracings.items()}
    before = sum(parameter_of(cap.model, n).nbytes for n in kinds)
    Quantise(kinds)(cap.fx_graph(root=new.model))
    after = sum(t.nbytes for n in kinds for t in tensors_of(new.model, n))
    said = " and ".join(dict.fromkeys(kinds.values()))
    size = f"{len(kinds)} weights, {human(before)}B as floats, {human(after)}B as codes"
    new.notes = [*cap.notes, f"quantised to {said}: {size}", *notes]
    return new


def parse(wanted: Wanted) -> list[tuple[str, Selectors]]:
    """Kinds, each with selectors, or None for the default plan.

    >>> parse("nf4"), parse(["int4", "int4=lm_head,embed"])
    ([('nf4', None)], [('int4', None), ('int4', 'lm_head,embed')])
    """
    if isinstance(wanted, Mapping):
        return list(wanted.items())
    texts: object = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise LoraFxError(
            f"quantise={wanted!r} is no kind", f"{', '.join(KINDS)}, or {{kind: selectors}}"
        )
    parts = (text.partition("=") for text in texts)
    return [(kind, selectors or None) for kind, _, selectors in parts]


def _chosen(
    model: nn.Module,
    found: Found,
    asked: Sequence[tuple[str, Selectors]],
    leave: Collection[str],
) -> tuple[dict[str, str], list[str]]:
    """Parameter → kind, and what had to be left in float."""
    kinds: dict[str, str] = {}
    left: dict[str, str] = {}
    for kind, selectors in sorted(asked, key=lambda item: item[1] is None):  # named first
        if kind not in KINDS:
            raise LoraFxError(f"no kind {kind!r} of quantised weights", ", ".join(KINDS))
        keys = make_plan(found, {}, rank=1, include=selectors).entries
        for name in dict.fromkeys(found[k].parameter.name for k in keys):
            why = _why_not(found, name, leave)
            if not why and (other := taken(model, name)):
                why = f"its module has a {other} already"
            if why and selectors:
                raise LoraFxError(f"{name} cannot be quantised: {why}", "leave it out")
            table = any("embedding" in t.uses for t in _targets(found, name))
            if not why and not selectors and table:
                why = "it is a lookup table too"
            if why:
                left[name] = why
            elif kinds.setdefault(name, kind) != kind and selectors:
                raise LoraFxError(f"{name}: {kinds[name]} and {kind} name it", "name it once")
    if not kinds:
        raise LoraFxError(
            "no weight is left to quantise", "; ".join(f"{n}: {w}" for n, w in left.items())
        )
    return kinds, [f"{name}: left in float, {why}" for name, why in left.items()]


def _targets(found: Found, name: str) -> list[Target]:
    return [t for t in (*found.targets, *found.optional) if t.parameter.name == name]


def _why_not(found: Found, name: str, leave: Collection[str]) -> str:
    target = _targets(found, name)[0]
    form = target.parameter.format
    reasons = {
        f"it is quantised ({form}), and keeps its bytes": form,
        "it is trained whole": name in leave,
        "it is computed from other parameters": name.endswith("~"),
        "its uses agree on no rows": turned_rows(found, name) is None,
    }
    return next((why for why, holds in reasons.items() if holds), "")
