"""The reference of a torch export: the captured model in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.starts import matrix
from lora_fx.compare import (
    CEILING,
    ORT_TOL,
    Parity,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.onnx_names import onnx_conditions, onnx_name
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.module.module_base import base_facts
from lora_fx.fx.token_mask import name_of_ids
from lora_fx.inputs import SIZES, Extents, Inputs, Named
from lora_fx.passes.find import find
from lora_fx.passes.proofs.graph_choices import choices_of
from lora_fx.passes.proofs.parity import guards, prove, rows_of, torch_run
from lora_fx.passes.proofs.proof_inputs import arrays_of, is_real, named_of
from lora_fx.passes.proofs.reference import Choices, Rerun, Run
from lora_fx.passes.proofs.torch_rounding import own_errors
from lora_fx.passes.proofs.varied_runs import VariedRuns
from lora_fx.targets.found import Found
from lora_fx.text import Json


@dataclass(eq=False)
class TorchReference:
    """A captured model; the branches of insert add an adapter to it.

    Attributes:
        captured: The base model.
        branched: What adds an adapter's branches to it.
        arrays: A user's inputs by name, instead of sampled ones.
        tol: The gate.
    """

    captured: Captured
    branched: Callable[[Adapter], CapturedModule]
    arrays: Named | None = None
    tol: float = ORT_TOL

    def __post_init__(self) -> None:
        """Make the module of the base."""
        self.base = plain(self.captured).eval()
        self._last: tuple[Adapter | None, CapturedModule] = (None, self.base)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Implement `Reference.conditions`."""
        return onnx_conditions(self.base.conditions())

    @property
    def inputs(self) -> Inputs:
        """Implement `Reference.inputs`."""
        return execution_of(self.base).captured.inputs

    @property
    def ids(self) -> str:
        """Implement `Reference.ids`."""
        named = execution_of(self.base).captured.named
        return onnx_name(name_of_ids(self.base.graph(False), named))

    def details(self) -> Json:
        """Implement `Reference.details`."""
        return rows_of(execution_of(self.base).captured)

    def guards(self) -> tuple[Condition, ...]:
        """Implement `Reference.guards`."""
        return guards(self.base)

    ceiling = CEILING
    mixes = False

    def feeds(self, size: Extents, seed: int = 0) -> dict[str, Array]:
        """Implement `Reference.feeds`."""
        named = execution_of(self.base).sample(size, self.arrays, seed)
        example = execution_of(self.base).in_own_dtype()
        try:
            execution_of(self.base).flat(named)
        except (IndexError, RuntimeError, ValueError):  # inputs that depend on each other, maybe
            if self.arrays is None and is_real(example):
                named = example
        return arrays_of(named)

    def invoked(self, feeds: Named, adapter: Adapter | None) -> dict[str, Array]:
        """Implement `Reference.invoked`."""
        return execution_of(self._module(adapter)).invoked(feeds)

    def run(self, adapter: Adapter | None) -> Run:
        """Implement `Reference.run`."""
        return torch_run(self._module(adapter))

    def choices(self, adapter: Adapter | None, feeds: Named) -> Choices:
        """Implement `Reference.choices`."""
        module = self._module(adapter)
        return choices_of(module, named_of(execution_of(module).in_own_dtype(), feeds))

    def own_errors(self, adapter: Adapter | None) -> Iterator[Mapping[str, float]]:
        """Yield rounding errors: the fp32 outputs against fp64."""
        return own_errors(self._module(adapter))

    def prove(
        self, run: Run, adapter: Adapter | None, of: str, rerun: Rerun | None = None
    ) -> list[Parity]:
        """Implement `Reference.prove`."""
        module = self._module(adapter)
        return prove(run, module, arrays=self.arrays, tol=self.tol, of=of, rerun=rerun)

    def drawn(self, seed: int) -> dict[str, Array]:
        """Implement `Reference.drawn`."""
        return arrays_of(execution_of(self.base).sample(SIZES[0], None, seed))

    def varied(self) -> VariedRuns:
        """Implement `Reference.varied`, with the module whose branches ran last."""
        adapter, module = self._last
        self._last = (None, self.base)  # its factors are written from now on
        return VariedRuns(self.base, self.branched, None if adapter is None else module)

    def base_facts(self) -> Json:
        """Implement `Reference.base_facts`, by a sample of the weights."""
        return base_facts(self.captured.model)

    def targets(self) -> Found:
        """Implement `Reference.targets`."""
        return find(self.base.graph(False))

    def weight(self, key: str) -> Array:
        """Implement `Reference.weight`."""
        target = find(self._graph_of_base)[key]
        return matrix(target, self._graph_of_base.read(target.parameter.name))

    @cached_property
    def _graph_of_base(self) -> FxGraph:
        """The graph of the base, which is walked once."""
        return self.base.graph(False)

    def _module(self, adapter: Adapter | None) -> CapturedModule:
        if adapter is None:
            return self.base
        if self._last[0] is not adapter:
            self._last = (adapter, self.branched(adapter).eval())
        return self._last[1]
