"""A recorded run holds for an adapter: the live model with W + s·b·a gives the graph's numbers.

    f(x; W + s·b·a)  =  graph(x; W, a, b)

A recorded run has the branches that the example took with the base's weights. Where weights decide
a branch or a number of steps (a loop until it converges, the largest of a weight's rows, an early
exit), the graph goes the base's way whatever is learnt. So the user's own module runs once with
W + s·b·a in its parameters: with the adapter as it is and, where that may still change, with drawn
a and b, small ones and ones as large as the weights. It does in train mode too, where that is a
recorded run of its own, both sides with the same random numbers; where the two draw them in another
order, which shows without an adapter, nothing can be told.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import ORT_TOL, Parity, compare_fairly, gates_of, grow, shapes_of
from lora_fx.dtypes import Array
from lora_fx.errors import NoEffectError, one_line
from lora_fx.fx.attach.attachment import keeps_statistics
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.observed import EveryLayer
from lora_fx.fx.capture.unchanged import alike
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.quantised_parameters import forms
from lora_fx.fx.tensors import device_of, from_numpy
from lora_fx.inputs import Named
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.passes.find import find
from lora_fx.passes.proofs.gradients import SIZE, Trained, probe
from lora_fx.passes.proofs.graph_choices import move
from lora_fx.passes.proofs.live_choices import LiveRerun
from lora_fx.passes.proofs.live_model import eval_mode, parameters_as
from lora_fx.passes.proofs.parity import prove
from lora_fx.passes.proofs.proof_inputs import arrays_of, named_of
from lora_fx.passes.proofs.reference import SEEDS
from lora_fx.progress import stage
from lora_fx.targets.keys import base_name, split_key
from lora_fx.text import some

LARGE = 1.0
"""The size of random a and b that are as large as the weights, to reach thresholds of norms."""
MOST = 16
"""Updates that are tried alone, to name those that matter."""


class Compare(Protocol):
    """A comparison of a module and the live model, in one mode."""

    def __call__(
        self, module: CapturedModule, adapter: Adapter, *, large: bool = False
    ) -> Parity | None:
        """The difference of the two with an adapter; None if there is none."""


class NotRun(Exception):
    """The live model cannot be run with an adapter; the message says why."""


def prove_drawn(module: AdaptedModule) -> tuple[str, ...]:
    """Prove a module whose adapter is trained or chosen later; returns notes.

    Updates of what is no parameter of the live model stay as they are, and are named.

    Raises:
        NoEffectError: The live model gives other numbers.
    """
    modes = _modes(module)
    if not modes:
        return ()
    if insertion_of(module).changes_anything():
        notes = prove_as_it_is(module)
        if notes:
            return notes

    left_out = _left_out(execution_of(module).captured, module.updates)
    keys = [key for key in module.updates if key not in left_out]
    try:
        for mode in modes:
            for size in (SIZE, LARGE):
                differs = partial(_differs_drawn, module, left_out, size, mode)
                parity = differs(keys)
                if parity:
                    guilty = [key for key in keys[:MOST] if differs([key])]
                    raise _refused(parity, guilty)
    except NotRun as e:
        return (f"{NOT_RUN}: {e}",)
    return tuple(f"{NOT_RUN} of {why}" for why in left_out.values())


def prove_as_it_is(module: CapturedModule, adapter: Adapter | None = None) -> tuple[str, ...]:
    """Prove a module with the adapter that it holds; returns notes.

    Args:
        module: What insert or fold made.
        adapter: What was folded; that of the module otherwise.

    Raises:
        NoEffectError: The live model gives other numbers.
    """
    modes = _modes(module)
    if not modes:
        return ()
    if adapter is None:
        if not isinstance(module, AdaptedModule):
            return ()
        adapter = module.adapter()
    left_out = _left_out(execution_of(module).captured, adapter.lowrank)
    if left_out:
        return tuple(f"{NOT_RUN} of {why}" for why in left_out.values())
    try:
        for mode in modes:
            parity = mode(module, adapter)
            if parity:
                raise _refused(parity, [])
    except NotRun as e:
        return (f"{NOT_RUN}: {e}",)
    return ()


NOT_RUN = "the graph is one recorded run, and the live model was not run with W + s·b·a"


def _refused(parity: Parity, keys: Sequence[str]) -> NoEffectError:
    """The error of a graph that goes another way than the live model.

    Args:
        parity: How far apart they are.
        keys: The updates that make them differ alone, where that is known.
    """
    which = ""
    advice = "use another adapter"
    if keys:
        which = f" ({some(keys, 5)})"
        excludes = " ".join(f"--exclude {key}" for key in keys[:5])
        pronoun = "it" if len(keys) == 1 else "them"
        advice = f"{excludes} leaves {pronoun} out"
    return NoEffectError(
        "the recorded run is not valid with an adapter: what the model does depends on its "
        f"weights{which}; with W + s·b·a, output {parity.output!r} of the live model differs from "
        f"the graph's by rel {parity.rel:.2e}, the gate is {parity.tol:.1e}",
        f"{advice}; or compute both branches with torch.where",
    )


def _left_out(captured: Captured, updates: Updates) -> dict[str, str]:
    """Updates that the live model's own parameters cannot hold alone, and why."""
    found = find(captured.fx_graph())
    parameters = dict(captured.model.named_parameters())
    first_names, _ = named_tensors(captured.model)
    targets = (*found.targets, *found.optional)
    computed = {base_name(target.key) for target in targets if "~" in target.key}
    why: dict[str, str] = {}
    for key, update in updates.items():
        name = base_name(key)
        if first_names.get(name, "") not in parameters:
            why[key] = f"{key!r}, which is computed from other parameters"
        elif update.use:
            why[key] = f"{key!r}, which is one use of a tensor that others read too"
        elif found[key].other_readers or f"{name}~" in computed:
            why[key] = f"{key!r}, which other ops read too, without the update"
    return why


