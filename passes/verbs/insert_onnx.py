"""insert for .onnx files: add trainable branches to the weights, and list their tensors.

A [*batch, rank, in] is drawn, B [*batch, out, rank] is zero, so the file still is the base: that
is proven, and that a B other than zero moves the outputs, target by target. A and B are
initialisers named as in PEFT (`PATH.lora_A.LEAF`), for a trainer of ONNX graphs;
`lora_fx.manifest` in the metadata lists them, and `lora_fx.onnx.inserted_branches` reads them
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.bind import reading
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.starts import OF_DATA, initial
from lora_fx.compare import Report, demand
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import check_output
from lora_fx.files.run_files import remember, remembering
from lora_fx.inputs import Named
from lora_fx.ir.graph import Role
from lora_fx.onnx.inserted_branches import branches_as_json
from lora_fx.onnx.manifest import PROPERTY, check_no_slots
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.output_file import output
from lora_fx.onnx.save import EXTERNAL_OVER
from lora_fx.onnx.session import check_provider, open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.onnx_reference import FileRerun, OnnxReference, reference_of
from lora_fx.passes.verbs.options import (
    BranchOptions,
)


@dataclass(frozen=True, kw_only=True)
class OnnxInsertOptions(BranchOptions):
    """The options of an insert into an .onnx file.

    Attributes:
        inputs: Arrays by input name for the check, instead of sampled ones.
        provider: auto, cpu, cuda or webgpu.
        external_over: Bytes of weights above which they go to a file of their own.
        force: Replace an existing file.
    """

    inputs: Named | None = None
    provider: str = "auto"
    external_over: int = EXTERNAL_OVER
    force: bool = False

    def __post_init__(self) -> None:
        """Raise for an unknown name, and for a start that reads data."""
        super().__post_init__()
        if self.init in OF_DATA:
            raise LoraFxError(
                f"init {self.init!r} starts from data, and an .onnx file has no gradients",
                "use init kaiming, gaussian, orthogonal, pissa or olora",
            )


def insert_onnx(source: str | PathLike[str], path: str | PathLike[str], **options: Any) -> Report:
    """Write the file with untrained branches.

    Args:
        source: The file; it is not changed.
        path: Where to write.
        options: Those of OnnxInsertOptions; rank, plan and so on mean what they do in
            `lora_fx.insert`. A dead target is one that changes no output.

    Raises:
        LoraFxError: No target, a selector that matches nothing, a rank that does not fit.
        NoEffectError: A target that changes no output; nothing is written.
    """
    return insert_into_file(source, path, OnnxInsertOptions.of(options))


@remembering()
@blaming
def insert_into_file(
    source: str | PathLike[str], path: str | PathLike[str], options: OnnxInsertOptions
) -> Report:
    """Insert as `insert_onnx` does, with the options as one object."""
    source = Path(source)
    target = Path(path)
    remember(source)
    check_output(target, force=options.force)
    check_provider(options.provider)
    graph, _ = named_graph(source)
    check_no_slots(graph.model, source)

    targets = find_graph(graph)
    plan = options.planned(targets)
    updates, lowered = initial(
        targets, plan, options.variant, options.seed, options.init, graph.read
    )
    notes = [*graph.notes, *plan.notes, *lowered]
    notes += [targets[key].said for key in updates if targets[key].said]
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        if options.dead != "allow":
            updates, notes_on_idle = _without_idle(updates, reference, options.dead)
            notes += notes_on_idle
        rewritten = graph.clone()
        Insert(updates, role=Role.TRAIN)(rewritten)
        metadata = reading(targets, updates, {})
        rewritten.model.metadata_props[PROPERTY] = branches_as_json(updates, metadata)
        rewritten.lint()

        with output(target, force=options.force) as file:
            file.save(rewritten.model, options.external_over)
            session = open_session(file.path, options.provider)
            rerun = FileRerun(file.path, options.provider)
            parity = reference.prove(session.run, None, "base", rerun)
            demand(parity, "untrained branches change the outputs")

    if session.note:
        notes.append(session.note)
    details = {
        "targets": [
            targets[key].to_json(update.rank, update.alpha) for key, update in updates.items()
        ],
        "trained": _count_trained(updates),
    }
    outputs = tuple(map(str, file.files))
    return Report("insert", True, tuple(parity), outputs, tuple(notes), details)


def _without_idle(
    updates: Mapping[str, LowRank], reference: OnnxReference, dead: str
) -> tuple[dict[str, LowRank], list[str]]:
    """Return the updates that change an output, and a note on each other update.

    With dead="keep" all of them are kept, and said.

    Raises:
        NoEffectError: With dead="error" one, else all, change no output.
    """
    visible = Adapter({key: _visible(update) for key, update in updates.items()})
    idle = reference.idle(visible)
    if dead == "keep":
        return dict(updates), [f"{key}: it changes no output" for key in idle]

    if idle and (dead == "error" or len(idle) == len(updates)):
        message = f"{idle[0]!r} changes no output"
        if len(idle) > 1:
            message = f"{idle[0]!r} and {len(idle) - 1} more change no output"
        raise NoEffectError(
            message, "pass --dead drop to leave such targets out; or pass real data with --inputs"
        )
    effective = {key: update for key, update in updates.items() if key not in idle}
    return effective, [f"{key}: left out, it changes no output" for key in idle]


def _count_trained(updates: Mapping[str, LowRank]) -> int:
    """Count the elements of the trained tensors."""
    count = 0
    for key, update in updates.items():
        for slot in slots_of(key, update):
            if slot.trained:
                count += slot.value.size
    return count


def _visible(update: LowRank) -> LowRank:
    """Return the update with a random b instead of zeros."""
    b = np.random.default_rng(0).standard_normal(update.b.shape).astype(np.float32)
    return LowRank(update.a, b, update.alpha, update.layout, update.variant, update.use)
