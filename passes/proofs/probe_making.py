"""The making of a probe: an input that shows every adapter, and what the outputs are on it.

The proven file itself gives the outputs for its base and adapters; a file of one adapter leaves the
base to the reference. How far file and reference lie apart at this input, two implementations of
one model, is what the file may differ by elsewhere: MARGIN times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import is_plain
from lora_fx.compare import MASK, rel
from lora_fx.dtypes import Array, widened
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.passes.proofs.reference import Run
from lora_fx.probe.groups import MOST_GROUPS, groups_of
from lora_fx.probe.probe import (
    BASE,
    FULL,
    MOST_BYTES,
    MOST_POINTS,
    Probe,
    ProbedAdapter,
    ProbeInput,
    ProbeOutput,
)
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.text import JsonView, counted, some

WHOLE_TENSORS = "whole tensors"
"""The name of the group of what an adapter replaces: a head, a norm."""
ATTEMPTS = 3
"""The number of inputs that are tried: the first that shows every adapter is taken."""
MARGIN = 8.0
"""What another device may differ by, as a multiple of the difference of file and reference."""
TOLERANCES = {"float16": 16 * 2.0**-10, "bfloat16": 4 * 2.0**-7, "int8": 8 * 2.0**-8}
"""The least tolerance of a file that computes in another precision than float32.

