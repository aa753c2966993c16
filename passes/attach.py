"""attach and detach: the user's own live module adapted in place, proven equal to insert's graph.

The proof runs the attached model and the graph with random A and B on the example inputs, in
eval mode, and only then writes the initial values. A module whose branch did not run there (a
fused path reads its weight raw) changes to the weight form first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.factors import learning, relearning
from lora_fx.errors import CaptureError, LoraFxError, one_line
from lora_fx.fx.attach.attachment import Attachment, attachment, is_attached
from lora_fx.fx.attach.live import REGISTRY
from lora_fx.fx.attach.partial import partial_graphs
from lora_fx.fx.capture.call import Called, Signature
from lora_fx.fx.capture.capture import Captured, capture
from lora_fx.fx.graph.flow import tensor
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import named_tensors, to_numpy
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.forms import GraphPlanner
from lora_fx.passes.pipeline import Selectors, insert, plan_of
from lora_fx.passes.proofs.attached import (
    Explicit,
    InGraph,
    Reference,
    eval_mode,
    prove_live,
    random_values,
)
from lora_fx.passes.started import check_variant, started


def attach(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rank: int = 8,
    alpha: float | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    also_train: Selectors = None,
    variant: str = "lora",
    dropout: float = 0.0,
    plan: Any = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    *,
    dynamic: Any = None,
    norm_stats: str = "frozen",
    dead: str = "error",
    init: str = "kaiming",
    data: Iterable[Mapping[str, Any]] | None = None,
    loss: Any = "ce",
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
        adapter: Start from this adapter; its targets and ranks replace the plan.
        dynamic: As in capture.
        norm_stats: frozen: batch norms use their running statistics while training. update:
            they do what they did before.
        dead: As in insert: error, drop or allow targets that no gradient reaches.

    Returns:
        The same object.

    Raises:
        LoraFxError: As insert; an update that cannot reach one use of a tied tensor alone; a
            target whose effect on the live model is not that of the graph.
    """
    if is_attached(model):
        raise LoraFxError(
            "an adapter is attached to this model already", "detach it, or use load_adapter"
        )
    said = check_variant(variant, init, dropout, data)
    _check(dropout, norm_stats)
    if adapter is not None and (include or exclude or also_train or plan is not None):
        raise LoraFxError(
            "an adapter brings its own targets and ranks",
            "leave out include, exclude, also_train and plan, or the adapter",
        )
    cap: Captured | None
    try:
        cap = (
            model if isinstance(model, Captured) else capture(_module(model), args, kwargs, dynamic)
        )
        model = _module(cap.model)
        planner = _whole(cap, dropout)
    except CaptureError as e:
        cap, planner = None, _partial(model, args, kwargs, dropout, e)
    found = planner.found
    metadata: dict[str, Any] = {"dropout": dropout}
    if adapter is None:
        names = named_tensors(model)[0]
        chosen = plan_of(found, names, rank, alpha, include, exclude, also_train, plan)
        read = cap.fx_graph().read if cap else lambda name: to_numpy(tensor(model, name))
        updates, more = started(cap, found, chosen, read, variant, seed, init, data, loss)
        whole, notes = chosen.also_train, (*chosen.notes, *said, *more)
    else:
        ready = bind(adapter, found)
        updates, own = relearning(ready.lowrank, ready.metadata)
        whole, notes = tuple(ready.full), ()
        metadata = {**own, **metadata}
    inserted = (
        insert(cap, adapter=Adapter(updates, learning(updates)), dead=dead)
        if cap and updates
        else None
    )
    if inserted is not None and len(inserted.updates) < len(updates):
        notes = (*notes, *inserted.notes)
        updates = {k: u for k, u in updates.items() if k in inserted.updates}
    probe = {k: random_values(k, u) for k, u in updates.items()}
    state = Attachment(
        model,
        planner,
        also_train=whole,
        frozen_norms=norm_stats == "frozen",
        notes=notes,
        metadata=metadata,
    )
    if cap is None:
        reference: Reference = Explicit(state, Signature(model.forward), args, kwargs)
    else:
        if inserted is not None:
            inserted.load_adapter(Adapter(probe, learning(probe)))
        reference = InGraph(state, cap, inserted)
    model.__dict__[REGISTRY] = state
    try:
        state.install(probe)
        if updates:
            prove_live(state, reference, probe)
        state.fill(updates)
        state.proven = {k: u.use for k, u in updates.items()}
        if adapter is not None and ready.full:
            state.load_adapter(ready)
        if adapter is not None:
            state.check_base(adapter)
    except BaseException:
        state.uninstall()
        del model.__dict__[REGISTRY]
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
    del model.__dict__[REGISTRY]
    return model


def _check(dropout: float, norm_stats: str) -> None:
    if not 0.0 <= dropout < 1.0:
        raise LoraFxError(f"dropout {dropout} is not in [0, 1)", "0.05 is usual")
    if norm_stats not in ("frozen", "update"):
        raise LoraFxError(f"no norm_stats {norm_stats!r}", "frozen or update")


def _module(model: Any) -> nn.Module:
    if isinstance(model, CapturedModule):
        raise LoraFxError("this module is a captured graph already", "attach to the original model")
    if not isinstance(model, nn.Module) or isinstance(model, Called):
        raise LoraFxError(
            f"attach adapts a live nn.Module, not a {type(model).__name__}",
            "lora_fx.insert takes functions of tensors",
        )
    return model


def _whole(cap: Captured, dropout: float) -> GraphPlanner:
    graph = cap.fx_graph()
    found = replace(find_graph(graph), pinned=tuple(cap.pinned), notes=tuple(cap.notes))
    return GraphPlanner(graph, found, dropout, cap.notes)


def _partial(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dropout: float,
    error: CaptureError,
) -> GraphPlanner:
    """Targets from dynamo's partial graphs; the report says so.

    Raises:
        CaptureError: The model does not run on these inputs, or no graph shows a weight.
    """
    with eval_mode(model):
        try:
            graphs = partial_graphs(model, lambda: model(*args, **(kwargs or {})))
        except Exception as e:
            raise error from e
    found = find_graph(graphs)  # type: ignore[arg-type]
    if not found.targets:
        raise error
    note = (
        f"targets found in {graphs.count} partial graphs, at the example inputs: "
        f"{one_line(error.message, 200)}"
    )
    found = replace(found, notes=(note, *graphs.failed))
    return GraphPlanner(graphs, found, dropout, found.notes, whole=False)
