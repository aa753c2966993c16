"""plan: choose the rank of every target under one budget.

    Σ cost_k · r_k ≤ budget,   taken greedily by gain_k(r)/cost_k

One calibration pass reads what the method wants (lora_fx.passes.verbs.calibrate), the method says
what the next rank of each target is worth (lora_fx.targets.rank_methods), and the budget is spent
in that order (lora_fx.targets.budget). alpha = scale · rank, so that the scale of every update is
the same and a rank does not change its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from lora_fx.adapter.starts import matrix
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.train.loss import Loss
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.calibrate import calibrate
from lora_fx.passes.verbs.held_out_loss import held_out as held_out  # its place before
from lora_fx.passes.verbs.open import captured_of
from lora_fx.passes.verbs.options import CaptureOptions, Selectors
from lora_fx.targets.budget import Budget, allocate
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use
from lora_fx.targets.moments import Calibration, Moments
from lora_fx.targets.plan import Ranked, RankPlan, make_plan
from lora_fx.targets.rank_methods import METHODS, Method, TargetStatistics
from lora_fx.targets.target import Target


def plan(
    model: object,
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    data: Iterable[Named] | None = None,
    budget: str = "uniform:8",
    method: Literal["uniform", "importance", "kfac", "eva"] = "uniform",
    *,
    loss: str | Loss | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    scale: float = 2.0,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    name: str = "",
) -> RankPlan:
    """Plan the ranks of a model's targets under a budget.

    Args:
        model: A module, a function of tensors, a Captured, or a path as on the command line.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        data: Batches by argument name, with a column of labels. Uniform reads none, and says so.
        budget: params:N, flops:N, flops:F% or uniform:R (lora_fx.targets.budget).
        method: uniform, importance, kfac or eva (lora_fx.targets.rank_methods).
        loss: ce, the default, mse, or a function of (output, labels).
        include: Selectors, as for insert.
        exclude: Selectors of targets that get no rank.
        scale: alpha/rank of every target.
        dynamic: As in capture.
        static: The same.
        name: What the file calls the model.

    Returns:
        What insert takes as `plan`, and a file holds (`save`).

    Raises:
        LoraFxError: A method or budget that is not known, no data, a budget below one rank.
    """
    if method not in METHODS:
        raise LoraFxError(f"unknown method {method!r}", f"use one of {', '.join(METHODS)}")
    parsed_budget = Budget.of(budget)
    _check_options(method, loss, scale, has_data=data is not None)

    rank_method = METHODS[method]
    cap = captured_of(
        model, CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic, static=static)
    )
    targets = find(cap)
    first_names, _ = named_tensors(cap.model)
    chosen = make_plan(targets, first_names, rank=1, include=include, exclude=exclude)
    uses = {key: own_use(key) for key in chosen.entries}
    costs = {key: parsed_budget.cost(targets[key], use) for key, use in uses.items()}
    highest = {key: targets[key].layout.max_rank for key in uses}
    limit = parsed_budget.limit(targets, costs, highest)

    notes: list[str] = []
    calibration = Calibration(dict.fromkeys(uses, Moments()))
    if data is not None and not rank_method.wanted:
        notes.append(f"data has no effect: method {method!r} reads none")
    elif data is not None:
        calibration = calibrate(cap, uses, data, loss or "ce", rank_method.wanted)
    notes += calibration.notes
    gains = _gains(cap, targets, rank_method, costs, calibration)
    for key, gain in gains.items():
        if gain is None:
            notes.append(
                f"{key}: method {method} finds no data for it; it gets the rank of method uniform"
            )
    if not gains:
        raise LoraFxError("no gradient reaches any target", "check the data and the loss")

    ranks = allocate(gains, costs, highest, limit)
    rows = []
    for key in uses:
        rank = ranks.get(key, 0)  # a dead target has none
        rows.append(Ranked(key, rank, scale * rank, costs[key]))
    return RankPlan(
        tuple(rows),
        method,
        budget,
        parsed_budget.unit,
        limit,
        name,
        calibration.examples,
        tuple(notes),
    )


def _check_options(method: str, loss: str | Loss | None, scale: float, *, has_data: bool) -> None:
    """Raise for a loss that a method does not read, a scale of 0, and missing data."""
    statistics = METHODS[method].wanted
    if loss is not None and not {"outputs", "gradient"} & set(statistics):
        raise LoraFxError(
            f"loss has no effect for method {method!r}, which reads no gradient", "leave it out"
        )
    if not scale > 0:
        raise LoraFxError(
            f"scale is {scale!r}; expected a number above 0", "leave it out for the default, 2"
        )
    if statistics and not has_data:
        raise LoraFxError(
            f"method {method!r} reads data, but no data was given", "pass --data FILE"
        )


def _gains(
    cap: Captured,
    targets: Found,
    method: Method,
    costs: Mapping[str, int],
    calibration: Calibration,
) -> dict[str, Array | None]:
    """Compute the gains of the ranks by target; None if the method has nothing to read."""
    graph = cap.fx_graph()
    gains = {}
    for key, cost in costs.items():
        if key in calibration.dead:
            continue
        target = targets[key]
        statistics = TargetStatistics(
            target.layout, cost, calibration.moments[key], partial(_weight, graph, target)
        )
        gains[key] = method.gains(statistics)
    return gains


def _weight(graph: FxGraph, target: Target) -> Array:
    """Read the weight of a target as a matrix."""
    return matrix(target, graph.read(target.parameter.name))