def _modes(module: CapturedModule) -> list[Compare]:
    """The comparison of a module in each mode whose graph is a recorded run."""
    modes: list[Compare] = []
    if execution_of(module).captured.recorded:
        modes.append(_differs)
    if execution_of(module).captured.recorded_in_training and isinstance(module, AdaptedModule):
        modes.append(_differs_in_training)
    return modes


def _differs_drawn(
    module: AdaptedModule,
    left_out: Collection[str],
    size: float,
    mode: Compare,
    keys: Sequence[str],
) -> Parity | None:
    """The difference of the two with random a and b in some updates; None if there is none.

    Those that are left out have no effect yet, and those of other keys what they have.
    """
    chosen = {key: module.updates[key] for key in keys}
    with probe(replace(Trained.of(module), updates=chosen), size):
        entries = module.adapter().entries
        proven = {key: entry for key, entry in entries.items() if key not in left_out}
        return mode(module, Adapter(proven), large=size == LARGE)


@stage("running the live model with W + s·b·a")
def _differs(module: CapturedModule, adapter: Adapter, *, large: bool = False) -> Parity | None:
    """Compare on the example; a large probe without finite results is ignored.

    Raises:
        NotRun: The live model cannot be run with the adapter.
    """
    captured = execution_of(module).captured
    was_training = module.training
    try:
        _check_alike(module)
        changed = _changed(captured, adapter)
        with eval_mode(module):
            ours = execution_of(module).flat(captured.named)
        expected = _live(captured, changed, captured.named)
        if large and not (_are_finite(ours) and _are_finite(expected)):
            return None

        def live(feeds: Named) -> dict[str, Array]:
            return _live(captured, changed, named_of(captured.named, feeds))

        results = prove(
            live,
            module,
            arrays=arrays_of(captured.named),
            tol=ORT_TOL,
            of="the live model",
            rerun=LiveRerun(live),
        )
    finally:
        module.train(was_training)
    return next((parity for parity in results if not parity.ok), None)


@stage("running the live model in train mode with W + s·b·a")
def _differs_in_training(
    module: CapturedModule, adapter: Adapter, *, large: bool = False
) -> Parity | None:
    """Compare as `_differs` does, in train mode, a graph that is not the eval graph.

    Raises:
        NotRun: The live model cannot be run with the adapter, or draws its numbers otherwise.
    """
    _check_alike(module)
    with module.base():
        if not _trained(module, {}).ok:
            raise NotRun("in train mode it draws random numbers in another order")
    parity = _trained(module, _changed(execution_of(module).captured, adapter))
    if parity.ok or (large and not math.isfinite(parity.rel)):
        return None
    return parity


