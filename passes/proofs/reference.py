"""References of proofs: a model that was not rewritten, alone or with an adapter in branches.

A rewritten model has to equal it. onnx_reference.py has the reference of an .onnx file, run in ONNX
Runtime, and torch_reference.py that of a captured model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import (
    Choice,
    Outputs,
    Parity,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.inputs import Extents, Inputs, Named
from lora_fx.text import Json

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""{input: array} → {output: array}."""
Shown = Callable[[Outputs], dict[str, Array]]
"""Outputs → the part of them that is compared."""


class Rerun(Protocol):
    """Other ways to run the model or file that is compared with a reference."""

    def stepped(self) -> Iterator[Run]:
        """Runs with the sigmoids off by as much as their kernel may be; none without any."""

    def plain(self) -> Run | None:
        """The run without the runtime's rewrites; None where there are none."""

    def choosing(self, choices: Choices) -> Run | None:
        """The run with the choices of the reference, and with the floats that they are among.

        Choices and floats have their names in the reference. A choice that is not the reference's,
        turned by rounding, stays the run's own. None where the run makes no choice.
        """


@dataclass(frozen=True)
class Choices:
    """A run of a reference with its choices: integers and booleans that it computed from floats.

    Attributes:
        values: The choices, by name.
        among: Choice → the names of the floats that it was made among.
        outputs: The outputs of the run, these floats with them.
        own: How far rounding moves the outputs that are shown where the choices stay.
    """

    values: Named
    among: Mapping[str, tuple[str, ...]]
    outputs: Outputs
    own: Callable[[Shown], Iterable[Mapping[str, float]]]

    def named(self) -> dict[str, Choice]:
        """The choices, each with its floats."""
        named_choices: dict[str, Choice] = {}
        for name, value in self.values.items():
            floats = {
                score: self.outputs[score] for score in self.among[name] if score in self.outputs
            }
            named_choices[name] = Choice(value, floats)
        return named_choices


class Reference(Protocol):
    """A model whose graph was not rewritten: in torch, or a file in ONNX Runtime.

    Attributes:
        ceiling: The widest gate that rounding can ask for.
        mixes: True where activations of a whole batch share a range, so that no row is alone.
    """

    ceiling: float
    mixes: bool

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions on sizes, by the names of ONNX inputs."""

    @property
    def inputs(self) -> Inputs:
        """The signature, and the sizes of every check."""

    @property
    def arrays(self) -> Named | None:
        """A user's inputs by name, where some are given: they are of one size."""

    def details(self) -> Json:
        """`ranges[]`, and `unproven[]`: sizes at which nothing was compared."""

    def guards(self) -> tuple[Condition, ...]:
        """The conditions outside which a file of this model may be another model."""

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Inputs by their ONNX names, symbols at (batch, other); a user's own where given."""

    def run(self, adapter: Adapter | None) -> Run:
        """{input: array} → {output: array}, with an adapter's branches."""

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Per output, how far rounding alone moves it: the largest so far, run by run."""

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """The choices of a run with an adapter's branches."""

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """Compare at every size.

        Args:
            run: The rewritten model, which has to equal this.
            adapter: The adapter of both.
            of: The word for the comparison in the report.
            rerun: Other ways to run the rewritten model.
        """


SEEDS = (0, 1, 2)
"""Seeds of the inputs and of the moves of weights by which a model's rounding is measured."""
