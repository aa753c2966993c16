"""held_out: measure every rank of one trained adapter on data that it was not trained on.

For r = 1, 2, 4 … up to the adapter's own rank, the loss of two adapters of the same size is
measured: every update cut to rank r, and the same number of elements spread over the updates by
σ²/cost (`lora_fx.adapter.truncate`). No training: each adapter is put into one inserted module
and run.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.truncate import truncation
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.objective import objective
from lora_fx.passes.verbs.adapt import insert
from lora_fx.text import table

BATCH = 64
"""Examples that run at a time."""


@dataclass(frozen=True)
class Cut:
    """The worth of one rank.

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

    @property
    def lowest_loss(self) -> float:
        """The lower of both losses."""
        return min(self.loss, self.spread_loss)


@dataclass(frozen=True)
class HeldOut:
    """The rows, and over how many examples."""

    rows: tuple[Cut, ...]
    examples: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report as text."""
        head = ("rank", "elements", "error", "loss", "error, spread", "loss, spread")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            lines.append(
                (
                    str(row.rank),
                    str(row.parameters),
                    f"{row.error:.2e}",
                    f"{row.loss:.4f}",
                    f"{row.spread_error:.2e}",
                    f"{row.spread_loss:.4f}",
                )
            )
        best = min(self.rows, key=lambda row: (row.lowest_loss, row.rank))
        spread = ", spread" if best.spread_loss < best.loss else ""
        lowest = (
            f"lowest loss on {self.examples} examples: {best.lowest_loss:.4f} at rank "
            f"{best.rank}{spread}"
        )
        return "\n".join([*table(lines), lowest])


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
        raise LoraFxError(
            "the data has no examples", "give examples that were not used for training"
        )
    module = insert(cap, adapter=adapter, dead="allow")
    trained = module.adapter()
    highest = max((update.rank for update in trained.lowrank.values()), default=0)
    goal, notes = objective(module, data, loss, False, BATCH)

    def loss_of(cut: Adapter) -> float:
        module.load_adapter(cut)
        return goal.mean(data, BATCH)

    with module.base():
        loss_of_base = goal.mean(data, BATCH)
    rows = [Cut(0, 0, 1.0, loss_of_base, 1.0, loss_of_base)]
    for rank in _ranks_to(highest):
        cut = truncation(trained, rank=rank)
        spread = truncation(trained, params=cut.parameters)
        rows.append(
            Cut(
                rank,
                cut.parameters,
                cut.relative,
                loss_of(cut.adapter),
                spread.relative,
                loss_of(spread.adapter),
            )
        )
    return HeldOut(tuple(rows), len(data), tuple(notes))


def _ranks_to(highest: int) -> list[int]:
    """Powers of 2 below the highest rank, and that."""
    ranks = []
    rank = 1
    while rank < highest:
        ranks.append(rank)
        rank *= 2
    return [*ranks, highest]
