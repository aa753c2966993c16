"""The default numbers of train, which --help shows too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunDefaults:
    """The default numbers of a run.

    Attributes:
        batch_size: Examples of a batch.
        batches: Batches that make a step.
        lr: The peak learning rate.
        longest: The most tokens of a text; batches are as long as their longest one.
        held_out: The share of the examples that are held out.
        most_held_out: The most examples that are held out; None for any number.
        checks: Validations in a run.
        validates_less: Whether a run validates on no more examples than it trains on.
    """

    batch_size: int
    batches: int
    lr: float
    longest: int
    held_out: float = 0.1
    most_held_out: int | None = None
    checks: int = 10
    validates_less: bool = False

    def share_of(self, examples: int) -> float:
        """Return the share of the examples that is held out."""
        if self.most_held_out is None or not examples:
            return self.held_out
        return min(self.held_out, self.most_held_out / examples)

    def checks_of(self, trained: int, held_out: int) -> int:
        """Return the number of validations in a run, at least one.

        Args:
            trained: The examples of all its steps.
            held_out: The examples of a validation.
        """
        if not self.validates_less or not held_out:
            return self.checks
        return max(1, min(self.checks, trained // held_out))


OTHERS = RunDefaults(batch_size=32, batches=1, lr=1e-3, longest=128)
"""Those of classifiers, and of every model but the following."""
CAUSAL = RunDefaults(
    batch_size=4, batches=2, lr=2e-4, longest=1024, most_held_out=64, validates_less=True
)
"""Those of folders of causal language models, whose examples are long and whose scores are wide."""
