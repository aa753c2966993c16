"""plan: which rank every target gets under one budget.

    Σ cost_k · r_k ≤ budget,   taken greedily by gain_k(r)/cost_k

One calibration pass reads what the method wants (lora_fx.passes.verbs.calibrate), the method says
what the next rank of each target is worth (lora_fx.targets.budget), and the budget is spent in
that order (lora_fx.targets.budget). alpha = scale · rank, so that the scale of every update is the
same and a rank does not change its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.truncate import truncation
from lora_fx.adapter.variant import matrix
from lora_fx.data import Table
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.objective import objective
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.adapt import find, insert
from lora_fx.passes.verbs.calibrate import calibrate
from lora_fx.passes.verbs.open import captured_of
from lora_fx.passes.verbs.options import CaptureOptions, Selectors
from lora_fx.targets.budget import METHODS, Budget, Calibration, Moments, TargetStatistics, allocate
from lora_fx.targets.plan import Ranked, RankPlan, make_plan
from lora_fx.targets.target import Target, own_use
from lora_fx.text import table as columns


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
    name: str = "",
) -> RankPlan:
    """Ranks of a model's targets under a budget.

    Args:
        model: A module, a function of tensors, a Captured, or a path as on the command line.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        data: Batches by argument name, with a column of labels. Uniform reads none, and says so.
        budget: params:N, flops:N, flops:F% or uniform:R (lora_fx.targets.budget).
        method: uniform, importance, kfac or eva (lora_fx.targets.budget).
        loss: ce, the default, mse, or a function of (output, labels).
        include: Selectors, as for insert.
        exclude: Selectors of targets that get no rank.
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
    asked, way = Budget.of(budget), METHODS[method]
    if loss is not None and not {"outputs", "gradient"} & set(way.wanted):
        raise LoraFxError(
            f"loss has no say for method {method!r}, which reads no gradient", "leave it out"
        )
    if not scale > 0:
        raise LoraFxError(f"scale {scale!r} is not above 0", "2 is the default")
    if way.wanted and data is None:
        raise LoraFxError(f"method {method!r} reads data, and there is none", "--data FILE")
    cap = captured_of(model, CaptureOptions(args=args, kwargs=kwargs, dynamic=dynamic))
    found = find(cap)
    chosen = make_plan(found, named_tensors(cap.model)[0], rank=1, include=include, exclude=exclude)
    uses = {key: own_use(key) for key in chosen.entries}
    costs = {key: asked.cost(found[key], use) for key, use in uses.items()}
    most = {key: found[key].layout.max_rank for key in uses}
    limit = asked.limit(found, costs, most)
    seen = Calibration(dict.fromkeys(uses, Moments()))
    unread: list[str] = []
    if data is not None and not way.wanted:
        unread.append(f"data decides nothing: method {method!r} reads none")
    elif data is not None:
        seen = calibrate(cap, uses, data, loss or "ce", way.wanted)
    graph, gains, notes = cap.fx_graph(), {}, [*unread, *seen.notes]
    for key, target in ((k, found[k]) for k in uses if k not in seen.dead):

        def weight(target: Target = target) -> Array:
            return matrix(target, graph.read(target.parameter.name))

        known = TargetStatistics(target.layout, costs[key], seen.moments[key], weight)
        gains[key] = way.gains(known)
        if gains[key] is None:
            notes.append(f"{key}: {method} has nothing to read there; it gets uniform's rank")
    if not gains:
        raise LoraFxError("no gradient reaches any target", "look at the data and the loss")
    ranks = allocate(gains, costs, most, limit)
    each = {key: ranks.get(key, 0) for key in uses}  # a dead one has none
    rows = tuple(Ranked(k, r, scale * r, costs[k]) for k, r in each.items())
    return RankPlan(rows, method, budget, asked.unit, limit, name, seen.examples, tuple(notes))


# held_out: what every rank of one trained adapter is worth on data that it was not trained on.
#
# For r = 1, 2, 4 … up to the adapter's own rank, the loss of two adapters of the same size is
# measured: every update cut to rank r, and the same number of elements spread over the updates by
# σ²/cost (`lora_fx.adapter.truncate`). No training: each adapter is put into one inserted module
# and run.


BATCH = 64
"""Examples that run at a time."""


@dataclass(frozen=True)
class Cut:
    """One rank.

    Attributes:
        rank: The most that an update has; 0 is the model without low-rank updates.
        parameters: Elements of all a and b, for both.
        error: ‖ΔW − ΔW'‖/‖ΔW‖ at one rank for all.
        loss: The loss at one rank for all.
        spread_error: The error of as many elements, spread.
        spread_loss: And its loss.
    """

    rank: int
    parameters: int
    error: float
    loss: float
    spread_error: float
    spread_loss: float


@dataclass(frozen=True)
class HeldOut:
    """The rows, and over how many examples."""

    rows: tuple[Cut, ...]
    examples: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report for people."""
        head = ("rank", "elements", "error", "loss", "error, spread", "loss, spread")
        rows = []
        for c in self.rows:
            numbers = (f"{c.error:.2e}", f"{c.loss:.4f}", f"{c.spread_error:.2e}")
            rows.append((str(c.rank), str(c.parameters), *numbers, f"{c.spread_loss:.4f}"))
        best = min(self.rows, key=lambda c: (min(c.loss, c.spread_loss), c.rank))
        spread = ", spread" if best.spread_loss < best.loss else ""
        lowest = min(best.loss, best.spread_loss)
        said = f"lowest of {self.examples} examples: {lowest:.4f} at rank {best.rank}{spread}"
        return "\n".join([*columns([head, *rows]), said])


def held_out(cap: Captured, adapter: Adapter, data: Table, loss: str | Loss = "ce") -> HeldOut:
    """Losses of an adapter at lower ranks.

    Args:
        cap: The model that it was trained on.
        adapter: One of lora or rslora updates; tensors that were trained whole stay in every row.
        data: Examples that it was not trained on, with their labels.
        loss: ce, mse, or a function of (output, labels).

    Raises:
        LoraFxError: An adapter that does not fit or cannot be cut, data without examples.
    """
    if not len(data):
        raise LoraFxError("the data has no example", "give some that were not trained on")
    module = insert(cap, adapter=adapter, dead="allow")
    own = module.adapter()
    highest = max((u.rank for u in own.lowrank.values()), default=0)
    goal, said = objective(module, data, loss, False, BATCH)

    def measured(some: Adapter) -> float:
        module.load_adapter(some)
        return goal.mean(data, BATCH)

    with module.base():
        base = goal.mean(data, BATCH)
    rows = [Cut(0, 0, 1.0, base, 1.0, base)]
    for rank in [*(2**i for i in range(highest.bit_length()) if 2**i < highest), highest]:
        cut = truncation(own, rank=rank)
        spread = truncation(own, params=cut.parameters)
        losses = measured(cut.adapter), measured(spread.adapter)
        rows.append(Cut(rank, cut.parameters, cut.relative, losses[0], spread.relative, losses[1]))
    return HeldOut(tuple(rows), len(data), tuple(said))
