"""find, insert and fold for torch models: capture a model and run the passes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lora_fx.adapter.adapter import bind
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.adapter.invocation import refuse_invocation
from lora_fx.adapter.starts import Init
from lora_fx.adapter.variant import VariantName
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.adapter_with_base import check_evaluated, with_base
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.root_module import unwrapped
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.folded import FoldedModule
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.tensors import refuse_inference
from lora_fx.fx.train.loss import Loss
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.fold import Fold
from lora_fx.passes.proofs.recorded_capture import prove_as_it_is
from lora_fx.passes.verbs.build import build_module, found_in
from lora_fx.passes.verbs.find_in_file import find_in_file, needs_no_capture
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.passes.verbs.options import (
    CaptureOptions,
    Dead,
    InsertOptions,
    NormStats,
    Selectors,
)
from lora_fx.passes.verbs.quantise import Wanted, quantised
from lora_fx.passes.verbs.shared_base import SharedBase
from lora_fx.progress import Listener, stage, told
from lora_fx.targets.found import Found
from lora_fx.targets.plan import Plan
from lora_fx.targets.rank_plan import GivenRanks
from lora_fx.text import is_whole


def find(
    model: Any,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    *,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    training: bool = False,
) -> Found:
    """Find every matmul with a weight in a model, and the weights that no adapter can reach.

    Args:
        model: A module, a function of tensors, a Captured, a module that insert returned, a Graph
            of any IR, or a path as on the command line: of an .onnx file, or of a file of tensors,
            too.
        args: Example inputs.
        kwargs: Example inputs by keyword; of an .onnx file arrays by the names of its inputs.
        dynamic: As in capture.
        static: The same.
        training: Look at the train graph; the result is the same.
    """
    options = CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic, static=static, meta=True)
    model = unwrapped(model)
    if needs_no_capture(model):
        return find_in_file(model, options, training)
    if isinstance(model, CapturedModule):
        options.refuse_for_captured()
        captured = execution_of(model).captured
        targets = found_in(captured, graph=model.graph(training))
        return replace(targets, notes=())
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
    static: Sequence[str] = (),
    norm_stats: NormStats = "frozen",
    dead: Dead = "auto",
    init: Init | None = None,
    data: Iterable[Named] | None = None,
    loss: str | Loss | None = None,
    fast: bool = True,
    quantise: Wanted | None = None,
    invocation: Sequence[int] | None = None,
    copies: int = 1,
    progress: Listener | None = None,
) -> AdaptedModule:
    """Insert low-rank branches and return a trainable module; the user's module is not changed.

    Args:
        model: A module, a function of tensors, a Captured, or a path as on the command line.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        rank: The rank of every target, 8 by default, capped (and said) where a side is smaller.
        alpha: None means 2·rank.
        include: Selectors that replace the default plan.
        exclude: Selectors taken away from it.
        also_train: Tensors trained whole, such as a new head.
        variant: lora, the default, rslora, dora, lora-fa, lora+, qalora or qalora:G, loha or vera:
            see lora_fx.adapter.variant.
        dropout: On the input of each branch, in train mode.
        plan: A plan file, {key: rank} or {key: {rank, alpha}}, or what `plan` returned.
        adapter: Start from this adapter, or that of a path. It brings its targets, ranks, alphas,
            variants and values; options that say something else are refused.
        seed: The seed of the initial values, 0 by default; each target draws from (seed, key).
        dynamic: As in capture.
        static: The same.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they behave as in the original, and the copied statistics move.
        dead: Every target is proven to take effect. error: one that does not is an error. drop:
            it is left out, and said. keep: it is said. auto: an error if include or plan named
            it; the default plan leaves it out, and an adapter keeps it. allow: nothing is proven.
        init: What a and b start from: kaiming, the default, gaussian, orthogonal, pissa, olora,
            eva or lora-ga, see lora_fx.adapter.starts. The base is never changed.
        data: Batches by argument name, for eva and lora-ga.
        loss: For lora-ga: ce, the default, mse, or a function of (output, labels).
        fast: Rewrite train programs so that they keep less for backward, with the same gradients:
            see docs/speed.md. False runs the graph as it was captured, with its branches.
        quantise: nf4, int4 or int8: the base's weights become codes, those of the default plan but
            for what is trained whole; KIND=SELECTORS names others; see docs/quantised.md. A weight
            that is quantised already keeps its bytes.
        invocation: Token ids, for an aLoRA: it acts on a row from the last place on where these
            tokens stand, and not at all in a row without them; see docs/adapters.md.
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Returns:
        An AdaptedModule. Parameters share the storage of the user's model; buffers are copies.

    Raises:
        LoraFxError: No target, a selector that matches nothing, a rank that does not fit.
        NoEffectError: A target that no gradient reaches, or a branch that is not W + s·b·a.
        CaptureError: The model cannot be captured.
    """
    keywords: Named = {
        "rank": rank, "alpha": alpha, "include": include, "exclude": exclude,
        "also_train": also_train, "variant": variant, "dropout": dropout, "plan": plan,
        "adapter": None if adapter is None else as_adapter(adapter), "seed": seed,
        "norm_stats": norm_stats, "dead": dead, "init": init, "data": data, "loss": loss,
        "fast": fast, "invocation": invocation,
    }  # fmt: skip
    options = InsertOptions.of(keywords)
    _check_copies(copies, options)
    model = unwrapped(model)
    refuse_second_adapter(model)
    capture = CaptureOptions(
        args=args, kwargs=kwargs, dynamic=dynamic, static=static, adapter=options.adapter
    )
    with torch.inference_mode(False):  # A and B train, wherever insert is called
        module = insert_into(captured_of(model, capture), options, quantise)
        if copies > 1:
            base = SharedBase.of(module, options)
            seeds = range(options.seed + 1, options.seed + copies)
            others = [base.module(replace(options, seed=seed)) for seed in seeds]
            insertion_of(module).copies = (module, *others)
        return module


@told
def insert_into(
    cap: Captured, options: InsertOptions, quantise: Wanted | None = None
) -> AdaptedModule:
    """Insert branches into a captured model, as `insert` does.

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
            first_names, _ = named_tensors(cap.model)
            cap = quantised(cap, quantise, options.whole(first_names))
        return build_module(cap, options)


