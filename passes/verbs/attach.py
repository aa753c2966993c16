"""attach and detach: adapt the user's live module in place, proven equal to its graph.

One eval graph, at the sizes of the example, shows the targets: the live model runs at all sizes.
The proof runs the attached model and the graph with random A and B on the example inputs, in
eval mode, and only then writes the initial values. A module whose branch did not run there (a
fused path reads its weight raw) changes to the weight form first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.learning import learning
from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.starts import Init
from lora_fx.adapter.variant import VariantName
from lora_fx.errors import CaptureError, LoraFxError, one_line, type_of
from lora_fx.formats.io import AdapterLike, as_adapter
from lora_fx.fx.attach.attachment import Attachment, attachment, is_attached
from lora_fx.fx.attach.live import REGISTRY
from lora_fx.fx.attach.partial import partial_graphs
from lora_fx.fx.capture.call import Signature
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.quantised_layers import keep_trainable, let_pack
from lora_fx.fx.capture.root_module import Called, unwrapped, wrappers
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import refuse_inference
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.untie import lone_names, untie
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.proofs import attached
from lora_fx.passes.proofs.live_model import eval_mode
from lora_fx.passes.verbs.attach_forms import GraphPlanner
from lora_fx.passes.verbs.build import Start, found_in, start_of
from lora_fx.passes.verbs.open import captured_again, captured_of, user_module
from lora_fx.passes.verbs.options import CaptureOptions, Dead, InsertOptions, NormStats, Selectors
from lora_fx.progress import Listener, said, stage, told
from lora_fx.targets.plan import Plan
from lora_fx.targets.rank_plan import GivenRanks


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
    static: Sequence[str] = (),
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
        static: The same.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they do what they did before.
        dead: As in insert: what becomes of targets that no gradient reaches.

    Returns:
        The same object.

    Raises:
        LoraFxError: As insert; an update that cannot reach one use of a tied tensor alone; a
            target whose effect on the live model is not that of the graph.
    """
    keywords: Named = {
        "rank": rank, "alpha": alpha, "include": include, "exclude": exclude,
        "also_train": also_train, "variant": variant, "dropout": dropout, "plan": plan,
        "adapter": None if adapter is None else as_adapter(adapter), "seed": seed,
        "norm_stats": norm_stats, "dead": dead, "init": init, "data": data, "loss": loss,
    }  # fmt: skip
    options = InsertOptions.of(keywords)
    if options.tokens:
        raise LoraFxError(
            "a live model's layers do not see the token ids, of which an aLoRA's mask is made",
            "use lora_fx.insert(model, …), whose graph has them",
        )
    if is_attached(model):
        raise LoraFxError(
            "an adapter is attached to this model already", "detach it, or use load_adapter"
        )
    example = CaptureOptions(
        args=args, kwargs=kwargs, dynamic=dynamic, static=static, example_sizes=not dynamic
    )
    with torch.inference_mode(False), contextlib.ExitStack() as ties:  # A and B train
        source = model if isinstance(model, Captured) else _module(model)
        if options.adapter is not None:
            source = _untied(source, options.adapter, ties)
        adapted = _attached(source, example, options, ties)
    return adapted if isinstance(model, Captured) else model


def _untied(
    model: Captured | nn.Module, adapter: Adapter, ties: contextlib.ExitStack
) -> Captured | nn.Module:
    """Return the model with a separate tensor for each tied name that the adapter saves alone.

    Args:
        model: A module, which is changed, or a capture, in whose place comes another.
        adapter: What is to be attached.
        ties: Gets what ties the names again.
    """
    live = _live_module(model)
    names = lone_names(adapter, live)
    for step in reversed(untie(live, names)):  # the stack runs them from its end
        ties.callback(step)
    if isinstance(model, Captured) and names:
        return captured_again(model, live)
    return model


