"""The steps of insert: find the initial values, build the module with branches, and prove it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.adapter.adapter import INVOCATION, Adapter, bind
from lora_fx.adapter.bind import reading
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.adapter.learning import relearning
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.starts import OF_DATA, OF_WEIGHT, initial
from lora_fx.adapter.updates import name_of
from lora_fx.adapter.variant import named_variant, variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.hub import origin
from lora_fx.formats.peft.build_config import MODULES_OF_NAME
from lora_fx.fx.adapter_with_base import check_evaluated, with_base
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import named_tensors, parameter_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import hint, shape_of
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.token_mask import InvocationMask
from lora_fx.fx.train.language_data import is_causal
from lora_fx.passes.chunk import Chunk
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fold import exact
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.effect import prove_effect
from lora_fx.passes.proofs.recorded_capture import prove_drawn
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.reread import RecomputeWeights
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.calibrate import calibrate
from lora_fx.passes.verbs.options import InsertOptions
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use
from lora_fx.targets.moments import Calibration, Moments
from lora_fx.targets.plan import Plan
from lora_fx.targets.target import check_storable
from lora_fx.text import some


@dataclass(frozen=True)
class Start:
    """The updates and settings from which a module with branches is built.

    Attributes:
        adapter: Its updates, and the metadata that it goes on with.
        trained_whole: The tensors that are trained whole.
        notes: What has to be said.
        bound: The adapter that was given, in the model's keys.
    """

    adapter: Adapter
    trained_whole: tuple[str, ...]
    notes: tuple[str, ...] = ()
    bound: Adapter | None = None

    def without(self, idle: Collection[str]) -> Start:
        """Leave out the targets that no gradient reaches, and note each of them."""
        entries = {key: entry for key, entry in self.adapter.entries.items() if key not in idle}
        notes = [f"{key}: left out, no gradient reaches it at the example's sizes" for key in idle]
        adapter = replace(self.adapter, entries=entries)
        return replace(self, adapter=adapter, notes=(*self.notes, *notes))


def start_of(model: nn.Module, cap: Captured | None, found: Found, options: InsertOptions) -> Start:
    """Return the start from the given adapter, or from new updates for the selected targets.

    Args:
        model: Where the tensors are.
        cap: The model's capture; None where no single graph can hold it.
        found: Its targets.
        options: What the verb is asked for.

    Raises:
        LoraFxError: No target, an adapter that does not fit, a start that cannot be had.
    """
    if options.adapter is not None:
        start = _start_of_adapter(model, found, options.adapter, options.dropout)
        check_evaluated(start.adapter, found, _read_of(model, cap))
        return start

    plan = options.planned(found, named_tensors(model)[0])
    moments: Mapping[str, Moments] | None = None
    notes_on_data: tuple[str, ...] = ()
    if options.init in OF_DATA:
        calibration = _calibration(cap, plan, options)
        moments = calibration.moments
        notes_on_data = calibration.notes
    updates, notes_on_values = initial(
        found,
        plan,
        options.variant,
        options.seed,
        options.init,
        _reader_of_weights(model, cap, options),
        moments,
    )
    notes = (
        *plan.notes,
        *options.notes,
        *notes_on_data,
        *notes_on_values,
        *_notes_on_targets(found, updates),
        *_notes_on_folding(cap, found, updates),
    )
    metadata = reading(found, updates, _facts_of(model, options.dropout))
    if options.tokens:
        metadata = {**metadata, INVOCATION: [*options.tokens]}
    return Start(Adapter(updates, metadata), plan.also_train, notes)


def _start_of_adapter(model: nn.Module, found: Found, adapter: Adapter, dropout: float) -> Start:
    """Return the start from an adapter, with the model's keys."""
    adapter, notes_of_ranks = as_exact_lora(adapter)
    bound = bind(with_base(adapter, model), found)
    updates, metadata = relearning(bound.lowrank, bound.metadata)
    metadata |= {"dropout": dropout, MODULES_OF_NAME: _modules_of_name(model)}
    for key, update in updates.items():
        if update.mutated or variant_of(update).reads_weight:
            check_storable(found[key], f"{update.mutated or name_of(update)} reads W itself")

    notes = [*notes_of_ranks, *_notes_on_targets(found, updates)]
    for row in found.unreached:
        if row.key in bound.full:
            notes.append(f"the adapter's whole tensor {row.key}: {row.reason}")
    return Start(Adapter(updates, metadata), tuple(bound.full), tuple(notes), bound)


def _calibration(cap: Captured | None, plan: Plan, options: InsertOptions) -> Calibration:
    """Compute the statistics of the data, which the start reads.

    Raises:
        LoraFxError: There is no data, or no single graph to run it through.
    """
    if cap is None or options.data is None:
        raise LoraFxError(
            f"init {options.init!r} needs data, and a model that can be captured as one graph",
            "use init kaiming, gaussian, orthogonal, pissa or olora",
        )
    uses = {key: own_use(key) for key in plan.entries}
    return calibrate(cap, uses, options.data, options.loss, (OF_DATA[options.init],))


def _reader_of_weights(
    model: nn.Module, cap: Captured | None, options: InsertOptions
) -> Callable[[str], Array] | None:
    """Return a reader of weights by name if the start or the variant needs one, else None."""
    if options.init not in OF_WEIGHT and not named_variant(options.variant).reads_weight:
        return None
    return _read_of(model, cap)


def _read_of(model: nn.Module, cap: Captured | None) -> Callable[[str], Array]:
    """Return a reader of weights by name."""

    def read(name: str) -> Array:
        if cap is not None:
            return cap.fx_graph().read(name)
        return to_numpy(parameter_of(model, name))

    return read


