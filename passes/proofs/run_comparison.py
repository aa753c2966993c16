"""The comparison of one run with what it has to give."""

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
    worst: dict[str, float] = {}
    if plain is not None:
        yield grow(worst, plain(feeds), outputs)
    if not any("float" in value.dtype.name for value in feeds.values()):
        return
    for seed in SEEDS:
        moved = nearby_feeds(feeds, seed)
        for other in (run, plain) if plain is not None else (run,):
            yield grow(worst, other(moved), outputs)


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
    """The comparison of a run with what it has to give, and what has to be said of it.

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
    measured: dict[str, float] = {}

    def rounding() -> Iterator[Mapping[str, float]]:
        if rerun is None:
            yield from either(spread(made, run, None, feeds), own())
            return
        runtime = spread(made, run, rerun.plain(), feeds)
        for errors in either(either(runtime, own()), _of_steps(made, rerun, feeds)):
            measured.update(errors)
            yield errors

    try:
        made = run(feeds)
    except LoraFxError as e:
        raise LoraFxError(e.message, OTHER_SIZES, exit_code=e.exit_code) from e
    found = compare_fairly(made, expected, shapes, gates, rounding, of=of)
    if rerun is None or (found.ok and not _needs_most(made, expected, gates, measured)):
        return found, ""
    plain = rerun.plain() if found.rel <= REWRITES and not found.ok else None
    if plain is not None:
        exact = compare_fairly(plain(feeds), expected, shapes, gates, own, of=of)
        if exact.ok:
            moved = f"ONNX Runtime's own rewrites move {found.output!r} by {found.rel:.1e}"
            return exact, f"{moved} of its largest number; it was compared without them"
    choices = choose()
    choosing = rerun.choosing(choices) if choices.values else None
    if choosing is None:
        return found, ""
    alike = _with_choices(choosing, choices, feeds, gates, of)
    if found.ok:
        return alike, ""
    if not alike.ok:
        return found, ""
    told = f"rounding turns a choice among near-equal numbers that {found.output!r} depends on"
    return alike, f"{told}; both were compared with the same choices, and what these are among"


def _needs_most(
    ours: Outputs, expected: Outputs, gates: Mapping[str, Gate], rounding: Mapping[str, float]
) -> bool:
    """Whether an output passes by nothing but the widest gate that rounding can ask for."""
    wider = wider_gates(gates, rounding)
    widest = {n for n, gate in gates.items() if gate.first < gate.most <= wider[n]}
    return any(rel(ours[n], expected[n]) > gates[n].first for n in widest)


def _of_steps(outputs: Outputs, rerun: Rerun, feeds: Named) -> Iterator[Mapping[str, float]]:
    """Per output, how far a step of each sigmoid moves it: the largest so far, run by run."""
    worst: dict[str, float] = {}
    for run in rerun.stepped():
        yield grow(worst, run(feeds), outputs)


def _with_choices(
    run: Run, choices: Choices, feeds: Named, gates: Mapping[str, Gate], of: str
) -> Parity:
    """The comparison of a run that makes the reference's choices, and of what they are among."""
    made = run(feeds)
    expected = {n: v for n, v in choices.outputs.items() if n in made}
    scores = {n for floats in choices.among.values() for n in floats}
    masked = {n: fills(made[n], v) for n, v in expected.items() if n in scores}

    def shown(outputs: Outputs) -> dict[str, Array]:
        """What is compared of outputs, with 0 where scores have the number of a mask.

        A run on moved inputs may share more choices with the reference, and so more floats.
        """
        compared = {n: v for n, v in outputs.items() if n in expected}
        return {n: without(v, masked[n]) if n in masked else v for n, v in compared.items()}

    ours, theirs = shown(made), shown(expected)
    usual = gates_of(theirs)
    limits = {n: gates.get(n, usual[n]) for n in theirs}

    def rounding() -> Iterator[Mapping[str, float]]:
        moved = spread(ours, lambda feeds: shown(run(feeds)), None, feeds)
        return either(moved, choices.own(shown))

    return compare_fairly(ours, theirs, shapes_of(feeds), limits, rounding, of=of)


def nearby_feeds(feeds: Named, seed: int) -> dict[str, Array]:
    """Inputs with their floats moved by up to a unit of their last place, by lot."""
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
    """What two measures of rounding tell, one after the other: the larger of both."""
    told: dict[str, float] = {}
    for measure in (first, then):
        for errors in measure:
            told |= {n: max(e, told.get(n, 0.0)) for n, e in errors.items()}
            yield told
