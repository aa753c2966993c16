"""The file of modes switch and load: a base with adapters to choose from, proven with each one.

switch   A and B are inputs with defaults, chosen run by run
load     A and B are initialisers in the data file, W + (A B)ᵀ is folded by ONNX Runtime when a
session is made, and an adapter takes their place there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import Report, compare, demand
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import replacing
from lora_fx.inputs import SIZES
from lora_fx.ir.layout import Layout
from lora_fx.onnx.batch import join_copies
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.manifest import Manifest, write_adapter
from lora_fx.onnx.names import copies_of
from lora_fx.onnx.session import Session
from lora_fx.passes.find import find
from lora_fx.passes.proofs.reference import FileRerun, Reference, Run
from lora_fx.passes.switch import Switch
from lora_fx.passes.verbs.export_options import Companions, ExportOptions
from lora_fx.targets.target import Found, base_name, own_use, split_use
from lora_fx.text import Json

if TYPE_CHECKING:
    pass
from lora_fx.passes.verbs.export_files import beside, check_shared, report_of, save_within

RANK = 4
"""The rank of the random adapter that stands in where none is given."""


SCALES = (0.5, 0.1, 0.02, 0.004, 0.0008)
"""Scales of the random adapter: the first at which no output changes by more than its size."""


LOAD_RANK = 16
"""The rank of the slots of mode load where neither a rank nor an adapter is given."""


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
    check_shared(adapters, "a switchable file")
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
