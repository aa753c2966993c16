"""plan: which rank every target gets under one budget.

    Σ cost_k · r_k ≤ budget,   taken greedily by gain_k(r)/cost_k

One calibration pass reads what the method wants (lora_fx.passes.calibrate), the method says what
the next rank of each target is worth (lora_fx.targets.ranking), and the budget is spent in that
order (lora_fx.targets.budget). alpha = scale · rank, so that the scale of every update is the same
and a rank does not change its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_fx.adapter.initial import matrix
from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import named_tensors
from lora_fx.passes.calibrate import calibrate
from lora_fx.passes.given import captured_of
from lora_fx.passes.pipeline import Selectors, find
from lora_fx.targets.budget import allocate, cost_of, limit_of, parse_budget
from lora_fx.targets.plan import Planned, Ranked, make_plan
from lora_fx.targets.ranking import METHODS, Calibration, Moments, Seen
from lora_fx.targets.regions import of_use
from lora_fx.targets.target import split_use


def plan(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    budget: str = "uniform:8",
    method: str = "uniform",
    *,
    loss: Any = "ce",
    include: Selectors = None,
    exclude: Selectors = None,
    scale: float = 2.0,
    dynamic: Any = None,
    name: str = "",
) -> Planned:
    """Ranks of a model's targets under a budget.

    Args:
        model: A module, a function of tensors, a Captured, or a path as on the command line.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        data: Batches by argument name, with a column of labels; none are needed for uniform.
        budget: params:N, flops:N, flops:F% or uniform:R (lora_fx.targets.budget).
        method: uniform, importance, kfac or eva (lora_fx.targets.ranking).
        loss: ce, mse, or a function of (output, labels).
        include: Selectors, as for insert.
        exclude: Likewise.
        scale: alpha/rank of every target.
        dynamic: As in capture.
        name: What the file calls the model.

    Returns:
        What insert takes as `plan`, and a file holds (`save`).

    Raises:
        LoraFxError: A method or budget that is not known, no data, a budget below one rank.
    """
    if method not in METHODS:
        raise LoraFxError(f"no method {method!r}", f"the methods are {', '.join(METHODS)}")
    asked, way = parse_budget(budget), METHODS[method]
    if not scale > 0:
        raise LoraFxError(f"scale {scale!r} is not above 0", "2 is the default")
    if way.wanted and data is None:
        raise LoraFxError(f"method {method!r} reads data, and there is none", "data=… in Python")
    cap = captured_of(model, args, kwargs, dynamic)
    found = find(cap)
    chosen = make_plan(found, named_tensors(cap.model)[0], rank=1, include=include, exclude=exclude)
    uses = {_key(found, key, entry.use): entry.use for key, entry in chosen.entries.items()}
    costs = {key: cost_of(found[key], use, asked.unit) for key, use in uses.items()}
    most = {key: found[key].layout.max_rank for key in uses}
    limit = limit_of(asked, found, costs, most)
    seen = Calibration(dict.fromkeys(uses, Moments()))
    if way.wanted and data is not None:
        seen = calibrate(cap, uses, data, loss, way.wanted)
    graph, gains, notes = cap.fx_graph(), {}, list(seen.notes)
    for key, target in ((k, found[k]) for k in uses if k not in seen.dead):

        def weight(target: Any = target) -> Any:
            return matrix(target, graph.read(target.parameter.name))

        gains[key] = way.gains(Seen(target.layout, costs[key], seen.moments[key], weight))
        if gains[key] is None:
            notes.append(f"{key}: {method} has nothing to read there; it gets uniform's rank")
    if not gains:
        raise LoraFxError("no gradient reaches any target", "look at the data and the loss")
    ranks = allocate(gains, costs, most, limit)
    each = {key: ranks.get(key, 0) for key in uses}  # a dead one has none
    rows = tuple(Ranked(k, r, scale * r, costs[k], most[k]) for k, r in each.items())
    return Planned(rows, method, budget, asked.unit, limit, name, seen.examples, tuple(notes))


def _key(found: Any, key: str, use: str) -> str:
    """The key that a file says: with the use, where an update has some uses only."""
    if not use or split_use(key)[1]:
        return key
    own = of_use(found[key], use)
    return key if own is None else own.key
