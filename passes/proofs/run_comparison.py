"""The comparison of one run with the outputs of its reference, and three ways to be fair to it.

Rounding may move a run far in three ways that are no fault: by the runtime's own rewrites, by a
choice among near-equal numbers that it turns, and by the steps of a sigmoid's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from lora_fx.compare import (
    Gate,
    Outputs,
    Parity,
    compare_fairly,
    fills,
    gates_of,
    grow,
    rel,
    shapes_of,
    wider_gates,
    without,
)
from lora_fx.dtypes import Array, finfo
from lora_fx.errors import LoraFxError
from lora_fx.inputs import OTHER_SIZES, Named
from lora_fx.passes.proofs.reference import SEEDS, Choices, Rerun, Run

REWRITES = 1e-2
"""The most that the runtime's rewrites may move an output of a file that is right without them."""


def spread(
    outputs: Outputs, run: Run, plain: Run | None, feeds: Named
) -> Iterator[dict[str, float]]:
    """Per output, how far a runtime's own rounding moves it: the largest so far, run by run.

    ONNX Runtime folds batch norms into convolutions, which rounds their weights once more. That is
    seen where it rewrites nothing, and other rounding where every float of the inputs is moved by
    half a unit of its last place.

    Args:
        outputs: What was compared.
        run: What gave it.
        plain: The same without the runtime's rewrites.
        feeds: The inputs that it was compared at.
    """
    largest_errors: dict[str, float] = {}
    runs = [run]
    if plain is not None:
        runs.append(plain)
        yield grow(largest_errors, plain(feeds), outputs)
    if not any("float" in value.dtype.name for value in feeds.values()):
        return
    for seed in SEEDS:
        moved = nearby_feeds(feeds, seed)
        for run_again in runs:
            yield grow(largest_errors, run_again(moved), outputs)


def compared(
    run: Run,
    rerun: Rerun | None,
    feeds: Named,
    expected: Outputs,
    gates: Mapping[str, Gate],
    own: Callable[[], Iterable[Mapping[str, float]]],
    choose: Callable[[], Choices],
    *,
    of: str,
) -> tuple[Parity, str]:
    """The comparison of a run with its reference, and a note for the report.

    1. A file that is too far off, and is not without the runtime's rewrites, is right: the
       comparison is the one without them.
    2. Where outputs depend on choices, both make those of the reference, and what they are made
       among is compared as well.
    3. A turned choice in a measure of rounding takes the widest gate, which a wrong adapter may
       pass: what needs it is compared with the choices of the reference, where those stay.

    Args:
        run: What is compared.
        rerun: Other ways to run it.
        feeds: The inputs, which `expected` was computed from.
        expected: The outputs of the reference.
        gates: See compare_fairly.
        own: See compare_fairly: the rounding of the reference.
        choose: Runs the reference for its choices.
        of: A word for the report.
    """
    shapes = shapes_of(feeds)
    try:
        outputs = run(feeds)
    except LoraFxError as e:
        raise LoraFxError(e.message, OTHER_SIZES, exit_code=e.exit_code) from e

    measured: dict[str, float] = {}

    def rounding() -> Iterator[Mapping[str, float]]:
        if rerun is None:
            yield from either(spread(outputs, run, None, feeds), own())
            return
        of_runtime = spread(outputs, run, rerun.plain(), feeds)
        of_runtime_and_model = either(of_runtime, own())
        for errors in either(of_runtime_and_model, _of_steps(outputs, rerun, feeds)):
            measured.update(errors)
            yield errors

    parity = compare_fairly(outputs, expected, shapes, gates, rounding, of=of)
    if rerun is None:
        return parity, ""
    if parity.ok and not _needs_most(outputs, expected, gates, measured):
        return parity, ""

    if not parity.ok and parity.rel <= REWRITES:
        plain = rerun.plain()
        if plain is not None:
            exact = compare_fairly(plain(feeds), expected, shapes, gates, own, of=of)
            if exact.ok:
                moved = (
                    f"ONNX Runtime's own graph optimisations change {parity.output!r} by "
                    f"{parity.rel:.1e}"
                )
                return exact, f"{moved} of its largest number; the comparison was made without them"

    choices = choose()
    choosing = rerun.choosing(choices) if choices.values else None
    if choosing is None:
        return parity, ""
    with_choices = _with_choices(choosing, choices, feeds, gates, of)
    if parity.ok:
        return with_choices, ""
    if not with_choices.ok:
        return parity, ""
    turned = (
        f"{parity.output!r} depends on a choice among nearly equal numbers, which rounding changes"
    )
    return (
        with_choices,
        (
            f"{turned}; both were compared with the same choices, and so were the numbers behind "
            "these choices"
        ),
    )


