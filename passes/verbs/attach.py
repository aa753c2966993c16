"""attach and detach: the user's own live module adapted in place, proven equal to its graph.

One eval graph, at the sizes of the example, shows the targets: the live model runs at all sizes.
The proof runs the attached model and the graph with random A and B on the example inputs, in
eval mode, and only then writes the initial values. A module whose branch did not run there (a
fused path reads its weight raw) changes to the weight form first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.variant import Init, VariantName, learning
from lora_fx.errors import CaptureError, LoraFxError, one_line
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.attach.attachment import Attachment, attachment, is_attached
from lora_fx.fx.attach.live import REGISTRY
from lora_fx.fx.attach.partial import partial_graphs
from lora_fx.fx.capture.call import Called, Signature, unwrapped, wrappers
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.quantised_layers import keep_trainable, let_pack
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import refuse_inference
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.untie import lone_names, untie
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.proofs import effect as proofs
from lora_fx.passes.verbs.attach_forms import GraphPlanner
from lora_fx.passes.verbs.build import found_in, start_of
from lora_fx.passes.verbs.open import captured_again, captured_of, user_module
from lora_fx.passes.verbs.options import CaptureOptions, Dead, InsertOptions, NormStats, Selectors
from lora_fx.progress import Listener, said, told
from lora_fx.targets.plan import GivenRanks, Plan


@told
def attach(
    model: Any,
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
    progress: Listener | None = None,
) -> Any:
    """Adapt a live module in place, with the targets and numbers that insert would give.

    The model keeps its class's methods, Python control flow and hooks; A and B become parameters
    beside their weights, everything else stops requiring grad. While attached it has `adapter()`,
    `load_adapter(adapter)` and `report()`. `detach` gives the original back.

    Args:
        model: An nn.Module, or a Captured of one. It is changed.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        rank: As in insert, like alpha, include, exclude, also_train, variant, plan, seed, init,
            data and loss.
        dropout: On the input of each branch, in train mode; a weight that is computed as
            W + s·B·A has none.
        adapter: As in insert: start from this adapter, which brings its own of all of these.
        dynamic: As in capture.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they do what they did before.
        dead: As in insert: what becomes of targets that no gradient reaches.

    Returns:
        The same object.

    Raises:
        LoraFxError: As insert; an update that cannot reach one use of a tied tensor alone; a
            target whose effect on the live model is not that of the graph.
    """
    asked: Named = {
        "rank": rank, "alpha": alpha, "include": include, "exclude": exclude,
        "also_train": also_train, "variant": variant, "dropout": dropout, "plan": plan,
        "adapter": None if adapter is None else as_adapter(adapter), "seed": seed,
        "norm_stats": norm_stats, "dead": dead, "init": init, "data": data, "loss": loss,
    }  # fmt: skip
    options = InsertOptions.of(asked)
    if is_attached(model):
        raise LoraFxError(
            "an adapter is attached to this model already", "detach it, or use load_adapter"
        )
    with torch.inference_mode(False), contextlib.ExitStack() as ties:  # A and B train
        live = model if isinstance(model, Captured) else _module(model)
        if options.adapter is not None:
            live = _apart(live, options.adapter, ties)
        example = CaptureOptions(
            args=args, kwargs=kwargs, dynamic=dynamic, example_sizes=not dynamic
        )
        adapted = _attached(live, example, options, ties)
    return adapted if isinstance(model, Captured) else model


def _apart(
    model: Captured | nn.Module, adapter: Adapter, ties: contextlib.ExitStack
) -> Captured | nn.Module:
    """The model with a tensor of its own for every name of a tied one that is saved alone.

    Args:
        model: A module, which is changed, or a capture, in whose place comes another.
        adapter: What is to be attached.
        ties: Gets what ties the names again.
    """
    cap = model if isinstance(model, Captured) else None
    live = model if isinstance(model, nn.Module) else _module(user_module(model))
    names = lone_names(adapter, live)
    for step in reversed(untie(live, names)):  # the stack runs them from its end
        ties.callback(step)
    if cap is None or not names:
        return model
    return captured_again(cap, live)


def _attached(
    model: Any, example: CaptureOptions, options: InsertOptions, ties: contextlib.ExitStack
) -> Any:
    """The module that was adapted.

    Args:
        model: A module or a capture.
        example: How it is captured: its example inputs, and their sizes.
        options: What is asked for.
        ties: Goes to the attachment, which ties names again when it is taken off.
    """
    args, kwargs = example.args, example.kwargs
    source = model
    model = _module(user_module(source)) if isinstance(source, Captured) else source
    refuse_inference(model)
    cap: Captured | None
    try:
        cap = copy.deepcopy(captured_of(source, example))  # a capture of the caller stays as it is
        cap.live = True
        planner = GraphPlanner(cap.fx_graph(root=cap.model), found_in(cap), options.dropout)
    except CaptureError as e:
        call = partial(model, *args, **(kwargs or {}))
        cap, planner = None, _partial(model, call, options.dropout, e)
    start = start_of(model, cap, planner.found, options)
    updates, notes = start.adapter.lowrank, start.notes
    lost = planner.lost(updates)
    # where sizes are free, as insert has them, what is repeated for every row is no target
    repeated = planner.repeated(lost) if options.adapter is None else set()
    refused = {} if options.dead == "drop" else {k: lost[k] for k in lost if k not in repeated}
    if len(lost) == len(updates):
        refused = lost
    for key, why in refused.items():
        raise LoraFxError(why, f"exclude={key!r}, or use lora_fx.insert")
    for key, why in lost.items():
        reached = "" if key in repeated else ", lora_fx.insert reaches it"
        notes = (*notes, f"{why}: left out{reached}")
    updates = {k: u for k, u in updates.items() if k not in lost}
    # what the values of a recorded run decided need not be so with an adapter
    alone = (
        cap is not None
        and cap.recorded
        and not any(k.endswith("~") or u.use for k, u in updates.items())
    )
    probe = {k: proofs.random_values(k, u) for k, u in updates.items()}
    state = Attachment(
        model,
        planner,
        also_train=start.whole,
        frozen_norms=options.norm_stats == "frozen",
        notes=notes,
        metadata=start.adapter.metadata,
    )
    state.lost = lost
    state.ties = ties.pop_all()
    signature = Signature(model.forward) if cap is None else cap.signature
    named = signature.bind(tuple(args), dict(kwargs or {})) if cap is None else cap.named
    model.__dict__[REGISTRY] = state
    try:
        state.install(probe)
        if updates:
            reference: proofs.InGraph | proofs.Explicit
            if cap is None or alone:
                reference = proofs.Explicit(state, signature, named)
            else:
                reference = proofs.InGraph(state, cap, Adapter(probe, learning(probe)))
            proofs.prove_live(state, reference, probe)
        if updates and options.dead != "allow":
            idle = proofs.prove_trained(state, cap, signature, named, options.dead)
            if idle:
                state.say(*start.without(idle).notes[len(start.notes) :])
                updates = {k: u for k, u in updates.items() if k not in idle}
                state.install(updates)
        for line in state.weight_form():
            said(line)
        state.fill(updates)
        state.proven = {k: u.use for k, u in updates.items()}
        if start.bound is not None and start.bound.full:
            state.load_adapter(start.bound)
        if options.adapter is not None:
            state.check_base(options.adapter)
    except BaseException:
        detach(model)
        raise
    return model


def detach(model: Any) -> Any:
    """The model as it was before attach: classes, flags, tensors and attributes; A and B go.

    Returns:
        The same object.

    Raises:
        LoraFxError: Nothing is attached, or another tool changed a module's class since.
    """
    attachment(model).uninstall()
    del unwrapped(model).__dict__[REGISTRY]
    return model


def _module(model: object) -> nn.Module:
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in wrappers(model)):
        raise LoraFxError(
            "a DistributedDataParallel synchronises the parameters that its module had when it was "
            "made: A and B would differ from process to process",
            "attach to its module, model.module, then wrap that in DistributedDataParallel again",
        )
    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        raise LoraFxError("this module is a captured graph already", "attach to the original model")
    if not isinstance(model, nn.Module) or isinstance(model, Called):
        raise LoraFxError(
            f"attach adapts a live nn.Module, not a {type(model).__name__}",
            "lora_fx.insert takes functions of tensors",
        )
    return model


def _partial(
    model: nn.Module, call: Callable[[], object], dropout: float, error: CaptureError
) -> GraphPlanner:
    """Targets from dynamo's partial graphs; the report says so.

    Raises:
        CaptureError: The model does not run on these inputs, or no graph shows a weight.
    """
    layers = keep_trainable(model)
    with proofs.eval_mode(model):
        try:
            graphs = partial_graphs(model, call)
        except Exception as e:
            raise error from e
        finally:
            let_pack(layers)
    found = find_graph(graphs)  # type: ignore[arg-type]
    if not found.targets:
        raise error
    note = (
        f"targets found in {len(graphs.graphs) + len(graphs.failed)} partial graphs, at the "
        f"example inputs: {one_line(error.message, 200)}"
    )
    found = replace(found, notes=(note, *graphs.failed))
    return GraphPlanner(graphs, found, dropout, whole=False)
