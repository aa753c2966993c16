"""The files of export: a base with adapters to choose from, proven with each one; an optimised one.

switch   A and B are inputs with defaults, chosen run by run
load     A and B are initialisers in the data file, W + (A B)ᵀ is folded by ONNX Runtime when a
session is made, and an adapter takes their place there
batch    every row of a batch picks an adapter of its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from lora_fx.adapter.adapter import Adapter, check_plain
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import Parity, Report, compare, demand
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.read import remember
from lora_fx.formats.io import check_real
from lora_fx.inputs import SIZES, Named
from lora_fx.ir.layout import Layout
from lora_fx.onnx.batch import SCALES as SCALES_BY_ROW
from lora_fx.onnx.batch import batch_symbol, join_copies, outputs_without_nan
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import Manifest, guard_within, say_within, write_adapter
from lora_fx.onnx.names import copies_of, give_own_names, mark_changed, restore_weight_names
from lora_fx.onnx.precision import narrow
from lora_fx.onnx.save import Output
from lora_fx.onnx.session import Session, feeds_of_sizes, open_session, signature
from lora_fx.onnx.stages import Rewrite, RewriteStage, apply_stages
from lora_fx.onnx.validity import blaming
from lora_fx.passes.batch import Batch, StoredWeight
from lora_fx.passes.find import find
from lora_fx.passes.proofs.batch_rows import prove_rows
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.reference import Reference, Run
from lora_fx.passes.proofs.row_ids import prove_ids
from lora_fx.passes.switch import Switch
from lora_fx.passes.verbs.options import (
    Companions,
    ExportAdapters,
    ExportOptions,
    exclude_hint,
)
from lora_fx.targets.target import Found, base_name, own_use, split_use
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    import onnx_ir as ir


RANK = 4
"""The rank of the random adapter that stands in where none is given."""
SCALES = (0.5, 0.1, 0.02, 0.004, 0.0008)
"""Scales of the random adapter: the first at which no output changes by more than its size."""
LOAD_RANK = 16
"""The rank of the slots of mode load where neither a rank nor an adapter is given."""


def by_name(options: ExportOptions) -> dict[str, Adapter]:
    """The adapters of a file that holds several; raises where a file of one is in the way."""
    if options.mode == "batch":
        return named(options.adapters)
    given = options.adapters or {}
    adapters = {"adapter": given} if isinstance(given, Adapter) else named(given) if given else {}
    beside(adapters, options)
    return adapters


def beside(adapters: Iterable[str], options: ExportOptions) -> dict[str, Path]:
    """Where the adapters of a switchable file go; raises where something is there."""
    paths = {name: options.target.with_name(f"{name}.onnx_adapter") for name in adapters}
    for path in paths.values():
        check_output(path, force=options.force)
    return paths


def save_within(
    made: Output,
    model: ir.Model,
    conditions: Sequence[Condition],
    guards: Sequence[Condition],
    options: ExportOptions,
    slots: Sequence[str] = (),
) -> list[str]:
    """Save a model with the sizes that it is true for; returns a line for each that matters.

    Args:
        made: The file.
        model: What goes into it.
        conditions: What sizes have to satisfy.
        guards: Those outside which a session could give an answer. They get a guard each.
        options: What export is asked for.
        slots: Names of tensors that a session replaces; see Output.save.
    """
    say_within(model, conditions)
    if guards and not options.within:
        guard_within(model, guards)
    made.save(model, options.external_over, slots)
    then = "it is not checked" if options.within else "the file fails elsewhere"
    bounds = dict.fromkeys(map(str, guards))
    return [f"it holds for {bound} only: {then}" for bound in bounds]


def write_switch(
    graph: OnnxGraph,
    reference: Reference,
    keys: Sequence[str],
    adapters: Mapping[str, Adapter],
    options: ExportOptions,
    warnings: Sequence[str],
    *,
    loose: bool = False,
    found: Found | None = None,
) -> Report:
    """Write the file, and `NAME.onnx_adapter` beside it for every adapter.

    Args:
        graph: The base; rewritten.
        reference: What it has to equal.
        keys: Its targets.
        adapters: Bound to the reference.
        options: What export is asked for, in mode switch or load.
        warnings: To be reported with those found here.
        loose: Leave out keys that the graph has no target for, and say so.
        found: The targets as adapters know them, where those are not the graph's.

    Raises:
        LoraFxError: A target that the graph has not; nothing is written.
        NoEffectError: The outputs differ, or a target changes nothing.
    """
    load, rank = options.mode == "load", options.rank
    paths = beside(adapters, options)
    _check_shared(adapters, "a switchable file")
    others = [p.name for p in paths.values() if p.exists() and not options.target.exists()]
    warnings = [*warnings, *(f"{name} of another file is replaced" for name in others)]
    here, kept = find(graph), graph.model.graph.initializers
    known = here if found is None else found
    there = {k: t for k in keys if (t := here.get(k)) is not None}
    lost = (known.get(k) for k in keys if k not in there)
    apart = [t for t in lost if t and not t.other_readers and t.key in kept]  # see to_onnx
    keys = [k for k in keys if k not in {t.key for t in apart}]
    if loose:
        left = (k for k in keys if k not in there)
        warnings += [f"{k}: left out, the exported graph has no such target" for k in left]
        keys = [k for k in keys if k in there]
    stored = copies_of(graph.model).values()
    twice = [k for k in keys if base_name(k) in stored]
    if twice:
        raise LoraFxError(
            f"{twice[0]!r} is stored twice in the exported graph, for two uses of a tied tensor",
            "mode merged adapts both; here --exclude it",
        )
    copies = [k for k in keys if split_use(k)[1] and k in kept]
    both = {base_name(k) for k in copies}.intersection(k for k in keys if not split_use(k)[1])
    if both:
        raise LoraFxError(
            f"{min(both)!r} is adapted in all its uses, and beside that in one of them alone: a "
            "file has slots for the one or the other",
            "mode batch takes both; else export a file for each",
        )
    largest = max((u.rank for a in adapters.values() for u in a.lowrank.values()), default=0)
    if load and rank and rank < largest:
        raise LoraFxError(f"an adapter of rank {largest}, and --rank {rank}", f"--rank {largest}")
    layouts = {k: known[k].layout for k in (*keys, *(t.key for t in apart))}
    lookups = {k: t.layout for k, t in there.items() if t.op == "embedding"}
    turned = {k for k in keys if k in lookups and layouts[k].in_ == lookups[k].out}
    switch = Switch(keys, (rank or largest or LOAD_RANK) if load else 0, apart, turned)
    switch(graph)
    join_copies(graph.model, copies)
    manifest = switch.made[0]
    with options.output() as made_file:
        slots = [n for s in manifest.slots.values() for n in (s.a, s.b)] if load else ()
        warnings += save_within(
            made_file, graph.model, reference.conditions, reference.guards(), options, slots
        )
        session = Session(made_file.path, options.provider)
        rerun = partial(_rerun, made_file.path, options, manifest)
        parity = reference.prove(session.run, None, "base", rerun(None))
        feeds = reference.feeds(SIZES[0])
        base = session.run(feeds)

        def serve(adapter: Adapter) -> Run:
            """What runs with an adapter: the one session, or in mode load one of its own."""
            if load:
                return Session(made_file.path, options.provider, adapter=adapter).run
            session.load("adapter", adapter)
            return partial(session.run, adapter="adapter")

        def small(adapter: Adapter) -> bool:
            """Whether no output changes by more than its size."""
            return compare(serve(adapter)(feeds), base, {}, 1.0).ok

        tried = adapters or {"random": _random(layouts, switch.rank or RANK, small)}
        for name, adapter in tried.items():
            run = serve(adapter)
            changed = run(feeds)
            if all(np.array_equal(changed[k], base[k]) for k in base):
                if not adapters:
                    raise NoEffectError(
                        "a random adapter changes nothing in the exported file", "report this model"
                    )
                warnings.append(f"the adapter {name!r} changes nothing")
            parity += reference.prove(run, adapter, name, rerun(adapter))
        demand(parity, "ONNX Runtime differs from the model")
        for name, path in paths.items():
            with replacing(path, force=options.force, beside=made_file.beside) as part:
                write_adapter(adapters[name], manifest, part)
        made_file.adapters += paths.values()
        more = options.also(made_file, manifest) if options.also else Companions()
    parity += more.parity
    warnings += [*more.warnings, *filter(None, [session.note])]
    details: Json = {"mode": manifest.mode, "targets": len(manifest.slots), **reference.details()}
    details["nodes"] = sum(1 for _ in graph.model.graph.all_nodes())
    files = [*made_file.files, *more.files]
    return report_of(files, session.provider, parity, warnings, details)


def _rerun(
    path: Path, options: ExportOptions, manifest: Manifest, adapter: Adapter | None
) -> FileRerun:
    """Other ways to run a file of mode switch or load with an adapter."""
    tensors = {} if adapter is None else manifest.tensors(adapter)
    if manifest.mode == "load":
        return FileRerun(path, options.provider, stored=manifest.padded(tensors) if tensors else {})
    return FileRerun(path, options.provider, lambda feeds: {**feeds, **tensors})


def report_of(
    files: Sequence[Path],
    provider: str,
    parity: Sequence[Parity],
    warnings: Sequence[str],
    details: JsonView,
) -> Report:
    """The report of an export that has written these files."""
    sizes = {str(f): f.stat().st_size for f in files}
    whole = {"files": sizes, "provider": provider, **details}
    return Report("export", True, tuple(parity), tuple(sizes), tuple(warnings), whole)


def _check_shared(adapters: Mapping[str, Adapter], what: str) -> None:
    """Raise for what cannot be chosen run by run, or row by row."""
    for name, adapter in adapters.items():
        check_plain(adapter, f"{name}: {what}")
        check_real(adapter.lowrank)
        if adapter.full:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {min(adapter.full)!r}",
                exclude_hint(name, sorted(adapter.full)),
            )


def _random(layouts: Mapping[str, Layout], most: int, small: Callable[[Adapter], bool]) -> Adapter:
    """An update of every target, large enough to see, and not so large that rounding explodes."""
    for size in SCALES:
        entries = {}
        for key, layout in layouts.items():
            a, b = draw(key, layout, min(RANK, most, layout.max_rank), 0, "probe")
            entries[key] = LowRank(a, b, size * a.shape[-2], layout, use=own_use(key))
        made = Adapter(entries)
        if small(made):
            break
    return made


# export in mode batch: one ONNX file for many adapters, a row of the batch each.
#
#     base → batch → run: row b of a mixed batch == adapter ids[b] on that row, alone
#
# Only where all rows agree (`prove_rows`) the file gets its name.


def write_batch(
    graph: OnnxGraph,
    reference: Reference,
    sources: Mapping[str, tuple[str, StoredWeight]],
    adapters: Mapping[str, Adapter],
    options: ExportOptions,
    warnings: Sequence[str],
) -> Report:
    """Write one ONNX file that serves every adapter.

    Args:
        graph: The base; rewritten.
        reference: What its rows have to equal.
        sources: See lora_fx.passes.batch.Batch.
        adapters: Bound to the reference, in the order of their ids, 1, 2 …
        options: With scales the file has the input `adapter_scales`, a weight by row.
        warnings: To be reported.

    Raises:
        LoraFxError: A target whose rows cannot be told apart, or that has no form by row.
        NoEffectError: A row differs from its adapter alone; nothing is written.
    """
    _check_shared(adapters, "a file of one adapter a row")
    model = graph.model
    before = sum(1 for _ in model.graph.all_nodes())
    Batch({n: a.lowrank for n, a in adapters.items()}, sources, options.scales)(graph)
    join_copies(model, [name for name, stored in sources.values() if stored.keys])
    graph.lint()
    symbol = batch_symbol(model)
    rowed = [str(v.name) for v in model.graph.inputs if v.shape and str(v.shape[0]) == symbol]
    with options.output() as made_file:
        told = save_within(made_file, model, reference.conditions, reference.guards(), options)
        session = open_session(made_file.path, options.provider)
        rerun = FileRerun(made_file.path, options.provider)
        parity = prove_rows(
            session.run, reference, adapters, rowed, scales=options.scales, rerun=rerun
        )
        demand(parity, "a batch differs")
        feeds = reference.feeds((4, SIZES[0][1]))
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        if options.scales:
            feeds[SCALES_BY_ROW] = np.ones(rows, np.float32)
        prove_ids(session, model, feeds, rows, len(adapters) + 1)
    told += [
        f"output {name!r} can hold no NaN: where a runtime does not refuse adapter_ids out of "
        "range, such a row has the base model's values there"
        for name in outputs_without_nan(model)
    ]
    said = [*warnings, *told, *filter(None, [session.note])]
    nodes = {"nodes": sum(1 for _ in model.graph.all_nodes()), "nodes_of_base": before}
    details = {"mode": "batch", "adapters": list(adapters), **nodes, **reference.details()}
    return report_of(made_file.files, session.provider, parity, said, details)


def named(adapters: ExportAdapters | None) -> dict[str, Adapter]:
    """Adapters by name, in the order of their ids."""
    if isinstance(adapters, Adapter):
        return {"adapter_1": adapters}
    if not adapters:
        raise LoraFxError("mode batch needs adapters", "adapters=[first, second, …]")
    if isinstance(adapters, Mapping):
        return dict(cast(Mapping[str, Adapter], adapters))
    return {f"adapter_{i}": a for i, a in enumerate(adapters, 1)}


# optimise: rewrites of an exported graph that leave its outputs, each kept only where proven so.
#
# The stages are lora_fx.onnx.stages.STAGES; a file's inputs come from its signature.


def optimised(
    model: ir.Model,
    feeds: Sequence[Named],
    provider: str,
    stages: Mapping[str, Rewrite] | None = None,
) -> tuple[ir.Model, list[RewriteStage]]:
    """The model after the stages, with its weights' own names and no traces, and their rows."""
    made, rows = apply_stages(model, feeds, stages, provider)
    give_own_names(made, None, {})
    return made, rows


