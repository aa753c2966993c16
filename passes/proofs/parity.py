"""The check before every write: two models are equal if both give the same numbers.

The gate is relative to the largest output: ORT_TOL for fp32. Where a model exceeds it, its own
fp32-against-fp64 error decides, output by output: 4 × that + 1e-7. Narrower dtypes are gated by
their own epsilon, and by the adapter's effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch

from lora_fx.compare import (
    EPSILON,
    ORT_TOL,
    Gate,
    Parity,
    narrow_gate,
    shapes_of,
    sizes_text,
    wide_gate,
)
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.onnx_names import onnx_conditions
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.graph.ops import OPS
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.inputs import OTHER_SIZES, Extents, Named
from lora_fx.passes.proofs.graph_choices import ModuleRerun, choices_of
from lora_fx.passes.proofs.proof_inputs import arrays_of, feeds_of, is_real, leave_out, named_of
from lora_fx.passes.proofs.reference import Rerun, Run
from lora_fx.passes.proofs.run_comparison import compared
from lora_fx.passes.proofs.torch_rounding import own_errors
from lora_fx.progress import stage
from lora_fx.text import Json


def prove(
    ours: Run,
    reference: CapturedModule,
    *,
    arrays: Named | None = None,
    sizes: Sequence[Extents] | None = None,
    tol: float = ORT_TOL,
    of: str = "",
    rerun: Rerun | None = None,
    unadapted: Named | None = None,
) -> list[Parity]:
    """Run both models at every size; sizes that are equal after pinning a dimension run once.

    Args:
        ours: {input: array} → {output: array}.
        reference: The model to be equal to, in eval mode.
        arrays: A user's inputs instead of sampled ones (one run).
        sizes: Instead of those of the capture.
        tol: The gate in fp32.
        of: A word for the report: what is compared.
        rerun: Other ways to run what is compared.
        unadapted: The outputs on `arrays` without an adapter, where they are known.
    """
    reference.eval()
    results: list[Parity] = []
    run = LatestRun(reference)
    rounding = own_errors(reference, arrays, sizes, run)
    largest_errors: dict[str, float] = {}

    def own() -> Iterator[dict[str, float]]:
        """Yield the reference's rounding errors; a later call continues with the next size."""
        yield largest_errors
        for errors in rounding:
            largest_errors.update(errors)
            yield largest_errors

    # at a drawn size a model may refuse inputs that depend on each other: the example remains
    example_remains = (
        arrays is None and sizes is None and is_real(execution_of(reference).captured.named)
    )
    for named, feeds, may_fail in feeds_of(reference, arrays, sizes):
        shapes = shapes_of(feeds)
        try:
            with stage(f"running the model at {sizes_text(shapes)}"):
                expected = run(named)
        except (IndexError, RuntimeError, ValueError) as e:
            where = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            _refuse_where_model_runs(reference, named, where, e)
            if may_fail or example_remains:
                leave_out(
                    reference, shapes, f"the model does not run at these sizes: {one_line(e, 160)}"
                )
                continue
            raise LoraFxError(
                f"the model does not run at {where}: {one_line(e, 160)}",
                OTHER_SIZES,
            ) from e
        execution_of(reference).captured.unproven.pop(str(shapes), None)

        choose = partial(choices_of, reference, named)
        with stage(f"comparing {of or 'outputs'} at {sizes_text(shapes)}"):
            gates = _gates(reference, named, expected, tol, unadapted)
            parity, note = compared(ours, rerun, feeds, expected, gates, own, choose, of=of)
        results.append(parity)
        if note:
            leave_out(reference, shapes, note)
    return results


def _refuse_where_model_runs(
    reference: CapturedModule, named: Named, where: str, error: Exception
) -> None:
    """Raise if the graph fails on arguments on which the user's own model runs."""
    if _runs(execution_of(reference).captured, named):
        raise LoraFxError(
            f"the captured graph does not run at {where}, but the model does: "
            f"{one_line(error, 160)}",
            f"{OTHER_SIZES}; and report this model",
        ) from error