def _trained(module: CapturedModule, changed: Mapping[str, torch.Tensor]) -> Parity:
    """Compare a module with the live model in train mode, with other numbers in the parameters."""
    named = execution_of(module).captured.named

    def run(some_module: CapturedModule) -> dict[str, Array]:
        with alike(some_module, training=True), torch.no_grad():
            torch.manual_seed(0)
            return execution_of(some_module).flat(copied(named))

    def rounding() -> Iterator[Mapping[str, float]]:
        largest_errors: dict[str, float] = {}
        moved = copy.deepcopy(module)
        for seed in SEEDS:
            move(module, moved, seed)
            yield grow(largest_errors, run(moved), ours)

    expected = _live_in_training(module, changed)
    ours = run(module)
    shapes = shapes_of(arrays_of(named))
    of = "the live model in train mode"
    return compare_fairly(ours, expected, shapes, gates_of(expected), rounding, of=of)


def _live_in_training(
    module: CapturedModule, changed: Mapping[str, torch.Tensor]
) -> dict[str, Array]:
    """The outputs of the user's own module in train mode, with other numbers in its parameters.

    Raises:
        NotRun: It raises.
    """
    captured = execution_of(module).captured
    model = captured.model
    weights = dict(model.named_parameters())
    try:
        with alike(model, training=True), EveryLayer([]), torch.no_grad():
            for submodule in model.modules():
                if execution_of(module).norm_stats == "frozen" and keeps_statistics(submodule):
                    submodule.training = False
            with parameters_as(weights, changed):
                torch.manual_seed(0)
                return by_output(captured.signature.call(model, copied(captured.named)))
    except Exception as e:  # of the user's code
        raise NotRun(f"in train mode it raises {type(e).__name__}: {one_line(e, 120)}") from e


def _check_alike(module: CapturedModule) -> None:
    """Raise if the module is on another device, or in another dtype, than the live model."""
    captured = execution_of(module).captured
    device = device_of(module)
    device_of_model = device_of(captured.model)
    if execution_of(module).base_dtype != captured.base_dtype or device != device_of_model:
        raise NotRun(
            f"the module is {execution_of(module).base_dtype} on {device}, but the model is "
            f"{captured.base_dtype} on {device_of_model}"
        )


def _are_finite(outputs: Mapping[str, Array]) -> bool:
    """Whether all numbers of all outputs are finite."""
    floats = [values for values in outputs.values() if values.dtype.kind in "fc"]
    return all(bool(np.isfinite(values).all()) for values in floats)


def _live(
    captured: Captured, changed: Mapping[str, torch.Tensor], named: Named
) -> dict[str, Array]:
    """The outputs of the user's own module with other numbers in its parameters."""
    model = captured.model
    weights = dict(model.named_parameters())
    try:
        with eval_mode(model), parameters_as(weights, changed):
            return by_output(captured.signature.call(model, copied(named)))
    except Exception as e:  # of the user's code
        raise NotRun(f"it raises {type(e).__name__}: {one_line(e, 120)}") from e


def _changed(captured: Captured, adapter: Adapter) -> dict[str, torch.Tensor]:
    """First name of a parameter → W + s·b·a, in fp64 before it is rounded to W's dtype.

    Raises:
        NotRun: The weights are no plain numbers.
    """
    model = captured.model
    weights = dict(model.named_parameters())
    first_names, _ = named_tensors(model)
    if captured.quantised is not None or forms(model) or any(w.is_meta for w in weights.values()):
        raise NotRun("its weights are not plain tensors of numbers")
    changed: dict[str, Array] = {}

    def weight_of(key: str) -> Array:
        """The weight of a key in fp64, in which the updates of other keys are already."""
        name = first_names[base_name(key)]
        if name not in changed:
            changed[name] = weights[name].detach().double().numpy(force=True).copy()
        return changed[name]

    for key, full in adapter.full.items():
        changed[first_names[base_name(key)]] = np.asarray(full.value, np.float64)
    for key, update in adapter.lowrank.items():
        w = weight_of(key)
        _, region = split_key(key, w.shape)
        slices = tuple(slice(lo, hi) for lo, hi in region)
        w[slices] += _delta(update, w[slices])
    return {name: from_numpy(value).to(weights[name]) for name, value in changed.items()}


def _delta(update: LowRank, weight: Array) -> Array:
    """W' − W of an update in the stored shape."""
    assert update.layout is not None
    emitter = NumpyEmitter()
    delta = update.layout.to_stored(emitter, update.matrix())
    variant = variant_of(update)
    beside = {
        field: np.asarray(value, np.float64) for field, value in variant.beside(update).items()
    }
    change = variant.change(emitter, update.layout, weight, delta, beside.__getitem__)
    return np.asarray(change)