@blaming
def optimise_file(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Optimise an .onnx file into another; see docs/export.md and lora_fx.passes.verbs.export.

    Args:
        source: The file; it is not changed.
        options: What export is asked for: the stages, a precision after them, or both.

    Raises:
        LoraFxError: The file does not load or run; nothing is written.
    """
    remember(source)
    provider, precision = options.provider, options.precision
    opened = load(source)
    restore_weight_names(opened)
    stored = opened.graph.initializers.items()
    values = {str(n): v.const_value.numpy for n, v in stored if v.const_value is not None}
    session = open_session(source, provider)
    feeds = list(feeds_of_sizes(signature(session), options.inputs or {}))
    model, stages = optimised(opened, feeds, provider, None if options.optimise else {})
    mark_changed(model, values)
    said = [*filter(None, [session.note])]
    if precision:
        made = narrow(model, precision, feeds, provider, options.tol)
        model = made.model
        said.append(made.said(precision))
    with options.output() as made_file:
        made_file.save(model)
    nodes = sum(1 for _ in model.graph.all_nodes())
    rows = [s.to_json() for s in stages]
    details = {"provider": session.provider, "mode": "optimised", "nodes": nodes, "stages": rows}
    outputs = tuple(map(str, made_file.files))
    return Report("export", True, (), outputs, tuple(said), details)