def _notes_on_targets(found: Found, updates: Updates) -> list[str]:
    """Return the notes that `find` made on the targets with updates."""
    notes = []
    for key in updates:
        text = found[key].said
        if text:
            notes.append(text)
    return notes


def _notes_on_folding(cap: Captured | None, found: Found, updates: Updates) -> list[str]:
    """Note each update, constant over groups of inputs, that its weight's codes cannot hold."""
    pooled = [key for key, update in updates.items() if variant_of(update).constant_over]
    if cap is None or not pooled:
        return []
    graph = cap.fx_graph()
    notes = []
    for key in pooled:
        if not found[key].no_fold:
            continue
        reason = exact(graph, found[key], updates[key])
        if isinstance(reason, str):
            notes.append(f"{key} will not be folded: {reason}")
    return notes


def _facts_of(model: nn.Module, dropout: float) -> dict[str, Any]:
    """Return the metadata of a new adapter: the dropout, and what its file says of the model."""
    names = {MODULES_OF_NAME: _modules_of_name(model)}
    return {"dropout": dropout, **_origin_of(model), **names}


def _modules_of_name(model: nn.Module) -> dict[str, int]:
    """Return last part of a module's name → how many modules have it."""
    return dict(Counter(name.rpartition(".")[2] for name, _ in model.named_modules() if name))


def _origin_of(model: nn.Module) -> dict[str, Any]:
    """Return metadata with the transformers model of an adapter, and its task.

    By both PEFT's AutoPeftModelForCausalLM finds the base of an adapter by itself. Other tasks are
    not said: for those PEFT saves heads whole that this adapter has not.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return {}
    metadata: dict[str, Any] = {**origin(name)}
    if not metadata and Path(name).is_dir():
        metadata["base_model_name_or_path"] = name
    if not metadata:
        return {}
    if is_causal(model):
        metadata["task_type"] = "CAUSAL_LM"
    return metadata


def adapted_module(
    cap: Captured, found: Found, start: Start, options: InsertOptions
) -> AdaptedModule:
    """Build the module with the updates of a start; nothing is proven yet."""
    mask = InvocationMask(options.tokens) if options.tokens else None

    def inserter(updates: Updates, training: bool) -> Callable[[FxGraph], object]:
        return Insert(
            updates, dropout=options.dropout, training=training, missing="skip", mask=mask
        )

    return AdaptedModule(
        cap,
        found,
        start.adapter,
        inserter,
        also_train=start.trained_whole,
        norm_stats=options.norm_stats,
        notes=(*start.notes, *_note_on_whole(start, options)),
        speedups=speedups if options.fast else plainly,
    )


def _note_on_whole(start: Start, options: InsertOptions) -> list[str]:
    """Return a note on an aLoRA's whole tensors, which are PEFT's modules_to_save.

    They have no offsets of the invocation there (peft 0.21.2: AuxiliaryTrainingWrapper.forward).
    """
    if not options.tokens or not start.trained_whole:
        return []
    return [
        f"{some(start.trained_whole)} is trained as a whole and acts on every token of every row, "
        "also without the invocation, as in PEFT; modes switch and batch refuse it"
    ]


@stage("inserting branches")
def build_module(cap: Captured, options: InsertOptions) -> AdaptedModule:
    """Build the module that insert returns, and prove that every target takes effect.

    With dead="allow" the effect is not proven.

    Raises:
        NoEffectError: A target that no gradient reaches, or a branch that is not W + s·b·a.
    """
    targets = found_in(cap)
    start = start_of(cap.model, cap, targets, options)
    module = adapted_module(cap, targets, start, options)
    if options.dead != "allow" and start.adapter.entries:
        # a target is dead below a share of the median gradient, and each drop moves the median
        while idle := prove_effect(module, options.dead):
            start = start.without(idle)
            module = adapted_module(cap, targets, start, options)
    if start.bound is not None and start.bound.full:
        module.load_adapter(start.bound)
    if options.adapter is not None:
        insertion_of(module).check_base(options.adapter)
    insertion_of(module).say(*prove_drawn(module))
    return module


def found_in(cap: Captured, training: bool = False, graph: FxGraph | None = None) -> Found:
    """Find the targets of a capture or of one of its graphs; add its fixed sizes and notes."""
    graph = graph or cap.fx_graph(training)
    # the sizes of the trace, where an example's one row may be two
    placeholders = graph.graph.find_nodes(op="placeholder")
    sizes = {}
    for name, node in zip(leaf_names(cap.named), placeholders, strict=False):
        shape = shape_of(node)
        if shape is not None:
            sizes[name] = tuple(hint(extent) for extent in shape)
    return replace(
        find(graph),
        pinned=tuple(cap.pinned),
        ranges=cap.ranges,
        notes=tuple(cap.notes),
        sizes=sizes,
    )


def speedups(blocks: Sequence[str], training: bool) -> list[Callable[[FxGraph], object]]:
    """Return the passes of eval or train programs, in order; most reduce what training keeps."""
    paths = tuple(blocks)
    if not training:
        return [Chunk(paths)]
    return [
        Clean(),
        Chunk(paths),
        Share(paths, free=True),
        Fuse(True),
        Recompute(paths),
        RecomputeWeights(),
    ]


def plainly(blocks: Sequence[str], training: bool) -> list[Callable[[FxGraph], object]]:
    """Return the passes of an unoptimised program: only the recomputing of weights."""
    return [RecomputeWeights()] if training else []


def module_of(captured: FileCaptured) -> CapturedModule:
    """Return the module of an opened .pt2 file."""
    adapter = captured.adapter
    if adapter is None:
        return CapturedModule(captured)
    options = InsertOptions(
        adapter=adapter, dropout=captured.dropout, norm_stats=captured.norm_stats
    )
    return build_module(captured.plain(), options)