def _live_module(source: Captured | nn.Module) -> nn.Module:
    """Return the live module: the source itself, or the module that a capture was made from."""
    if isinstance(source, nn.Module):
        return source
    return _module(user_module(source))


@stage("attaching branches")
def _attached(
    source: Captured | nn.Module,
    example: CaptureOptions,
    options: InsertOptions,
    ties: contextlib.ExitStack,
) -> nn.Module:
    """Adapt the live module of a source, and return this module.

    1. The targets are found in a capture; where the model has none, in dynamo's partial graphs.
    2. The updates start from an adapter or from a plan; those that no form carries out are left
       out, or refused.
    3. Random updates are attached, and the attached model is compared with the graph.
    4. The initial values take their place.

    Args:
        source: A module or a capture.
        example: How it is captured: its example inputs, and their sizes.
        options: What is asked for.
        ties: Goes to the attachment, which ties names again when it is taken off.
    """
    model = _live_module(source)
    refuse_inference(model)
    cap, planner = _planned(model, source, example, options)
    start = start_of(model, cap, planner.found, options)
    lost = planner.lost(start.adapter.lowrank)
    notes = _notes_on_lost(lost, planner, start, options)
    updates: Updates = {
        key: update for key, update in start.adapter.lowrank.items() if key not in lost
    }

    state = Attachment(
        model,
        planner,
        also_train=start.trained_whole,
        frozen_norms=options.norm_stats == "frozen",
        notes=(*start.notes, *notes),
        metadata=start.adapter.metadata,
    )
    state.lost = lost
    state.ties = ties.pop_all()
    call = _call_of(model, cap, example)
    model.__dict__[REGISTRY] = state
    try:
        updates = _prove(state, cap, call, updates, start, options)
        for line in state.weight_form():
            said(line)
        state.fill(updates)
        state.proven = {key: update.use for key, update in updates.items()}
        if start.bound is not None and start.bound.full:
            state.load_adapter(start.bound)
        if options.adapter is not None:
            state.check_base(options.adapter)
    except BaseException:
        detach(model)
        raise
    return model


def _planned(
    model: nn.Module,
    source: Captured | nn.Module,
    example: CaptureOptions,
    options: InsertOptions,
) -> tuple[Captured | None, GraphPlanner]:
    """Return the capture and its targets; the capture is None if only partial graphs exist."""
    try:
        # a capture of the caller stays as it is
        cap = copy.deepcopy(captured_of(source, example))
        cap.live = True
        graph = cap.fx_graph(root=cap.model)
        return cap, GraphPlanner(graph, found_in(cap), options.dropout)
    except CaptureError as e:
        call = partial(model, *example.args, **(example.kwargs or {}))
        return None, _partial(model, call, options.dropout, e)


def _notes_on_lost(
    lost: Mapping[str, str], planner: GraphPlanner, start: Start, options: InsertOptions
) -> list[str]:
    """Return a note for each target that is left out because attach has no form for its update.

    Args:
        lost: Target → why.
        planner: Tells which of these weights are another tensor, repeated for every row. Where
            sizes are free, as insert has them, such a weight is no target: it may be left out,
            unless an adapter brings it.
        start: All updates.
        options: With dead="drop" any target may be left out, but not all of them.

    Raises:
        LoraFxError: A target that may not be left out.
    """
    repeated = planner.repeated(lost) if options.adapter is None else set()
    refused = {key: reason for key, reason in lost.items() if key not in repeated}
    if options.dead == "drop":
        refused = {}
    if len(lost) == len(start.adapter.lowrank):
        refused = dict(lost)
    for key, reason in refused.items():
        raise LoraFxError(reason, f"pass exclude={key!r}, or use lora_fx.insert")

    notes = []
    for key, reason in lost.items():
        reached = "" if key in repeated else "; lora_fx.insert can adapt it"
        notes.append(f"{reason}: left out{reached}")
    return notes


@dataclass(frozen=True)
class _Call:
    """The call of the example: the signature of the model's forward, and the arguments by name."""

    signature: Signature
    named: Named


