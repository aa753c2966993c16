"""References of proofs: models that are not rewritten, alone or with an adapter's branches.

A rewritten model has to equal its reference. onnx_reference.py has the reference of an .onnx file,
run in ONNX Runtime, and torch_reference.py has the reference of a captured model.
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
from lora_fx.targets.found import Found
from lora_fx.text import Json

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""A function {input: array} → {output: array}."""
Shown = Callable[[Outputs], dict[str, Array]]
"""A function from outputs to those that are compared."""


class Rerun(Protocol):
    """Other ways to run the model or file that is compared with a reference."""

    def stepped(self) -> Iterator[Run]:
        """Yield runs whose sigmoids are off by as much as their kernel may be, if there are any."""

    def plain(self) -> Run | None:
        """Return the run without the runtime's rewrites; None if the runtime rewrites nothing."""

    def choosing(self, choices: Choices) -> Run | None:
        """Return the run with the reference's choices, which also gives the floats behind them.

        Choices and floats have their names in the reference. A choice that is not the reference's,
        turned by rounding, stays the run's own. None where the run makes no choice.
        """


@dataclass(frozen=True)
class Choices:
    """The choices of a reference's run: the integers and booleans that it computes from floats.

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
        """Return each choice with the floats that it was made among."""
        named_choices: dict[str, Choice] = {}
        for name, value in self.values.items():
            floats = {
                score: self.outputs[score] for score in self.among[name] if score in self.outputs
            }
            named_choices[name] = Choice(value, floats)
        return named_choices


class Varied(Protocol):
    """Runs of a model with adapters that differ in their numbers, which costs little."""

    def run(self, adapter: Adapter | None) -> Run:
        """Return a run with an adapter's branches, or of the base, for use before the next one."""

    def narrow(self, adapter: Adapter | None, feeds: Named) -> Named | None:
        """Run with products in bfloat16; None where that cannot be done."""


class Reference(Protocol):
    """A model whose graph is not rewritten: in torch, or a file in ONNX Runtime.

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
        """The user's inputs by name, all of one size; None if there are none."""

    def details(self) -> Json:
        """Return `ranges[]` and `unproven[]` of the report; the latter lists sizes not compared."""

    def guards(self) -> tuple[Condition, ...]:
        """Return the size conditions outside which an exported file may compute another model."""

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Return sampled inputs of a size by ONNX name; the user's own inputs replace them."""

    @property
    def ids(self) -> str:
        """The input with the token ids of rows that may invoke an aLoRA; empty if there is none."""

    def invoked(self, feeds: Named, adapter: Adapter | None) -> dict[str, Array]:
        """Return inputs whose token ids invoke an adapter, where it is an aLoRA, in most rows."""

    def run(self, adapter: Adapter | None) -> Run:
        """Return {input: array} → {output: array} of the model with an adapter's branches."""

    def drawn(self, seed: int) -> dict[str, Array]:
        """Return sampled inputs of a small size by ONNX name, without any of the user's."""

    def varied(self) -> Varied:
        """Return runs of adapters that differ in their numbers."""

    def base_facts(self) -> Json:
        """Return the name of the base, and a hash by which it is told from others."""

    def targets(self) -> Found:
        """Return the targets, in the order of the model."""

    def weight(self, key: str) -> Array:
        """Return the base's weight of a target as [*batch, out, in], in fp64."""

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Yield the rounding error of each output, the largest so far, after each run."""

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """Run with an adapter's branches, and return the choices."""

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """Compare a rewritten model with this reference at every size.

        Args:
            run: The rewritten model, which has to equal this.
            adapter: The adapter of both.
            of: The word for the comparison in the report.
            rerun: Other ways to run the rewritten model.
        """


SEEDS = (0, 1, 2)
"""The seeds for drawn inputs and moved weights, by which a model's rounding is measured."""
