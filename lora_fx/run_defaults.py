"""The numbers that train takes where its user gives none, in one place; --help reads them too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunDefaults:
    """The numbers of a run whose user gives none.

    Attributes:
        batch_size: Examples of a batch.
        batches: Batches that make a step.
        lr: The peak learning rate.
        longest: The most tokens of a text; batches are as long as their longest one.
        held_out: The share of the examples that are held out.
        most_held_out: The most examples that are held out; None for any number.
    """

    batch_size: int
    batches: int
    lr: float
    longest: int
    held_out: float = 0.1
    most_held_out: int | None = None

    def share_of(self, examples: int) -> float:
        """The share of so many examples that is held out."""
        if self.most_held_out is None or not examples:
            return self.held_out
        return min(self.held_out, self.most_held_out / examples)


OTHERS = RunDefaults(batch_size=32, batches=1, lr=1e-3, longest=128)
"""Those of classifiers, and of every model but the following."""
CAUSAL = RunDefaults(batch_size=4, batches=2, lr=2e-4, longest=1024, most_held_out=64)
"""Those of folders of causal language models, whose examples are long and whose scores are wide."""
