"""The report of a run: losses by step, the kept step, and a verdict in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fx.files.replaceable import CURVE
from lora_fx.text import Json, short


@dataclass
class TrainReport:
    """The losses of a run by step, and the kept step: the model's adapter is of `best_step`.

    `before` is the validation loss before the first step, None without validation.
    `stopped` is the step at which patience ended the run, or None where it went to its end.
    `resumed` is the step from which the run went on, None where it began at the first.
    `error` is why a run among others ended before its last step; a run alone raises it.
    """

    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    before: float | None = None
    best_step: int = 0
    stopped: int | None = None
    resumed: int | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    __repr__ = short

    @property
    def verdict(self) -> str:
        """One line that says whether the validation loss rose, and which step was kept."""
        line = verdict(self.validation, self.best_step, self.before)
        if self.stopped is None:
            return line
        return f"{line}; patience ended at step {self.stopped}"

    def __str__(self) -> str:
        """Return the kept step, the step of a resume, and the verdict."""
        best = self.validation.get(self.best_step)
        text = f"kept step {self.best_step} of {len(self.losses)}"
        if best is not None:
            text += f", validation loss {best:.4f}"
        if self.resumed is not None:
            text += f" (resumed at step {self.resumed})"
        return f"{text}\n{self.verdict}"

    def to_json(self) -> Json:
        """Return the fields of report files."""
        validation = {str(step): round(loss, 6) for step, loss in self.validation.items()}
        return {
            "losses": [round(loss, 6) for loss in self.losses],
            "validation": validation,
            "before": None if self.before is None else round(self.before, 6),
            "best_step": self.best_step,
            "stopped": self.stopped,
            "resumed": self.resumed,
            "verdict": self.verdict,
        }

    def to_csv(self) -> str:
        """Return a line of step, loss and validation for each step; step 0 is before the first."""
        validation = {0: self.before, **self.validation}
        lines = [CURVE]
        if validation[0] is not None:
            lines.append(f"0,,{validation[0]}")
        for step, loss in enumerate(self.losses, 1):
            lines.append(f"{step},{loss},{validation.get(step, '')}")
        return "\n".join([*lines, ""])


def verdict(validation: Mapping[int, float], kept: int, before: float | None) -> str:
    """Return one line on overfitting.

    Args:
        validation: Step → loss, in the order of the steps.
        kept: The step whose adapter is kept; of `validation`, unless that is empty or not finite.
        before: The loss before the first step, if it is known.
    """
    if not validation:
        return f"no validation: overfitting would not be seen; kept the last step, {kept}"
    steps = list(validation)
    last = steps[-1]
    ending = f"; kept step {kept}"
    best = validation.get(kept)
    if before is not None and best is not None and not best < before:
        ending += ", no better than before training"
    if len(steps) == 1:
        return f"one validation, at step {last}: no rise or fall can be seen" + ending
    if kept == last:
        fall = _change(validation[steps[-2]], validation[last])
        line = f"validation loss still falling at the last step (by {fall} since {steps[-2]})"
        return line + ending
    if validation[last] == validation[kept]:
        return f"validation loss did not fall after step {kept}" + ending
    rise = _change(validation[kept], validation[last])
    return f"validation loss rose {rise} after step {kept}" + ending


def _change(old: float, new: float) -> str:
    """Return a change in per cent; as a number if the old value is not above zero."""
    if old <= 0:
        return f"{abs(new - old):.3g}"
    share = 100 * abs(new - old) / old
    if share < 0.1:
        return "less than 0.1 %"
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %"
