"""insert for .onnx files: branches of trainable shapes beside the weights, and a list of them.

A [*batch, rank, in] is drawn, B [*batch, out, rank] is zero, so the file still is the base: that
is proven, and that a B other than zero moves the outputs, target by target. A and B are
initialisers named as in PEFT (`PATH.lora_A.LEAF`), for a trainer of ONNX graphs;
`lora_fx.manifest` in the metadata lists them, and `lora_fx.onnx.manifest` reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter, reading
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import OF_DATA, initial, slots_of
from lora_fx.compare import Report, demand
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, remembering
from lora_fx.inputs import Named
from lora_fx.ir.graph import Role
from lora_fx.onnx.manifest import PROPERTY, check_no_slots, listed
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import EXTERNAL_OVER, output
from lora_fx.onnx.session import open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.reference import FileRerun, reference_of
from lora_fx.passes.verbs.options import (
    BranchOptions,
)


@dataclass(frozen=True, kw_only=True)
class OnnxInsertOptions(BranchOptions):
    """What an insert into an .onnx file is asked for.

    Attributes:
        inputs: Arrays by input name for the check, instead of sampled ones.
        provider: auto, cpu or cuda.
        external_over: Bytes of weights above which they go to a file of their own.
        force: Replace an existing file.
    """

    inputs: Named | None = None
    provider: str = "auto"
    external_over: int = EXTERNAL_OVER
    force: bool = False

    def __post_init__(self) -> None:
        """Raise for a name that is not known, and for a start that reads data."""
        super().__post_init__()
        if self.init in OF_DATA:
            raise LoraFxError(
                f"init {self.init!r} starts from data, and an .onnx file has no gradients",
                "kaiming, gaussian, orthogonal, pissa or olora",
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
    source: str | PathLike[str], path: str | PathLike[str], asked: OnnxInsertOptions
) -> Report:
    """What `insert_onnx` does, with its options as an object."""
    source, target = Path(source), Path(path)
    remember(source)
    check_output(target, force=asked.force)
    graph, _ = named_graph(source)
    check_no_slots(graph.model, source)
    found = find_graph(graph)
    plan = asked.planned(found)
    updates, lowered = initial(found, plan, asked.variant, asked.seed, asked.init, graph.read)
    notes = [*graph.notes, *plan.notes, *lowered, *(t for k in updates if (t := found[k].said))]
    with reference_of(source, graph, asked.provider, asked.inputs) as reference:
        if asked.dead != "allow":
            idle = reference.idle(Adapter({k: _visible(u) for k, u in updates.items()}))
            lost = asked.dead == "error" or len(idle) == len(updates)
            if idle and lost and asked.dead != "keep":
                raise NoEffectError(
                    f"{idle[0]!r} and {len(idle) - 1} more change no output" if len(idle) > 1
                    else f"{idle[0]!r} changes no output",
                    "--dead drop leaves such targets out; --inputs gives real data",
                )  # fmt: skip
            told = "" if asked.dead == "keep" else "left out, "
            notes += [f"{k}: {told}it changes no output" for k in idle]
            updates = {k: u for k, u in updates.items() if not told or k not in idle}
        rewritten = graph.clone()
        Insert(updates, role=Role.TRAIN)(rewritten)
        rewritten.model.metadata_props[PROPERTY] = listed(updates, reading(found, updates, {}))
        rewritten.lint()
        with output(target, force=asked.force) as made:
            made.save(rewritten.model, asked.external_over)
            session = open_session(made.path, asked.provider)
            rerun = FileRerun(made.path, asked.provider)
            parity = reference.prove(session.run, None, "base", rerun)
            demand(parity, "untrained branches change the outputs")
    notes += [session.note] if session.note else []
    outputs = tuple(map(str, made.files))
    slots = [slot for k, u in updates.items() for slot in slots_of(k, u)]
    trained = sum(slot.value.size for slot in slots if slot.trained)
    rows = [found[k].to_json(u.rank, u.alpha) for k, u in updates.items()]
    details = {"targets": rows, "trained": trained}
    return Report("insert", True, tuple(parity), outputs, tuple(notes), details)


def _visible(update: LowRank) -> LowRank:
    """The update with a b that is not zero."""
    b = np.random.default_rng(0).standard_normal(update.b.shape).astype(np.float32)
    return LowRank(update.a, b, update.alpha, update.layout, update.variant, update.use)