def _call_of(model: nn.Module, cap: Captured | None, example: CaptureOptions) -> _Call:
    if cap is not None:
        return _Call(cap.signature, cap.named)
    signature = Signature(model.forward)
    named = signature.bind(tuple(example.args), dict(example.kwargs or {}))
    return _Call(signature, named)


def _prove(
    state: Attachment,
    cap: Captured | None,
    call: _Call,
    updates: Updates,
    start: Start,
    options: InsertOptions,
) -> Updates:
    """Attach random updates and compare; return the updates that a gradient reaches.

    Raises:
        LoraFxError: The live model differs from its graph; no gradient reaches a target.
    """
    random_updates = {key: attached.random_values(key, update) for key, update in updates.items()}
    state.install(random_updates)
    if not updates:
        return updates

    reference: attached.InGraph | attached.Explicit
    if cap is None or _is_proven_alone(cap, updates):
        reference = attached.Explicit(state, call.signature, call.named)
    else:
        adapter = Adapter(random_updates, learning(random_updates))
        reference = attached.InGraph(state, cap, adapter)
    attached.prove_live(state, reference, random_updates)
    if options.dead == "allow":
        return updates

    idle = attached.prove_trained(state, cap, call.signature, call.named, options.dead)
    if not idle:
        return updates
    state.say(*start.without(idle).notes[len(start.notes) :])
    updates = {key: update for key, update in updates.items() if key not in idle}
    state.install(updates)
    return updates


def _is_proven_alone(cap: Captured, updates: Updates) -> bool:
    """Whether the reference is the live model itself with W + s·b·a in its parameters.

    A recorded run has the paths that its values decided, and an adapter may change these values. A
    computed weight is no parameter, and no parameter can hold an update of one use.
    """
    if not cap.recorded:
        return False
    return not any(key.endswith("~") or update.use for key, update in updates.items())


def detach(model: Any) -> Any:
    """Restore the model as it was before attach: classes, flags, tensors, attributes; A and B go.

    Returns:
        The same object.

    Raises:
        LoraFxError: Nothing is attached, or another tool changed a module's class since.
    """
    attachment(model).uninstall()
    del unwrapped(model).__dict__[REGISTRY]
    return model


def _module(model: object) -> nn.Module:
    """Return the live module without its wrappers; raise if attach cannot adapt it."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in wrappers(model)):
        raise LoraFxError(
            "DistributedDataParallel synchronises only the parameters that its module had when "
            "it was wrapped: A and B would differ between processes",
            "attach to its module, model.module, then wrap this module in "
            "DistributedDataParallel again",
        )
    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        raise LoraFxError("this module is a captured graph already", "attach to the original model")
    if not isinstance(model, nn.Module) or isinstance(model, Called):
        raise LoraFxError(
            f"attach adapts a live nn.Module, not {type_of(model)}",
            "use lora_fx.insert, which also takes functions of tensors",
        )
    return model


def _partial(
    model: nn.Module, call: Callable[[], object], dropout: float, error: CaptureError
) -> GraphPlanner:
    """Find targets in dynamo's partial graphs, and note this in the report.

    Raises:
        CaptureError: The model does not run on these inputs, or no graph shows a weight.
    """
    layers = keep_trainable(model)
    with eval_mode(model):
        try:
            graphs = partial_graphs(model, call)
        except Exception as e:
            raise error from e
        finally:
            let_pack(layers)
    targets = find_graph(graphs)  # type: ignore[arg-type]
    if not targets.targets:
        raise error
    note = (
        "no whole graph could be captured; targets found in "
        f"{len(graphs.graphs) + len(graphs.failed)} partial graphs, at the example inputs: "
        f"{one_line(error.message, 200)}"
    )
    targets = replace(targets, notes=(note, *graphs.failed))
    return GraphPlanner(graphs, targets, dropout, whole=False)
