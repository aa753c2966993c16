"""Verdicts as sentences for people."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_fx.dtypes import Array
from lora_fx.errors import visible
from lora_fx.probe.probe import BASE, Answers, Probe
from lora_fx.probe.verdict import (
    CANNOT_TELL,
    DIFFERS,
    NO_EFFECT,
    NOT_FINITE,
    OR,
    RIGHT,
    RIGHT_IN,
    SCALED,
    TOO_SMALL,
)
from lora_fx.text import Json

PASSED = (RIGHT, TOO_SMALL, CANNOT_TELL)
"""The verdicts that are no failure: a file whose adapters show nothing is as it was."""


@dataclass(frozen=True)
class RunVerdict:
    """The verdict on one run of a file.

    Attributes:
        adapter: The adapter's name; BASE for the base.
        verdict: As in docs/probe.md.
        distance: The largest difference from what was expected, as a share of the largest output.
        tolerance: What it may be.
        expected_effect: The adapter's largest change of a point, as a share of the largest output.
        found_effect: The same in the run; None, as the expected one, for the base.
        of_step: Whether the run is a training step, whose loss its base and its start decide.
    """

    adapter: str
    verdict: str
    distance: float
    tolerance: float
    expected_effect: float | None = None
    found_effect: float | None = None
    of_step: bool = False

    @property
    def passed(self) -> bool:
        """Whether this is no failure."""
        return self.verdict in PASSED

    def to_json(self) -> Json:
        """Return a row of `verdicts[]`."""
        return {
            "adapter": self.adapter or None,
            "verdict": self.verdict,
            "distance": self.distance,
            "tolerance": self.tolerance,
            "expected_effect": self.expected_effect,
            "found_effect": self.found_effect,
            "sentence": str(self),
        }

    def __str__(self) -> str:
        """The verdict as a line for people."""
        name = "step" if self.of_step else self.adapter or "base"
        return visible(f"{name}: {self._sentence()}")

    def _sentence(self) -> str:
        if self.of_step:
            return self._sentence_on_step()
        if self.adapter == BASE:
            return self._sentence_on_base()
        effects = f"expected {self.expected_effect:.2g}, found {self.found_effect:.2g}"
        if self.verdict == RIGHT:
            return f"takes effect ({effects})"
        if self.verdict == TOO_SMALL:
            return (
                f"cannot tell: its effect on the probe's input, {self.expected_effect:.1e}, is "
                f"within what outputs round by, {self.tolerance:.1e}"
            )
        if self.verdict == CANNOT_TELL:
            return (
                f"cannot tell: the outputs differ by {self.distance:.1e}, and nobody has measured "
                "what the codes of quantised weights make them differ by"
            )
        if self.verdict.startswith(RIGHT_IN):
            return f"takes effect ({effects}), but {self._difference()}"
        if self.verdict in (NOT_FINITE, DIFFERS):
            return self._unexplained()
        cause, _, precision = self.verdict.partition(" in ")
        sentence = OR.join(sentence_of_cause(one) for one in cause.split(OR))
        if precision:
            sentence += f", in the precision of {precision}"
        return f"{sentence} ({effects})"

    def _sentence_on_step(self) -> str:
        if self.verdict == RIGHT:
            return "its loss is what it was"
        if self.verdict == NOT_FINITE:
            return "its loss is not finite (NaN or infinite)"
        return (
            f"its loss differs by {self.distance:.1e}, the tolerance is {self.tolerance:.1e}: the "
            "base or the adapter that it starts from is another, or the step is wrong; which of "
            "these cannot be told"
        )

    def _sentence_on_base(self) -> str:
        if self.verdict == RIGHT:
            return "as it was"
        if self.verdict.startswith(RIGHT_IN):
            return f"as it was, but {self._difference()}"
        if self.verdict in (NOT_FINITE, DIFFERS):
            return f"not the base that the file was made from: {self._unexplained()}"
        return " or ".join(sentence_of_cause(one) for one in self.verdict.split(OR))

    def _difference(self) -> str:
        precision = self.verdict.removeprefix(RIGHT_IN)
        return (
            f"the outputs differ by {self.distance:.1e}, more than the {self.tolerance:.1e} of the "
            f"file's own precision, and no more than products in {precision} make them"
        )

    def _unexplained(self) -> str:
        if self.verdict == NOT_FINITE:
            return "outputs are not finite (NaN or infinite)"
        return (
            f"the outputs differ by {self.distance:.1e}, the tolerance is {self.tolerance:.1e}; "
            "the cause cannot be told"
        )


def sentence_of_cause(cause: str) -> str:
    """Return a cause as a sentence."""
    if cause == NO_EFFECT:
        return "no effect: the outputs are those of the base"
    kind, _, name = cause.partition(" ")
    if kind == "adapter":
        return f"the outputs are those of the adapter {name}"
    if kind == "without":
        return f"no effect of these targets: {name}"
    if cause.startswith(SCALED):
        return f"its scale is off by a factor of {cause.removeprefix(SCALED)}"
    return cause


def findings_of(probe: Probe, answers: Answers) -> list[RunVerdict]:
    """Return the verdict on every run of a file, the base first."""
    gauge = probe.gauge()
    tolerance = float(gauge.tolerance.max())
    findings = []
    for name, verdict in probe.verdicts(answers).items():
        found = answers[name]
        expected = _expected(probe, name)
        distance = gauge.distance(found, expected)
        if name == BASE:
            is_step = probe.mode == "train"
            findings.append(RunVerdict(name, verdict, distance, tolerance, of_step=is_step))
            continue
        effect = probe.effect(name)
        found_effect = probe.effect(name, found, answers.get(BASE))
        findings.append(RunVerdict(name, verdict, distance, tolerance, effect, found_effect))
    return findings


def of_codes(finding: RunVerdict) -> RunVerdict:
    """Return the verdict on quantised weights: only what needs no measured precision is told."""
    if finding.verdict in (RIGHT, TOO_SMALL, NOT_FINITE):
        return finding
    return replace(finding, verdict=CANNOT_TELL)


def _expected(probe: Probe, name: str) -> Array:
    """Return the outputs that a run should give."""
    if name != BASE:
        return probe.adapters[name].values
    assert probe.base is not None  # else there is no verdict on the base
    return probe.base


def tolerant(probe: Probe, tol: float) -> Probe:
    """Return a probe whose outputs may differ by at least this share of the largest."""
    outputs = {
        name: replace(output, tolerance=max(output.tolerance, tol))
        for name, output in probe.outputs.items()
    }
    return replace(probe, outputs=outputs)
