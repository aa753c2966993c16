"""find, insert and fold, of a model of torch or of an .onnx file: capture and passes composed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.adapter.adapter import Adapter, bind, reading
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import OF_DATA, Init, VariantName, initial, slots_of
from lora_fx.compare import Report, demand
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, remembering
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.capture.call import unwrapped
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule, FoldedModule
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.tensors import named_tensors, refuse_inference, with_base
from lora_fx.fx.train.loss import Loss
from lora_fx.inputs import Dynamic, Named
from lora_fx.ir.graph import Role
from lora_fx.onnx.manifest import PROPERTY, check_no_slots, listed
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import EXTERNAL_OVER, output
from lora_fx.onnx.session import open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.onnx_reference import FileRerun, reference_of
from lora_fx.passes.proofs.recorded_run import prove_as_it_is
from lora_fx.passes.verbs.build import build_module, found_in
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.passes.verbs.options import (
    BranchOptions,
    CaptureOptions,
    Dead,
    InsertOptions,
    NormStats,
    Selectors,
)
from lora_fx.passes.verbs.quantise import Wanted, quantised
from lora_fx.progress import Listener, told
from lora_fx.targets.plan import GivenRanks, Plan
from lora_fx.targets.target import Found


def find(
    model: Any,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    *,
    dynamic: Dynamic | None = None,
    training: bool = False,
) -> Found:
    """Every weight matmul of a model, what an adapter cannot reach, and why.

    Args:
        model: A module, a function of tensors, a Captured, a module that insert returned, or a
            Graph of any IR.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        dynamic: As in capture.
        training: Look at the train graph; the result is the same.
    """
    options = CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic, meta=True)
    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        options.refuse_for_captured()
        return replace(found_in(model.captured, graph=model.graph(training)), notes=())
    if hasattr(model, "sites"):
        options.refuse_for_captured()
        return find_graph(model)
    return found_in(captured_of(model, options), training)


@told
def insert(
    model: object,
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
    fast: bool = True,
    quantise: Wanted | None = None,
    progress: Listener | None = None,
) -> AdaptedModule:
    """A trainable module with low-rank branches; the user's module is not touched.

    Args:
        model: A module, a function of tensors, a Captured, or a path as on the command line.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        rank: The rank of every target, 8 by default, capped (and said) where a side is smaller.
        alpha: None means 2·rank.
        include: Selectors that replace the default plan.
        exclude: Selectors taken away from it.
        also_train: Tensors trained whole, such as a new head.
        variant: lora, the default, rslora, dora, lora-fa, lora+, qalora or qalora:G: see
            lora_fx.adapter.variant.
        dropout: On the input of each branch, in train mode.
        plan: A plan file, {key: rank} or {key: {rank, alpha}}, or what `plan` returned.
        adapter: Start from this adapter, or that of a path. It brings its targets, ranks, alphas,
            variants and values; options that say something else are refused.
        seed: The seed of the initial values, 0 by default; each target draws from (seed, key).
        dynamic: As in capture.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they behave as in the original, and the copied statistics move.
        dead: Every target is proven to take effect. error: one that does not is an error. drop:
            it is left out, and said. keep: it is said. auto: an error if include or plan named
            it; the default plan leaves it out, and an adapter keeps it. allow: nothing is proven.
        init: What a and b start from: kaiming, the default, gaussian, orthogonal, pissa, olora,
            eva or lora-ga, see lora_fx.adapter.variant. The base is never changed.
        data: Batches by argument name, for eva and lora-ga.
        loss: For lora-ga: ce, the default, mse, or a function of (output, labels).
        fast: Rewrite train programs so that they keep less for backward, with the same gradients:
            see docs/speed.md. False runs the graph as it was captured, with its branches.
        quantise: nf4, int4 or int8: the base's weights become codes, those of the default plan but
            for what is trained whole; KIND=SELECTORS names others; see docs/quantised.md. A weight
            that is quantised already keeps its bytes.
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Returns:
        An AdaptedModule. Parameters share the storage of the user's model; buffers are copies.

    Raises:
        LoraFxError: No target, a selector that matches nothing, a rank that does not fit.
        NoEffectError: A target that no gradient reaches, or a branch that is not W + s·b·a.
        CaptureError: The model cannot be captured.
    """
    asked: Named = {
        "rank": rank, "alpha": alpha, "include": include, "exclude": exclude,
        "also_train": also_train, "variant": variant, "dropout": dropout, "plan": plan,
        "adapter": None if adapter is None else as_adapter(adapter), "seed": seed,
        "norm_stats": norm_stats, "dead": dead, "init": init, "data": data, "loss": loss,
        "fast": fast,
    }  # fmt: skip
    options = InsertOptions.of(asked)
    model = unwrapped(model)
    refuse_second_adapter(model)
    capturing = CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic, adapter=options.adapter)
    with torch.inference_mode(False):  # A and B train, wherever insert is called
        return insert_into(captured_of(model, capturing), options, quantise)


@told
def insert_into(
    cap: Captured, options: InsertOptions, quantise: Wanted | None = None
) -> AdaptedModule:
    """What `insert` returns, for a model that is captured.

    Args:
        cap: The capture.
        options: What is inserted.
        quantise: As in insert.

    Raises:
        LoraFxError: The program holds an adapter; and as for insert.
    """
    refuse_second_adapter(cap)
    with torch.inference_mode(False):
        refuse_inference(cap.model)
        if quantise:
            cap = quantised(cap, quantise, options.whole(named_tensors(cap.model)[0]))
        return build_module(cap, options)


def refuse_second_adapter(model: object) -> None:
    """Raise for a program or a module that holds an adapter already."""
    is_program_with_adapter = isinstance(model, Captured) and model.adapter is not None
    if not is_program_with_adapter and not isinstance(model, (AdaptedModule, FoldedModule)):
        return
    name = model.path if isinstance(model, FileCaptured) else "this module"
    raise LoraFxError(
        f"{name} holds an adapter already",
        "insert into the original model; load_adapter replaces an adapter",
    )


@told
def fold(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    *,
    adapter: AdapterLike | None = None,
    dynamic: Dynamic | None = None,
    progress: Listener | None = None,
) -> FoldedModule:
    """An eval-mode module without branches, W + s·b·a in its weights.

    Args:
        model: A module that insert returned (its own adapter is folded when none is given), a
            module, a function of tensors, or a Captured.
        args: Example inputs, for a model that is not captured yet.
        kwargs: Example inputs by keyword.
        adapter: What to fold, or its path.
        dynamic: As in capture.
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Returns:
        A module with the original call; `.folded` says what went where and what rounding lost.
    """
    model = opened(model)
    if isinstance(model, FoldedModule):
        raise LoraFxError("this module's weights are folded already", "fold the original model")
    loaded = None if adapter is None else as_adapter(adapter)
    capturing = CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic, adapter=loaded)
    cap = captured_of(model, capturing)
    if loaded is None:
        if not isinstance(model, AdaptedModule):
            raise LoraFxError("nothing to fold", "pass adapter=…, or a module that insert returned")
        loaded = model.adapter()
    elif isinstance(model, AdaptedModule):  # in its place, so that nothing of the old one stays
        model = copy.deepcopy(model)
        model.load_adapter(loaded)
        loaded = model.adapter()
    found = find(cap)
    bound = bind(with_base(loaded, cap.model), found)
    rewrite = Fold(bound.lowrank)
    tree = model if isinstance(model, CapturedModule) else cap.model
    module = FoldedModule(cap, tree, rewrite, bound)
    module.folded = tuple(rewrite.report)
    whole = {name: partial(np.asarray, full.value) for name, full in bound.full.items()}
    module.unrounded = {**rewrite.unrounded, **whole}
    cap.notes += [n for n in prove_as_it_is(module, bound) if n not in cap.notes]
    return module


# insert for .onnx files: branches of trainable shapes beside the weights, and a list of them.
#
# A [*batch, rank, in] is drawn, B [*batch, out, rank] is zero, so the file still is the base: that
# is proven, and that a B other than zero moves the outputs, target by target. A and B are
# initialisers named as in PEFT (`PATH.lora_A.LEAF`), for a trainer of ONNX graphs;
# `lora_fx.manifest` in the metadata lists them, and `lora_fx.onnx.manifest` reads them back.


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