def _needs_most(
    outputs: Outputs, expected: Outputs, gates: Mapping[str, Gate], rounding: Mapping[str, float]
) -> bool:
    """Whether an output passes only with the widest gate that rounding can justify."""
    wider = wider_gates(gates, rounding)
    for name, gate in gates.items():
        is_widest = gate.first < gate.most <= wider[name]
        if is_widest and rel(outputs[name], expected[name]) > gate.first:
            return True
    return False


def _of_steps(outputs: Outputs, rerun: Rerun, feeds: Named) -> Iterator[Mapping[str, float]]:
    """Per output, how far a step of each sigmoid moves it: the largest so far, run by run."""
    largest_errors: dict[str, float] = {}
    for run in rerun.stepped():
        yield grow(largest_errors, run(feeds), outputs)


def _with_choices(
    run: Run, choices: Choices, feeds: Named, gates: Mapping[str, Gate], of: str
) -> Parity:
    """The comparison of a run with the reference's choices, and of the numbers behind them."""
    outputs = run(feeds)
    expected = {name: value for name, value in choices.outputs.items() if name in outputs}
    scores: set[str] = set()
    for floats in choices.among.values():
        scores.update(floats)
    masks = {
        name: fills(outputs[name], value) for name, value in expected.items() if name in scores
    }

    def shown(values: Outputs) -> dict[str, Array]:
        """The outputs that are compared, with 0 where scores have the number of a mask.

        A run on moved inputs may share more choices with the reference, and so more floats.
        """
        compared_values: dict[str, Array] = {}
        for name, value in values.items():
            if name in masks:
                value = without(value, masks[name])
            if name in expected:
                compared_values[name] = value
        return compared_values

    ours = shown(outputs)
    theirs = shown(expected)
    usual = gates_of(theirs)
    limits = {name: gates.get(name, usual[name]) for name in theirs}

    def rounding() -> Iterator[Mapping[str, float]]:
        moved = spread(ours, lambda feeds: shown(run(feeds)), None, feeds)
        return either(moved, choices.own(shown))

    return compare_fairly(ours, theirs, shapes_of(feeds), limits, rounding, of=of)


def nearby_feeds(feeds: Named, seed: int) -> dict[str, Array]:
    """Inputs with their floats moved at random by up to a unit of their last place."""
    rng = np.random.default_rng(seed)

    def moved(value: Array) -> Array:
        if "float" not in value.dtype.name:
            return value
        signs = rng.integers(0, 2, value.shape) * 2 - 1
        half = float(finfo(value.dtype.name).eps) / 2
        return (value.astype(np.float64) * (1 + signs * half)).astype(value.dtype)

    return {name: moved(value) for name, value in feeds.items()}


def either(
    first: Iterable[Mapping[str, float]], then: Iterable[Mapping[str, float]]
) -> Iterator[dict[str, float]]:
    """Two measures of rounding, one after the other: the larger of both for each output."""
    largest_errors: dict[str, float] = {}
    for measure in (first, then):
        for errors in measure:
            for name, error in errors.items():
                largest_errors[name] = max(error, largest_errors.get(name, 0.0))
            yield largest_errors