Of float16 it is twice the gate of export: two devices may lie on both sides of what is exact.
"""
LEAST_TOLERANCE = 1e-5
"""The least tolerance in float32: what runtimes and devices differ by on small models."""
LARGEST_TOLERANCE = 0.25
"""The tolerance above which an output shows nothing."""
MOST_VALUES = 4096
"""The number of elements of an input above which it is not written out."""
MOST_RUNS = 24
"""The number of groups of all adapters together, where each takes a run of the model in torch."""
FEWEST_GROUPS = 3
FEWEST_POINTS = 8
MOST_LOOKED_AT = 1 << 20
"""The number of elements of an output among which points are chosen."""
CANDIDATES = 1024
"""The number of places of an output among which points are chosen."""
NARROWER = 8.0
"""How many times finer TF32, with 10 bits of fraction, is than bfloat16, with 7."""


@dataclass(frozen=True)
class Subject:
    """A proven file, as a probe is made of it.

    Attributes:
        mode: The mode of the file.
        run: A run of the file, by the name of the adapter; by BASE of its base, which a file of
            one adapter gives no run for.
        reference: A run of the model with an adapter's branches.
        vary: A run with an adapter that differs from one of the file's in its numbers alone; it is
            used before the next is asked for.
        is_slow: Whether that takes a run of the model in torch, so that groups are fewer.
        most_groups: The largest number of groups of an adapter.
        adapters: The adapters, by name.
        found: The targets, in the order of the model.
        feeds: Inputs of ours by a seed.
        user_feeds: Inputs that the user gave, for a model that does not run on others.
        base: The name of the base, and a hash by which it is told from others.
        files: The files of adapters beside the file, by name.
        base_file: The file with the tensors of the base, where A and B have no defaults.
        numbers: The ids of adapters in mode batch.
        precision: What the file computes in.
        narrow: Runs the model with bfloat16 products, where that can be done.
        narrows_adapters: Whether it is asked for the adapters too, and not for the base alone.
        written: The inputs whose numbers are written out, since drawn ones would mean nothing.
    """

    mode: str
    run: Callable[[str], Run | None]
    reference: Callable[[Adapter | None], Run]
    vary: Callable[[Adapter], Run]
    adapters: Mapping[str, Adapter]
    found: Found
    feeds: Callable[[int], Mapping[str, Array]]
    base: JsonView = field(default_factory=dict)
    user_feeds: Callable[[], Mapping[str, Array]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    base_file: str | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)
    precision: str = "float32"
    is_slow: bool = False
    most_groups: int = MOST_GROUPS
    narrow: Callable[[Adapter | None, Named], Named | None] | None = None
    narrows_adapters: bool = False
    written: Collection[str] = ()


@stage("making the probe")
def make_probe(subject: Subject, kind: str, facts: JsonView) -> tuple[Probe | None, list[str]]:
    """Make the probe of a proven file.

    Args:
        subject: The file.
        kind: full; or short, without groups.
        facts: What the probe says for people.

    Returns:
        The probe, and what has to be said; None, with the reason, where a file can have none.
    """
    if BASE in subject.adapters:
        return None, ["no probe: an adapter has no name"]
    best: _Draft | None = None
    failure = ""
    for seed in range(ATTEMPTS):
        try:
            draft = _Draft.of(subject, seed)
        except LoraFxError as e:
            failure = e.message
            continue
        if best is None or len(draft.unseen) < len(best.unseen):
            best = draft
        if not best.unseen:
            break
    if best is None:
        return None, [f"no probe: {failure}"]
    best.add_adapters(with_groups=kind == FULL)
    best.measure_precision()
    return within_size(best.probe(facts), best.notes())


def within_size(probe: Probe, notes: list[str]) -> tuple[Probe | None, list[str]]:
    """Return a probe of at most MOST_BYTES, and what it lacks therefore.

    The groups of the last adapters go first, then what is known of half and twice the strength,
    then every other point.
    """
    adapters = dict(probe.adapters)
    without_groups = []
    for name in reversed(list(adapters)):
        if replace(probe, adapters=adapters).size <= MOST_BYTES:
            break
        if adapters[name].groups:
            adapters[name] = replace(adapters[name], groups={})
            without_groups.append(name)
    smaller = replace(probe, adapters=adapters)
    lacks = []
    if without_groups:
        lacks.append(f"groups of {some(sorted(without_groups))}")
    if smaller.size > MOST_BYTES:
        unscaled = {
            name: replace(adapter, half=None, double=None) for name, adapter in adapters.items()
        }
        smaller = replace(smaller, adapters=unscaled)
        lacks.append("outputs at other strengths")
    while smaller.size > MOST_BYTES and len(smaller.points) > FEWEST_POINTS:
        smaller = smaller.with_every_other_point()
    if len(smaller.points) < len(probe.points):
        lacks.append(f"more than {len(smaller.points)} points")
    if smaller.size > MOST_BYTES:
        reason = f"it would have {smaller.size} bytes; at most {MOST_BYTES} are allowed"
        return None, [f"no probe: {reason}"]
    if lacks:
        listed = " and no ".join(lacks)
        notes = [*notes, f"the probe has no {listed}: {MOST_BYTES} bytes hold no more"]
    return smaller, notes


@dataclass(eq=False)
class _Draft:
    """A probe in the making, for one input.

    Attributes:
        subject: The file.
        inputs: The input.
        outputs: The outputs of floats that are compared, by name.
        points: Places of these outputs.
        base: The outputs of the base at the points.
        answers: Those with each adapter, by its name.
        adapters: What is known of each adapter.
        unseen: What the input does not show: adapters, and groups of targets.
        precisions: How far outputs move in another precision.
        notes_on_input: What has to be said about the input.
    """

    subject: Subject
    inputs: Mapping[str, ProbeInput]
    outputs: dict[str, ProbeOutput]
    points: Sequence[tuple[str, int]]
    base: Array
    answers: Mapping[str, Array]
    adapters: dict[str, ProbedAdapter] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    precisions: dict[str, float] = field(default_factory=dict)
    notes_on_input: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, subject: Subject, seed: int) -> _Draft:
        """Run the base and every adapter on the input of a seed, and choose points.

        Raises:
            LoraFxError: An input that a probe cannot hold, or no output that can be compared.
        """
        inputs, notes = _inputs(subject, seed)
        feeds = {name: value.array() for name, value in inputs.items()}
        of_reference = subject.reference(None)(feeds)
        run = subject.run(BASE)
        base = of_reference if run is None else run(feeds)
        differences = _differences(base, of_reference)
        thinned_base = _thinned(base)
        largest_of = _largest_of(base)
        thinned: dict[str, Named] = {}
        for name, adapter in subject.adapters.items():
            run = subject.run(name)
            assert run is not None  # every adapter is in the file
            outputs_with_adapter = run(feeds)
            thinned[name] = _thinned(outputs_with_adapter)
            for output, largest in _largest_of(outputs_with_adapter).items():
                largest_of[output] = max(largest_of.get(output, 0.0), largest)
            if len(thinned) == 1:  # the base and one adapter tell how outputs round
                with_branches = subject.reference(adapter)(feeds)
                for output, difference in _differences(outputs_with_adapter, with_branches).items():
                    differences[output] = max(differences.get(output, 0.0), difference)

        outputs = _compared_outputs(base, largest_of, differences, subject.precision)
        points = _points(outputs, thinned_base, thinned)
        if not points:
            raise LoraFxError(
                "no output of floats is the same, and finite, in the file and in the model",
                "report this model",
            )
        answers = {
            name: _of_thinned(with_adapter, outputs, points)
            for name, with_adapter in thinned.items()
        }
        draft = cls(
            subject, inputs, outputs, points, _of_thinned(thinned_base, outputs, points), answers
        )
        draft.notes_on_input += notes
        for name in answers:
            if not draft.shows(name):
                draft.unseen.append(name)
        return draft

    def feeds(self) -> dict[str, Array]:
        return {name: value.array() for name, value in self.inputs.items()}

    def add_adapters(self, *, with_groups: bool) -> None:
        """Run every adapter with half and twice its strength, and without each group."""
        feeds = self.feeds()
        for name, adapter in self.subject.adapters.items():
            known = ProbedAdapter(
                self.answers[name], self.subject.numbers.get(name), self.subject.files.get(name)
            )
            plain = {key: low for key, low in adapter.lowrank.items() if is_plain(low)}
            if len(plain) == len(adapter.entries):
                half = self._varied(adapter, dict.fromkeys(plain, 0.5), feeds)
                double = self._varied(adapter, dict.fromkeys(plain, 2.0), feeds)
                known = replace(known, half=half, double=double)
            groups = self._groups(adapter, plain, feeds) if with_groups else {}
            self.adapters[name] = self._finite(replace(known, groups=groups))
            if name not in self.unseen:
                self._note_unseen_groups(name)

    def _groups(
        self, adapter: Adapter, plain: Mapping[str, LowRank], feeds: Named
    ) -> dict[str, Array]:
        """Return the outputs without each group of targets; none where there is one group."""
        order = {key: i for i, key in enumerate(self.subject.found)}
        keys = sorted(plain, key=lambda key: order.get(key, len(order)))
        targets = [target for key in keys if (target := self.subject.found.get(key)) is not None]
        most = self._most_groups() - bool(adapter.full)
        groups = groups_of(targets, max(FEWEST_GROUPS, most))
        if adapter.full:
            groups[WHOLE_TENSORS] = [*adapter.full]
        if len(groups) < 2:
            return {}
        outputs: dict[str, Array] = {}
        for name, keys_of_group in groups.items():
            outputs[name] = self._varied(adapter, dict.fromkeys(keys_of_group, 0.0), feeds)
        return outputs

    def _varied(self, adapter: Adapter, factors: Mapping[str, float], feeds: Named) -> Array:
        """Return the outputs with the changes of some keys multiplied."""
        run = self.subject.vary(multiplied(adapter, factors))
        return self._at_points(run(feeds))

    def _most_groups(self) -> int:
        """Return the largest number of groups of an adapter."""
        most = self.subject.most_groups
        if not self.subject.is_slow:
            return most
        return max(FEWEST_GROUPS, min(most, MOST_RUNS // len(self.subject.adapters)))

    def _finite(self, adapter: ProbedAdapter) -> ProbedAdapter:
        """Return what is known of an adapter without what is not finite."""
        groups = {name: values for name, values in adapter.groups.items() if _is_finite(values)}
        adapter = replace(adapter, groups=groups)
        for values in (adapter.half, adapter.double):
            if values is not None and not _is_finite(values):
                return replace(adapter, half=None, double=None)
        return adapter

    def shows(self, name: str) -> bool:
        """Whether an adapter changes a point by more than outputs round by."""
        gauge = self.probe({}).gauge()
        return gauge.apart(self.answers[name], self.base, gauge.largest_tolerance)

    def _note_unseen_groups(self, name: str) -> None:
        """Note the groups of an adapter that this input does not show."""
        adapter = self.adapters[name]
        gauge = self.probe({}).gauge()
        for group, values in adapter.groups.items():
            if gauge.excess(values, adapter.values) <= 2:
                self.unseen.append(f"{name}: {group}")

    def measure_precision(self) -> None:
        """Measure how far bfloat16 moves the base, and where it is asked for the adapters."""
        if self.subject.narrow is None or self.subject.precision != "float32":
            return
        feeds = self.feeds()
        outputs: list[tuple[Adapter | None, Array]] = [(None, self.base)]
        if self.subject.narrows_adapters:
            for name, adapter in self.subject.adapters.items():
                outputs.append((adapter, self.answers[name]))
        gauge = self.probe({}).gauge()
        moved = 0.0
        for narrowed, exact in outputs:
            narrow = self.subject.narrow(narrowed, feeds)
            if narrow is None:
                return
            moved = max(moved, gauge.distance(self._at_points(narrow), exact))
        if np.isfinite(moved) and moved > 0:
            self.precisions = {"tf32": 2 * moved / NARROWER, "bfloat16": 2 * moved}

    def probe(self, facts: JsonView) -> Probe:
        """Return the probe as far as it is known."""
        precisions = {name: float(f"{level:.4g}") for name, level in self.precisions.items()}
        return Probe(
            self.subject.mode,
            self.inputs,
            self.outputs,
            self.points,
            self.base,
            self.adapters,
            precisions,
            facts,
            base_file=self.subject.base_file,
        )

    def notes(self) -> list[str]:
        """Return a line on what the probe does not show."""
        if not self.unseen:
            return self.notes_on_input
        count = counted(len(self.unseen), "part")
        return [
            *self.notes_on_input,
            f"the probe does not show {count} of the adapters, whose effect on its input is too "
            f"small: {some(self.unseen)}",
        ]

    def _at_points(self, outputs: Named) -> Array:
        numbers = [outputs[name].reshape(-1)[index] for name, index in self.points]
        return np.array(numbers, np.float64)


def _inputs(subject: Subject, seed: int) -> tuple[dict[str, ProbeInput], list[str]]:
    """Return an input on which the model runs, and a note where it is the user's.

    The first on which it runs: with floats that are drawn, or written out, or the user's own.

    Raises:
        LoraFxError: Inputs that a probe cannot hold, or on which the model does not run.
    """
    arrays = subject.feeds(seed)
    drawn_inputs: dict[str, ProbeInput] = {}
    for name, array in arrays.items():
        if is_whole_dtype(array) or name in subject.written:
            drawn_inputs[name] = _written_out(name, array)
        else:
            drawn_inputs[name] = _drawn(array, seed + 1)
    if _runs(subject, drawn_inputs):
        return drawn_inputs, []
    # numbers that depend on each other, or that have to be in a range
    written_out = {name: _written_out(name, array) for name, array in arrays.items()}
    if _runs(subject, written_out):
        return written_out, []
    if subject.user_feeds is not None:
        given = {name: _written_out(name, array) for name, array in subject.user_feeds().items()}
        if _runs(subject, given):
            return given, [
                "the probe holds the inputs that were given: no drawn ones fit the model"
            ]
    raise LoraFxError("the model does not run on an input that was drawn", "pass --inputs")


def _runs(subject: Subject, inputs: Mapping[str, ProbeInput]) -> bool:
    """Whether the model gives finite numbers for an input."""
    feeds = {name: value.array() for name, value in inputs.items()}
    try:
        outputs = subject.reference(None)(feeds)
    except (LoraFxError, RuntimeError, ValueError, IndexError, TypeError):
        return False
    floats = [value for value in outputs.values() if not is_whole_dtype(value)]
    return not floats or any(np.isfinite(widened(value)).any() for value in floats)


def is_whole_dtype(array: Array) -> bool:
    """Whether an array is of integers or booleans."""
    return array.dtype.kind in "iub"


def _drawn(array: Array, seed: int) -> ProbeInput:
    """Return a drawn input of a shape and dtype."""
    if "float" not in array.dtype.name:
        raise LoraFxError(f"an input is {array.dtype.name}, which no probe holds", "leave it")
    return ProbeInput(array.dtype.name, array.shape, seed=seed)


def _written_out(name: str, array: Array) -> ProbeInput:
    """Return an input whose elements are written out, or all the same.

    Raises:
        LoraFxError: Too many elements, or a dtype that JSON has no numbers for.
    """
    dtype = array.dtype.name
    if not is_whole_dtype(array) and not np.isfinite(widened(array)).all():
        raise LoraFxError(f"input {name!r} has numbers that are not finite", "leave it")
    if array.size and (array == array.reshape(-1)[0]).all():
        number = array.reshape(-1)[0].item()
        return ProbeInput(dtype, array.shape, fill=int(number) if dtype == "bool" else number)
    if not is_whole_dtype(array) and "float" not in dtype:
        raise LoraFxError(f"input {name!r} is {dtype}, which no probe holds", "leave it")
    if array.size > MOST_VALUES:
        raise LoraFxError(
            f"input {name!r} has {array.size} elements; at most {MOST_VALUES} are written out",
            "leave it",
        )
    numbers = array.reshape(-1)
    if is_whole_dtype(array):
        return ProbeInput(dtype, array.shape, values=tuple(int(value) for value in numbers))
    return ProbeInput(dtype, array.shape, values=tuple(float(value) for value in numbers))


def _differences(of_file: Named, of_model: Named) -> dict[str, float]:
    """Return how far the outputs of a file and of its model lie apart."""
    return {name: rel(value, of_model[name]) for name, value in of_file.items()}


def _compared_outputs(
    base: Named, largest_of: Mapping[str, float], differences: Mapping[str, float], precision: str
) -> dict[str, ProbeOutput]:
    """Return the outputs of floats that file and model agree on, with their tolerances.

    Args:
        base: The outputs of the base.
        largest_of: The largest magnitude of each, over the base and all adapters.
        differences: How far file and model lie apart.
        precision: What the file computes in.
    """
    least = TOLERANCES.get(precision, LEAST_TOLERANCE)
    outputs: dict[str, ProbeOutput] = {}
    for name, value in base.items():
        is_part = name.endswith("]")  # of a sequence, which other languages have no name for
        if is_part or "float" not in value.dtype.name or not value.size:
            continue
        largest = largest_of[name]
        tolerance = least
        if precision not in TOLERANCES:
            tolerance = max(least, MARGIN * differences[name])
        if largest > 0 and tolerance <= LARGEST_TOLERANCE:
            rounded = float(f"{tolerance:.3g}")
            outputs[name] = ProbeOutput(value.shape, float(f"{largest:.9g}"), rounded)
    return outputs


def _step(size: int) -> int:
    """Return the step at which the elements of an output are looked at."""
    return -(-size // MOST_LOOKED_AT)


def _thinned(outputs: Named) -> dict[str, Array]:
    """Return every so many-th element of each output: those of an image model are many."""
    return {
        name: value.reshape(-1)[:: _step(value.size)].copy()
        for name, value in outputs.items()
        if value.size
    }


def _of_thinned(
    thinned: Named, outputs: Mapping[str, ProbeOutput], points: Sequence[tuple[str, int]]
) -> Array:
    """Return the numbers at points of thinned outputs."""
    numbers = []
    for name, index in points:
        step = _step(math.prod(outputs[name].shape))
        numbers.append(thinned[name][index // step])
    return np.array(numbers, np.float64)


def _largest_of(outputs: Named) -> dict[str, float]:
    """Return the largest magnitude of each output of floats."""
    return {name: _largest(value) for name, value in outputs.items() if "float" in value.dtype.name}


def _largest(value: Array) -> float:
    """Return the largest finite magnitude; without those of a mask, where there are others."""
    sizes = np.abs(widened(value))
    sizes = sizes[np.isfinite(sizes)]
    unmasked = sizes[sizes < MASK]
    if unmasked.size:
        sizes = unmasked
    return float(sizes.max(initial=0.0))


def _points(
    outputs: Mapping[str, ProbeOutput], base: Named, answers: Mapping[str, Named]
) -> list[tuple[str, int]]:
    """Choose places of the outputs: those that each adapter changes most, in turn.

    Without adapters, and where they change fewer places, places all over the outputs follow. All
    are finite in every run, and no numbers of masks.

    Args:
        outputs: The outputs that are compared.
        base: The thinned outputs of the base.
        answers: Those with each adapter.
    """
    finite = {}
    for name in outputs:
        finite[name] = _is_compared(base[name])
        for with_adapter in answers.values():
            finite[name] &= _is_compared(with_adapter[name])
    rankings = [
        _changed_most(outputs, base, with_adapter, finite) for with_adapter in answers.values()
    ]
    chosen: dict[tuple[str, int], None] = {}
    for place in _in_turn([*rankings, _everywhere(outputs, finite)]):
        chosen.setdefault(place)
        if len(chosen) == MOST_POINTS:
            break
    return list(chosen)


def _is_compared(value: Array) -> Array:
    """Return where an output is finite, and is no number of a mask beside smaller ones."""
    numbers = widened(value)
    finite = np.isfinite(numbers)
    unmasked = finite & (np.abs(numbers) < MASK)
    return unmasked if unmasked.any() else finite


def _in_turn(
    rankings: Sequence[Sequence[tuple[str, int]]],
) -> Iterator[tuple[str, int]]:
    """Yield the first of every ranking, then the second of each, and so on; the last comes last."""
    *of_adapters, everywhere = rankings
    longest = max((len(ranking) for ranking in of_adapters), default=0)
    for i in range(longest):
        for ranking in of_adapters:
            if i < len(ranking):
                yield ranking[i]
    yield from everywhere


def _changed_most(
    outputs: Mapping[str, ProbeOutput], base: Named, with_adapter: Named, finite: Named
) -> list[tuple[str, int]]:
    """Return the places that an adapter changes, most first, as a share of the output's largest."""
    changes: list[tuple[float, str, int]] = []
    for name, output in outputs.items():
        before = np.where(finite[name], widened(base[name]), 0)
        after = np.where(finite[name], widened(with_adapter[name]), 0)
        change = np.abs(after - before)
        count = min(CANDIDATES, change.size)
        step = _step(math.prod(output.shape))
        for i in np.argpartition(change, -count)[-count:]:
            if change[i]:
                changes.append((float(change[i] / output.largest), name, int(i) * step))
    changes.sort(key=lambda place: (-place[0], place[1], place[2]))
    return [(name, index) for _, name, index in changes]