def _check_copies(copies: int, options: InsertOptions) -> None:
    """Raise for a number of copies that cannot be made with the other options."""
    if not is_whole(copies) or copies < 1:
        raise LoraFxError(
            f"copies is {copies!r}; expected 1 or more", "leave it out for one adapter"
        )
    if copies > 1 and options.data is not None and not isinstance(options.data, Sequence):
        raise LoraFxError(
            "copies read the batches of data once each, and this iterable gives them once",
            "pass data=[*batches]",
        )


def refuse_second_adapter(model: object) -> None:
    """Raise for a program or a module that already holds an adapter."""
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
    static: Sequence[str] = (),
    progress: Listener | None = None,
) -> FoldedModule:
    """Return an eval-mode module without branches, with W + s·b·a as its weights.

    Args:
        model: A module that insert returned (its own adapter is folded when none is given), a
            module, a function of tensors, or a Captured.
        args: Example inputs, for a model that is not captured yet.
        kwargs: Example inputs by keyword.
        adapter: What to fold, or its path.
        dynamic: As in capture.
        static: The same.
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Returns:
        A module with the original call; `.folded` says what went where and what rounding lost.
    """
    model = opened(model)
    if isinstance(model, FoldedModule):
        raise LoraFxError("this module's weights are folded already", "fold the original model")
    opened_adapter = None if adapter is None else as_exact_lora(as_adapter(adapter))[0]
    capture = CaptureOptions(
        args=args, kwargs=kwargs, dynamic=dynamic, static=static, adapter=opened_adapter
    )
    cap = captured_of(model, capture)
    if isinstance(model, AdaptedModule):
        if opened_adapter is not None:
            # in place of its adapter, so that nothing of that one stays
            model = copy.deepcopy(model)
            model.load_adapter(opened_adapter)
        opened_adapter = model.adapter()
    if opened_adapter is None:
        raise LoraFxError(
            "there is no adapter to fold", "pass adapter=…, or a module that insert returned"
        )

    refuse_invocation(opened_adapter.invocation, "the adapter", "a folded weight")
    found = find(cap)
    bound = bind(with_base(opened_adapter, cap.model), found)
    if not isinstance(model, AdaptedModule):
        check_evaluated(bound, found, lambda name: cap.fx_graph().read(name))
    fold_pass = Fold(bound.lowrank)
    tree = model if isinstance(model, CapturedModule) else cap.model
    with stage("folding the adapter into the weights"):
        module = FoldedModule(cap, tree, fold_pass, bound)
    module.folded = tuple(fold_pass.report)
    whole_tensors = {name: partial(np.asarray, full.value) for name, full in bound.full.items()}
    module.unrounded = {**fold_pass.unrounded, **whole_tensors}
    cap.notes += [note for note in prove_as_it_is(module, bound) if note not in cap.notes]
    return module
