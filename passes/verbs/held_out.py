"""held_out: what every rank of one trained adapter is worth on data that it was not trained on.

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
from lora_fx.text import table as columns

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