def _everywhere(outputs: Mapping[str, ProbeOutput], finite: Named) -> list[tuple[str, int]]:
    """Return places that lie evenly in the outputs, among those that are finite."""
    places = []
    for name, output in outputs.items():
        candidates = np.flatnonzero(finite[name])
        step = _step(math.prod(output.shape))
        count = min(MOST_POINTS, candidates.size)
        for i in np.linspace(0, max(0, candidates.size - 1), count).astype(int):
            places.append((name, int(candidates[i]) * step))
    return places


def multiplied(adapter: Adapter, factors: Mapping[str, float]) -> Adapter:
    """Return an adapter with the changes of some keys multiplied; its shapes and scales stay.

    A whole tensor is left out, for which the factor is 0.
    """
    entries = dict(adapter.entries)
    for key, factor in factors.items():
        update = entries[key]
        if isinstance(update, Full):
            assert factor == 0  # it is no change that could be multiplied
            del entries[key]
            continue
        assert isinstance(update, LowRank)  # groups and plain updates are low-rank
        if update.variant_tensors:  # of which its variant would make another b
            alpha = update.scale * update.rank
            update = replace(update, variant="lora", alpha=alpha, variant_tensors={})
        entries[key] = replace(update, b=update.b * np.float32(factor))
    return replace(adapter, entries=entries)


def _is_finite(values: Array) -> bool:
    return bool(np.isfinite(values).all())
