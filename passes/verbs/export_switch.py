"""The file of modes switch and load: a base with adapters to choose from, each proven.

switch   A and B are inputs with defaults, chosen run by run
load     A and B are initialisers in the data file, W + (A B)ᵀ is folded by ONNX Runtime when a
session is made, and an adapter takes their place there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import Evaluation, hashes_of_gains
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.formats.graph_inputs import write_inputs
from lora_fx.inputs import SIZES
from lora_fx.ir.layout import Layout
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.made_for import LEAST_RANKS
from lora_fx.onnx.manifest import Manifest, WholeSlot
from lora_fx.onnx.tensor_copies import copies_of, join_copies
from lora_fx.passes.find import find
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.reference import Reference, Run
from lora_fx.passes.proofs.starts_runs import notes_on_caches, starts_of, with_starts
from lora_fx.passes.proofs.switchable import NO_UPDATE, prove_switchable
from lora_fx.passes.switch import Switch
from lora_fx.passes.verbs.export_files import (
    adapter_paths,
    on_device,
    refuse_unexchangeable,
    report_of,
    said_of_large_tensors,
    save_within,
    write_adapters,
)
from lora_fx.passes.verbs.export_options import Companions, ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name, split_use
from lora_fx.targets.target import Target
from lora_fx.text import Json

LOAD_RANK = 16
"""The rank of the slots in mode load if neither a rank nor an adapter is given."""
SERVES_THE_BASE = (
    "the copy for a server is the base alone: in mode load the adapter is given when a session is "
    "made, which no server does; use mode merged, batch or switch"
)


@dataclass(frozen=True)
class SwitchTargets:
    """What adapters of a switchable file may change.

    Attributes:
        keys: The targets of low-rank updates.
        whole: The tensors that an adapter may replace, by key.
        loose: Leave out keys that the graph has no target for, and say so.
        captured: The targets as adapters know them, where those are not the graph's.
    """

    keys: Sequence[str]
    whole: Mapping[str, WholeSlot] = field(default_factory=dict)
    loose: bool = False
    captured: Found | None = None


def write_switch(
    graph: OnnxGraph,
    reference: Reference,
    targets: SwitchTargets,
    adapters: Mapping[str, Adapter],
    options: ExportOptions,
    warnings: Sequence[str],
) -> Report:
    """Write the file, and one `NAME.onnx_adapter` for each adapter next to the file.

    Args:
        graph: The base; rewritten.
        reference: What it has to equal.
        targets: What adapters may change.
        adapters: Bound to the reference.
        options: What export is asked for, in mode switch or load.
        warnings: To be reported with those found here.

    Raises:
        LoraFxError: A target that the graph has not; nothing is written.
        NoEffectError: The outputs differ, or a target changes nothing.
    """
    paths = adapter_paths(adapters, options)
    evaluation = Evaluation(reference.weight)
    served = {name: evaluation(adapter) for name, adapter in adapters.items()}
    refuse_unexchangeable(served, "a switchable file")
    warnings = [*warnings, *said_of_large_tensors(adapters)]
    warnings = [*warnings, *_replaced_files(paths, options)]
    if options.mode == "load" and options.places:
        warnings.append(SERVES_THE_BASE)

    captured_targets = find(graph) if targets.captured is None else targets.captured
    slots = _Slots.of(graph, targets.keys, captured_targets)
    if targets.loose:
        slots, left_out = slots.without_missing()
        warnings += left_out
    copies = slots.copies_for_one_use(graph)
    rank = _rank_of_slots(adapters, options)
    layouts = slots.layouts(captured_targets)
    gains = hashes_of_gains(served, evaluation, layouts if options.takes_dora else ())
    switch = Switch(
        slots.keys,
        rank,
        slots.stored_apart,
        slots.transposed_lookups(layouts),
        LEAST_RANKS.get(options.made_for, 0),
        required=options.requires_factors,
        gains=gains,
        whole=targets.whole,
        starts=starts_of(adapters, reference),
    )
    manifest = _made_switchable(graph, switch, copies)

    with options.output() as output:
        replaced_by_session = manifest.names() if options.mode == "load" else ()
        warnings += save_within(
            output,
            graph.model,
            reference.conditions,
            reference.guards(),
            options,
            replaced_by_session,
        )
        if manifest.base and options.base_file is not None:  # which a session reads beside it
            write_inputs(NO_UPDATE, manifest, output.path.with_name(options.base_file))
        session = Session(output.path, options.provider)
        file = _SwitchableFile(output.path, options, manifest, rank, session, evaluation)
        parity = prove_switchable(file, reference, layouts, adapters, warnings, gains)
        warnings += notes_on_caches(file, reference, adapters)
        write_adapters(paths, served, manifest, options, output.beside)
        output.adapters += paths.values()
        probed = {**adapters, **options.also_probed}
        subject = _subject(file, reference, probed, captured_targets)
        of_probe = probe_file(output.path, subject, options.probe, session.provider, warnings)
        companions = options.also(output, manifest) if options.also else Companions()

    parity += companions.parity
    warnings += companions.warnings
    if session.note:
        warnings.append(session.note)
    details: Json = {
        "mode": manifest.mode,
        "targets": len(manifest.slots),
        **({"whole_tensors": [*manifest.whole]} if manifest.whole else {}),
        **reference.details(),
        "nodes": sum(1 for _ in graph.model.graph.all_nodes()),
        **on_device(output, session),
        **of_probe,
    }
    files = [*output.files, *companions.files]
    return report_of(files, session.provider, parity, warnings, details)


def _subject(
    file: _SwitchableFile, reference: Reference, adapters: Mapping[str, Adapter], found: Found
) -> Subject:
    """Return a proven file as a probe is made of it."""
    runs = reference.varied()

    def of_file(name: str) -> Run:
        return file.run_with(adapters.get(name))

    return Subject(
        mode=file.options.mode,
        run=of_file,
        reference=runs.run,
        # in mode load a file needs a session for every adapter
        vary=runs.run if file.options.mode == "load" else file.run_with,
        is_slow=file.options.mode == "load",
        adapters=adapters,
        found=found,
        feeds=reference.drawn,
        user_feeds=partial(reference.feeds, SIZES[0]),
        base=reference.base_facts(),
        files={name: f"{name}{file.options.adapter_ending}" for name in adapters},
        base_file=file.options.base_file,
        precision=file.options.computes_in,
        narrow=runs.narrow,
    )


def _made_switchable(graph: OnnxGraph, switch: Switch, copies: Sequence[str]) -> Manifest:
    """Give the graph its slots; return the manifest that its metadata holds."""
    switch(graph)
    join_copies(graph.model, copies)
    return switch.made[0]


def _replaced_files(paths: Mapping[str, Path], options: ExportOptions) -> list[str]:
    """Return a line for each adapter file that no earlier export wrote and this export replaces."""
    if options.target.exists():
        return []
    return [
        f"{path.name}, which belongs to another file, is replaced"
        for path in paths.values()
        if path.exists()
    ]


@dataclass(frozen=True)
class _Slots:
    """The targets of an exported graph that get slots for A and B.

    Attributes:
        keys: Keys of the targets, those of `stored_apart` left out.
        targets: The graph's own target of each key that has one.
        stored_apart: The exporter stores a tied table once more where a use needs it transposed
            (to_onnx.py): its key is an initialiser of the file, but no target of the graph.
    """

    keys: list[str]
    targets: Mapping[str, Target]
    stored_apart: Sequence[Target]

    @classmethod
    def of(cls, graph: OnnxGraph, keys: Sequence[str], captured: Found) -> _Slots:
        """Look up the keys in the exported graph; for lost keys, look in the capture."""
        exported = find(graph)
        targets: dict[str, Target] = {}
        stored_apart: list[Target] = []
        for key in keys:
            target = exported.get(key)
            if target is not None:
                targets[key] = target
                continue
            target = captured.get(key)
            if target is None or target.other_readers:
                continue
            if target.key in graph.model.graph.initializers:
                stored_apart.append(target)

        keys_apart = {target.key for target in stored_apart}
        return cls([key for key in keys if key not in keys_apart], targets, stored_apart)

    def without_missing(self) -> tuple[_Slots, list[str]]:
        """Return the slots of keys that are targets of the graph, and a line for each other key."""
        notes = [
            f"{key}: left out, the exported graph has no such target"
            for key in self.keys
            if key not in self.targets
        ]
        keys = [key for key in self.keys if key in self.targets]
        return _Slots(keys, self.targets, self.stored_apart), notes

    def copies_for_one_use(self, graph: OnnxGraph) -> list[str]:
        """Return the keys of one use for which the file stores a copy of the weight.

        Raises:
            LoraFxError: A tied tensor that is stored twice, or that is adapted both in all its uses
                and in one of them.
        """
        copied_names = copies_of(graph.model).values()
        stored_twice = [key for key in self.keys if base_name(key) in copied_names]
        if stored_twice:
            raise LoraFxError(
                f"{stored_twice[0]!r} is stored twice in the exported graph, for two uses of a "
                "tied tensor",
                "use mode merged, which adapts both uses; or leave it out with --exclude",
            )

        keys_of_all_uses = [key for key in self.keys if not split_use(key)[1]]
        initializers = graph.model.graph.initializers
        copies = [key for key in self.keys if split_use(key)[1] and key in initializers]
        adapted_twice = {base_name(key) for key in copies}.intersection(keys_of_all_uses)
        if adapted_twice:
            raise LoraFxError(
                f"{min(adapted_twice)!r} is adapted in all its uses, and also in one use alone: a "
                "file has slots for only one of these",
                "use mode batch, which takes both; or export one file for each",
            )
        return copies

    def layouts(self, captured: Found) -> dict[str, Layout]:
        """Return the layout of each key, as adapters use it."""
        keys_apart = [target.key for target in self.stored_apart]
        return {key: captured[key].layout for key in (*self.keys, *keys_apart)}

    def transposed_lookups(self, layouts: Mapping[str, Layout]) -> set[str]:
        """Return the keys of lookup tables whose rows are `in`, not `out`, for the adapters."""
        transposed = set()
        for key in self.keys:
            target = self.targets.get(key)
            if target is None or target.op != "embedding":
                continue
            if layouts[key].in_ == target.layout.out:
                transposed.add(key)
        return transposed


def _rank_of_slots(adapters: Mapping[str, Adapter], options: ExportOptions) -> int:
    """Return the rank of every slot in mode load; 0 in mode switch, where any rank fits."""
    if options.mode != "load":
        return 0
    largest = 0
    for adapter in adapters.values():
        for update in adapter.lowrank.values():
            largest = max(largest, update.rank)
    if options.rank and options.rank < largest:
        raise LoraFxError(
            f"an adapter has rank {largest}, more than --rank {options.rank}",
            f"pass --rank {largest}",
        )
    return options.rank or largest or LOAD_RANK


@dataclass(frozen=True)
class _SwitchableFile:
    """A written file as ONNX Runtime runs it with different adapters.

    The tokens of a run's own ids invoke an aLoRA, behind the past.

    `rank` is the rank of the slots in mode load; 0 if they take any rank. `evaluate` makes what the
    file takes of an adapter that reads its base.
    """

    path: Path
    options: ExportOptions
    manifest: Manifest
    rank: int
    session: Session
    evaluate: Evaluation
    runtime: str = "ONNX Runtime"

    def run_with(self, adapter: Adapter | None) -> Run:
        """Return a run of the file with an adapter; mode load makes a new session for it."""
        if adapter is None:
            return self.session.run
        starts = self.manifest.starts
        adapter = self.evaluate(adapter)
        if self.options.mode == "load":
            return Session(self.path, self.options.provider, adapter=adapter).run
        self.session.load("adapter", adapter)
        if starts is None:
            return partial(self.session.run, adapter="adapter")
        return lambda feeds: self.session.run(
            with_starts(starts, feeds, adapter), adapter="adapter"
        )

    def rerun_with(self, adapter: Adapter | None) -> FileRerun:
        """Return other ways to run the file with an adapter."""
        tensors = {} if adapter is None else self.manifest.tensors(self.evaluate(adapter))
        tensors = {**self.manifest.base, **tensors}
        provider = self.options.provider
        if self.manifest.mode == "load":
            stored = self.manifest.padded(tensors) if tensors else {}
            return FileRerun(self.path, provider, stored=stored)
        starts = self.manifest.starts
        if starts is None:
            return FileRerun(self.path, provider, lambda feeds: {**feeds, **tensors})
        return FileRerun(
            self.path, provider, lambda feeds: {**with_starts(starts, feeds, adapter), **tensors}
        )
