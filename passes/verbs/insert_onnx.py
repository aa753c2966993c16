"""insert for .onnx files: branches of trainable shapes beside the weights, and a list of them.

A [*batch, rank, in] is drawn, B [*batch, out, rank] is zero, so the file still is the base: that is
proven, and that a B other than zero moves the outputs, target by target. A and B are initialisers
named as in PEFT (`PATH.lora_A.LEAF`), for a trainer of ONNX graphs; `lora_fx.manifest` in the
metadata lists them, and `lora_fx.onnx.manifest` reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factors import slots_of
from lora_fx.adapter.initial import OF_DATA, initial
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import named_variant
from lora_fx.compare import Report, demand
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import check_output
from lora_fx.ir.emitter import Role
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import PROPERTY, listed
from lora_fx.onnx.names import restore_weight_names
from lora_fx.onnx.save import EXTERNAL_OVER, output
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.reference import reference_of
from lora_fx.targets.plan import make_plan

Selectors = str | Sequence[str] | None


def insert_onnx(
    source: str | PathLike[str],
    path: str | PathLike[str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    plan: Any = None,
    variant: str = "lora",
    seed: int = 0,
    init: str = "kaiming",
    dead: str = "error",
    inputs: Mapping[str, Any] | None = None,
    provider: str = "auto",
    external_over: int = EXTERNAL_OVER,
    force: bool = False,
) -> Report:
    """Write the file with untrained branches.

    Args:
        source: The file; it is not changed.
        path: Where to write.
        rank: Of every target, capped (and said) where a side is smaller.
        alpha: None means 2·rank.
        include: Selectors that replace the default plan.
        exclude: Selectors taken away from it.
        plan: A plan file, {key: rank} or {key: {rank, alpha}}.
        variant: lora, rslora, dora, lora-fa or lora+: see lora_fx.adapter.variant.
        seed: Of the initial values; each target draws from (seed, key).
        init: What a and b start from, see lora_fx.adapter.initial; those that read data are
        refused. dead: Targets that change no output. error; drop: left out, and said; allow: not
        asked. inputs: Arrays by input name for the check, instead of sampled ones.
        provider: auto, cpu or cuda.
        external_over: Bytes of weights above which they go to a file of their own.
        force: Replace an existing file.

    Raises:
        LoraFxError: No target, a selector that matches nothing, a rank that does not fit.
        NoEffectError: A target that changes no output; nothing is written.
    """
    source, target = Path(source), Path(path)
    check_output(target, force=force)
    if target.resolve() == source.resolve():
        raise LoraFxError(f"{target}: the output would replace the input", "choose another output")
    named_variant(variant)
    if init in OF_DATA:
        raise LoraFxError(
            f"init {init!r} starts from data, and an .onnx file has no gradients",
            "kaiming, gaussian, orthogonal, pissa or olora",
        )
    model = load(source)
    if PROPERTY in model.metadata_props:
        raise LoraFxError(f"{source}: it has slots for adapters already", "start from its base")
    restore_weight_names(model)
    graph = OnnxGraph(model)
    found = find(graph)
    chosen = make_plan(
        found, {n: n for n in found.shapes}, rank=rank, alpha=alpha,
        include=include, exclude=exclude, ranks=plan,
    )  # fmt: skip
    updates, lowered = initial(found, chosen, variant, seed, init, graph.read)
    notes = [*graph.notes, *chosen.notes, *lowered]
    with reference_of(source, graph, provider, inputs) as reference:
        if dead != "allow":
            idle = reference.idle(Adapter({k: _visible(u) for k, u in updates.items()}))
            if idle and (dead == "error" or len(idle) == len(updates)):
                raise NoEffectError(
                    f"{idle[0]!r} and {len(idle) - 1} more change no output" if len(idle) > 1
                    else f"{idle[0]!r} changes no output",
                    "--dead drop leaves such targets out; --inputs gives real data",
                )  # fmt: skip
            notes += [f"{k}: left out, it changes no output" for k in idle]
            updates = {k: u for k, u in updates.items() if k not in idle}
        rewritten = graph.clone()
        Insert(updates, role=Role.TRAIN)(rewritten)
        rewritten.model.metadata_props[PROPERTY] = listed(updates)
        rewritten.lint()
        with output(target, force=force) as made:
            made.save(rewritten.model, external_over)
            session = open_session(made.path, provider)
            parity = reference.prove(session.run, None, "base")
            demand(parity, "untrained branches change the outputs")
    notes += [session.note] if session.note else []
    outputs = tuple(map(str, made.files))
    slots = [slot for k, u in updates.items() for slot in slots_of(k, u)]
    trained = sum(slot.value.size for slot in slots if slot.trained)
    rows = [found[k].to_json(u.rank, u.alpha) for k, u in updates.items()]
    details = {"targets": rows, "trained": trained}
    return Report("insert", True, tuple(parity), outputs, tuple(notes), details)


def _visible(update: LowRank) -> LowRank:
    """The same with a b that is not zero."""
    b = np.random.default_rng(0).standard_normal(update.b.shape).astype(np.float32)
    return LowRank(update.a, b, update.alpha, update.layout, update.variant, update.use)