def _runs(captured: Captured, named: Named) -> bool:
    """Whether the user's own model, not its graph, runs on arguments."""
    try:
        with quiet(), torch.no_grad(), alike(captured.model, training=False):
            captured.signature.call(captured.model, copied(named))
    except Exception:  # of the user's code, or a model that has no weights
        return False
    return True


@dataclass(eq=False)
class LatestRun:
    """A model as a function of named arguments to {output: array}; it keeps the latest result.

    Attributes:
        model: The model.
        feeds: What it ran on the last time, by the names of inputs.
        outputs: What it gave.
    """

    model: CapturedModule
    feeds: Mapping[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)

    def __call__(self, named: Named) -> dict[str, Array]:
        """Return the outputs; the model does not run if the arguments are those of the last run."""
        feeds = arrays_of(named)
        if not self._ran_on(feeds):
            self.outputs = execution_of(self.model).flat(named)
            self.feeds = feeds
        return self.outputs

    def _ran_on(self, feeds: Mapping[str, Array]) -> bool:
        if feeds.keys() != self.feeds.keys():
            return False
        return all(np.array_equal(value, self.feeds[name]) for name, value in feeds.items())


def rows_of(captured: Captured) -> Json:
    """Return `ranges[]` and `unproven[]` of a capture, as reports show them."""
    ranges = [condition.to_json() for condition in captured.ranges]
    return {"ranges": ranges, "unproven": [*captured.unproven.values()]}


def guards(reference: CapturedModule) -> tuple[Condition, ...]:
    """Return the size conditions outside which an exported file may compute another model.

    Such sizes are not run: ONNX Runtime 1.31 may end the process there, as a recurrent layer of no
    steps does.
    """
    is_implied = (
        execution_of(reference).captured.bounded_inputs().implied
    )  # dimensions of one name say as much
    return onnx_conditions(
        [
            condition
            for condition in reference.conditions()
            if not (condition.demanded or is_implied(condition))
        ]
    )


def _gates(
    reference: CapturedModule,
    named: Named,
    expected: Mapping[str, Array],
    tol: float,
    unadapted: Named | None,
) -> dict[str, Gate]:
    """Return the gate of every output: `tol` in fp32.

    Where the output, an adapted weight or a product is in a narrower dtype, its rounding decides.
    """
    dtypes_of_weights: set[str] = set()
    if isinstance(reference, AdaptedModule):
        targets = insertion_of(reference).found
        dtypes_of_weights = {targets[key].parameter.dtype for key in reference.updates}
    dtypes = {*_product_dtypes(reference), *dtypes_of_weights}

    @cache
    def base() -> Mapping[str, Array]:
        if unadapted is not None:
            return unadapted
        with reference.base():
            return execution_of(reference).flat(named)

    gates = {}
    for name, value in expected.items():
        eps = max(EPSILON.get(dtype, 0.0) for dtype in (value.dtype.name, *dtypes))
        if eps:
            gates[name] = narrow_gate(tol, eps, base()[name], value)
            continue

        def of_base(name: str = name) -> Array:
            return base()[name]

        gates[name] = wide_gate(tol, value, of_base if dtypes_of_weights else None)
    return gates


def _product_dtypes(reference: CapturedModule) -> set[str]:
    """Return the dtypes of a model's products, which autocast may make differ from the weights'."""
    captured = execution_of(reference).captured
    traced = captured.traced(False, captured.named, execution_of(reference).base_dtype)
    values = (node.meta.get("val") for node in traced.graph.nodes if node.target in OPS)
    return {dtype_name(value.dtype) for value in values if isinstance(value, torch.Tensor)}


def torch_rerun(module: CapturedModule, *, same: bool = True) -> ModuleRerun:
    """Return other ways to run a torch module on arrays by input name; see ModuleRerun."""
    execution = execution_of(module)
    return ModuleRerun(module, lambda feeds: named_of(execution.in_own_dtype(), feeds), same)


def torch_run(module: CapturedModule) -> Run:
    """Return a torch module as a function {input: array} → {output: array}."""
    return lambda feeds: execution_of(module).flat(
        named_of(execution_of(module).in_own_dtype(), feeds)
    )
