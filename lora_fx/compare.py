"""The comparison of two runs' outputs, with gates for the allowed difference.

rel(a, b) = max|a − b| / max|b| per output; NaN, Inf on one side or max|b| = 0 is a failure.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_fx.dtypes import Array, finfo, widened
from lora_fx.errors import LoraFxError, NoEffectError, visible
from lora_fx.text import Json, JsonView, html, short, strict_json

Outputs = Mapping[str, Array]
"""The outputs of a run by name."""
Sizes = Mapping[str, tuple[int, ...]]
"""The shapes of inputs by name."""
FOLD_TOL = 1e-6
"""The gate for fold against insert: fp32, tiny models."""
ORT_TOL = 2e-6
"""The gate for ONNX Runtime against torch: fp32, tiny models."""
CEILING = 1e-3
"""The widest gate for fp32: a larger difference is never only rounding."""
STEPS = 8 * 2.0**-7
"""The gate for activations that become 8-bit codes: eight steps of such a code."""
COARSE = 4 * STEPS
"""The widest gate for such activations, because rounding moves codes by whole steps."""
MASK = 1e4
"""The least magnitude of a mask's number; it must also exceed all differing numbers by as much."""
SIGMOID_STEP = 2.0**-24
"""The absolute error of ONNX Runtime's sigmoid, for small results too."""
SMALLEST = 16 * SIGMOID_STEP
"""The largest allowed difference for an output with only tiny numbers."""
EPSILON = {name: float(finfo(name).eps) for name in ("float16", "bfloat16")}
"""The epsilons of the dtypes in which outputs or adapted weights are rounded."""


_OF_BLOCK = re.compile(r"(present|past_key_values|(\w+_)?(hidden_states|attentions))\.\d+(\.|$)")
"""The pattern of outputs that each block of a stack gives, by their transformers names."""


def rel(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return max|a − b| / max|b| without mask values; infinite if the comparison fails.

    >>> rel([1.0, 2.0], [1.0, 4.0])
    0.5
    >>> rel([-1e9, 2.0], [-1e9, 4.0])
    0.5
    """
    ours = np.asarray(a)
    reference = np.asarray(b)
    is_exact = not np.issubdtype(reference.dtype, np.inexact)
    if ours.shape != reference.shape:
        return math.inf
    if ours.size == 0:
        return 0.0

    gap = 0.0
    largest_differing = 0.0
    for ours_part, reference_part in _parts(ours, reference):
        finite = np.isfinite(reference_part)
        if not (np.isfinite(ours_part) == finite).all():
            return math.inf
        if not (ours_part[~finite] == reference_part[~finite]).all():  # NaN equals nothing
            return math.inf
        differs = finite & (ours_part != reference_part)
        ours_part = ours_part[differs]
        reference_part = reference_part[differs]
        gap = max(gap, float(np.abs(ours_part - reference_part).max(initial=0.0)))
        largest_differing = max(largest_differing, largest(reference_part))

    top = _largest_but_masks(ours, reference, largest_differing)
    if top > 0.0:
        return gap / top
    if gap == 0.0 and is_exact:
        return 0.0
    return math.inf


def _largest_but_masks(ours: Array, reference: Array, largest_differing: float) -> float:
    """Return the largest finite magnitude in a reference, without the fill values of masks.

    That of a mask, -1e9, is the same in both, and nothing is seen beside it.

    Args:
        ours: What is compared with it.
        reference: The reference.
        largest_differing: The largest number of the reference that is another in `ours`.
    """
    top = 0.0
    for ours_part, reference_part in _parts(ours, reference):
        sizes = np.abs(reference_part)
        counts = np.isfinite(reference_part)
        if largest_differing:
            differs = ours_part != reference_part
            counts &= differs | (sizes < MASK) | (sizes <= MASK * largest_differing)
        top = max(top, float(sizes[counts].max(initial=0.0)))
    return top


NUMBERS_AT_ONCE = 1 << 18
"""Numbers of an output that are in memory in fp64 at a time: logits are many."""


def _parts(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield consecutive parts of arrays that have one shape, in fp64."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, NUMBERS_AT_ONCE):
        yield tuple(widened(array[start : start + NUMBERS_AT_ONCE]) for array in flat)


BOXES_AT_ONCE = 256
"""The number of boxes whose overlaps with all kept boxes are in memory at a time."""
FILL = 100.0
"""The ratio by which a mask's fill value, such as -1e9, exceeds all compared values."""


def fills(ours: Array, theirs: Array) -> Array:
    """Return where both arrays have the fill value of a mask.

    The fill value is the same in both, and far larger than all values that differ.
    """
    if ours.shape != theirs.shape:
        return np.zeros(theirs.shape, bool)
    differ = ours != theirs
    top = largest(theirs[differ])
    return np.asarray(~differ & differ.any() & (np.abs(widened(theirs)) > FILL * top))


def without(values: Array, places: Array) -> Array:
    """Return values with 0 at some places, if the shapes are the same."""
    if values.shape != places.shape or not places.any():
        return values
    return np.where(places, values.dtype.type(0), values)


def tied(
    ours: Array,
    theirs: Array,
    among: Sequence[Array],
    tol: float = CEILING,
    top: float | None = None,
) -> bool:
    """Whether two choices are equal, or differ only among numbers that are close together.

    Args:
        ours: Indices, or the booleans of a comparison.
        theirs: Those of the reference.
        among: The numbers of the reference that were chosen from, or compared.
        tol: How near, beside the largest of them.
        top: The largest of them that is no number of a mask, where that is known.

    >>> tied(np.array([1]), np.array([0]), [np.array([[2.0, 2.0, 1.0]])])
    True
    """
    if not among:
        return False
    if np.array_equal(ours, theirs) or _suppressed_alike(ours, theirs, among, tol):
        return True
    if ours.shape != theirs.shape:
        return False
    values = among[0].astype(np.float64)
    near = 2 * tol * (largest(values) if top is None else top)
    if theirs.dtype == np.bool_:
        return _compared_alike(ours, theirs, among, near)
    if any(_picked_alike(ours, theirs, values, axis, near) for axis in range(values.ndim)):
        return True
    return values.shape == theirs.shape and _in_next_class(ours, theirs, values, near)


def _compared_alike(ours: Array, theirs: Array, among: Sequence[Array], near: float) -> bool:
    """Whether booleans of a comparison differ only where the compared numbers are close."""
    values = among[0].astype(np.float64)
    if len(among) == 1:
        if values.shape != theirs.shape:
            return False
        # beside a constant, which is not known, all that turned lies near it
        return bool(np.ptp(values[ours != theirs]) <= near)
    other_side = among[1].astype(np.float64)
    if np.broadcast_shapes(values.shape, other_side.shape) != theirs.shape:
        return False
    turned = (values - other_side)[ours != theirs]
    return bool(np.abs(turned).max() <= near)


def _picked_alike(ours: Array, theirs: Array, values: Array, axis: int, near: float) -> bool:
    """Whether indices along one axis, kept or reduced, select values that are close."""
    for reduced in (False, True):
        with contextlib.suppress(ValueError, IndexError):  # indices of another axis
            our_indices = np.expand_dims(ours, axis) if reduced else ours
            their_indices = np.expand_dims(theirs, axis) if reduced else theirs
            ours_picked = np.take_along_axis(values, our_indices, axis)
            theirs_picked = np.take_along_axis(values, their_indices, axis)
            gaps = np.where(ours_picked == theirs_picked, 0.0, ours_picked - theirs_picked)
            if np.abs(gaps).max() <= near:
                return True
    return False


def _suppressed_alike(ours: Array, theirs: Array, among: Sequence[Array], tol: float) -> bool:
    """Whether both are valid results of non-maximum suppression, up to close scores.

    How many are kept may differ: of two boxes that overlap the first suppresses the other, and what
    that one would have suppressed stays. Both have the order of the scores, and there is an overlap
    from which on boxes are suppressed in both; it is not known.
    """
    boxes = next((values for values in among if values.ndim == 2 and values.shape[1] == 4), None)
    scores = next((values for values in among if values.ndim == 1), None)
    are_indices = all(picks.ndim == 1 and picks.dtype.kind == "i" for picks in (ours, theirs))
    if boxes is None or scores is None or len(boxes) != len(scores) or not are_indices:
        return False
    near = 2 * tol * largest(scores)
    our_largest, our_least = _bounds_of_overlaps(boxes, scores, ours, near)
    their_largest, their_least = _bounds_of_overlaps(boxes, scores, theirs, near)
    return max(our_largest, their_largest) <= min(our_least, their_least) + CEILING


def _bounds_of_overlaps(
    boxes: Array, scores: Array, picks: Array, near: float
) -> tuple[float, float]:
    """Return the largest overlap of kept boxes, and the least that explains a suppressed one.

    No overlap is between them where the boxes are not in the order of their scores, or are none.

    Args:
        boxes: [n, 4], two corners.
        scores: [n].
        picks: The indices of the boxes that are kept.
        near: By how much scores may be in the wrong order.
    """
    are_boxes = ((picks >= 0) & (picks < len(boxes))).all()
    if not are_boxes or len(np.unique(picks)) != len(picks):
        return math.inf, -math.inf
    picked_scores = scores[picks].astype(np.float64)
    if (np.diff(picked_scores) > near).any():
        return math.inf, -math.inf

    largest_of_kept = 0.0
    least_suppressing = 1.0
    boxes = boxes.astype(np.float64)
    for start in range(0, len(boxes), BOXES_AT_ONCE):
        indices = np.arange(start, min(start + BOXES_AT_ONCE, len(boxes)))
        overlaps = _overlaps(boxes[indices], boxes[picks])
        overlaps[indices[:, None] == picks] = 0.0
        is_kept = np.isin(indices, picks)
        largest_of_kept = max(largest_of_kept, float(overlaps[is_kept].max(initial=0.0)))

        comes_earlier = picked_scores >= scores[indices, None].astype(np.float64) - near
        suppressing = np.where(comes_earlier, overlaps, 0.0).max(axis=1, initial=0.0)
        least_suppressing = min(least_suppressing, float(suppressing[~is_kept].min(initial=1.0)))
    return largest_of_kept, least_suppressing


def _overlaps(boxes: Array, others: Array) -> Array:
    """Return the intersection over union of every box with each of the others."""
    lower = np.maximum(boxes[:, None, :2], others[:, :2])
    upper = np.minimum(boxes[:, None, 2:], others[:, 2:])
    intersection = (upper - lower).clip(0).prod(-1)
    union = _areas(boxes)[:, None] + _areas(others) - intersection
    zeros = np.zeros_like(intersection)
    shares: Array = np.divide(intersection, union, out=zeros, where=union > 0)
    return shares


def _areas(boxes: Array) -> Array:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(-1))


def _in_next_class(ours: Array, theirs: Array, values: Array, near: float) -> bool:
    """Whether numbers changed their class only to the next one, and close to its border.

    Classes are codes or buckets, which grow with the number. Their borders are not known: all that
    crossed one lies near it.
    """
    by_value = theirs[np.unravel_index(np.argsort(values, axis=None), values.shape)]
    if (np.diff(by_value) < 0).any():
        return False
    turned = ours != theirs
    lower = np.minimum(ours, theirs)[turned]
    if (np.maximum(ours, theirs)[turned] - lower != 1).any():
        return False
    crossed = values[turned]
    return all(np.ptp(crossed[lower == border]) <= near for border in np.unique(lower))


@dataclass(frozen=True)
class Choice:
    """Integers or booleans that a run chose, and the floats by name that it chose among.

    A choice of another run is the same choice if its floats are equal up to rounding, and if the
    chosen values differ only among numbers that are equal up to that rounding. Floats that are
    constants in one run may be missing there.
    """

    value: Array
    among: Outputs

    def apart(self, other: Choice) -> float:
        """Return the difference of two choices' floats; infinite if they are different choices."""
        if self.lists_boxes or other.lists_boxes:
            return self.boxes_alone().apart(other.boxes_alone())
        if self.value.ndim != other.value.ndim or not self.among or not other.among:
            return math.inf
        if (self.value.dtype == np.bool_) != (other.value.dtype == np.bool_):
            return math.inf
        fewer, more = sorted((self.among, other.among), key=len)
        distance = 0.0
        for values in fewer.values():
            nearest_distance = min(_distance(values, candidate) for candidate in more.values())
            distance = max(distance, nearest_distance)
        if distance > max(_most(values) for values in fewer.values()):
            return math.inf

        among = list(other.among.values())
        nearest = min(self.among.values(), key=partial(_distance, theirs=among[0]))
        top = largest(without(among[0], fills(nearest, among[0])))
        if tied(self.value, other.value, among, max(distance, FOLD_TOL), top):
            return distance
        return math.inf

    @property
    def lists_boxes(self) -> bool:
        """Whether this is ONNX's list of kept boxes, for one image and class.

        The list is [kept, 3] (image, class, box), for boxes [1, n, 4] and scores [1, 1, n].
        """
        shapes = [values.shape for values in self.among.values()]
        if self.value.ndim != 2 or self.value.shape[1] != 3 or len(shapes) != 2:
            return False
        boxes, scores = shapes
        return boxes == (1, scores[-1], 4) and scores[:-1] == (1, 1)

    def boxes_alone(self) -> Choice:
        """Return the choice in torch's form: [kept], of boxes [n, 4] and scores [n]."""
        if not self.lists_boxes:
            return self
        boxes, scores = self.among
        floats = {boxes: self.among[boxes][0], scores: self.among[scores][0, 0]}
        return Choice(self.value[:, 2], floats)

    def pairs(self, other: Choice) -> dict[str, str]:
        """Return a float of the other choice → the nearest equal float of this choice."""
        if self.lists_boxes or other.lists_boxes:
            return self.boxes_alone().pairs(other.boxes_alone())
        nearest_of = {}
        for name, values in other.among.items():
            distances = {ours: _distance(floats, values) for ours, floats in self.among.items()}
            nearest = min(distances, key=distances.__getitem__)
            if distances[nearest] <= _most(values):
                nearest_of[name] = nearest
        return nearest_of


def nearest_choice(choice: Choice, others: Mapping[str, Choice]) -> str:
    """Return the name of the same choice in another run, or an empty text.

    Of several among the same floats, such as two thresholds, it is that with the fewest turned.
    """
    nearest = ""
    least: tuple[float, float] = (math.inf, 0)
    for name, other in others.items():
        distance = choice.apart(other)
        if distance > least[0] or math.isinf(distance):
            continue
        turned = math.inf
        if choice.value.shape == other.value.shape:
            turned = int((choice.value != other.value).sum())
        if (distance, turned) < least:
            least = (distance, turned)
            nearest = name
    return nearest


def _most(value: Array) -> float:
    """Return the most by which rounding changes an array of this dtype."""
    return max(CEILING, 32 * EPSILON.get(value.dtype.name, 0.0))


def _distance(ours: Array, theirs: Array) -> float:
    """Return `rel` without mask values; 0 for equal arrays."""
    if np.array_equal(ours, theirs):
        return 0.0
    masked = fills(ours, theirs)
    return rel(without(ours, masked), without(theirs, masked))


class Gate(NamedTuple):
    """The allowed differences of one output.

    Attributes:
        first: Without a question.
        most: When the model's own rounding was measured, and is as large.
        tells: A difference above it, be it rounding, says nothing about the adapter.
    """

    first: float
    most: float
    tells: float = math.inf


def gates_of(
    expected: Outputs, ceiling: float = CEILING, base: Callable[[], Outputs] | None = None
) -> dict[str, Gate]:
    """Return the base gate of every output: ORT_TOL, or 8 epsilons of a narrower dtype.

    Args:
        expected: The outputs that a run has to give.
        ceiling: The widest gate that rounding can ask for.
        base: Gives the outputs without the adapter, where there is one.
    """
    gates = {}
    for name, value in expected.items():
        eps = EPSILON.get(value.dtype.name)
        if eps is not None:
            gates[name] = Gate(8 * eps, 8 * eps)
            continue
        unadapted = None if base is None else partial(_output, base, name)
        gates[name] = wide_gate(ORT_TOL, value, unadapted, ceiling)
    return gates


def _output(run: Callable[[], Outputs], name: str) -> Array:
    return run()[name]


def largest(values: npt.ArrayLike) -> float:
    """Return the largest finite magnitude in an output."""
    top = 0.0
    for (numbers,) in _parts(np.asarray(values)):
        top = max(top, float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)))
    return top


def wide_gate(
    tol: float,
    expected: npt.ArrayLike,
    base: Callable[[], npt.ArrayLike] | None = None,
    ceiling: float = CEILING,
) -> Gate:
    """Return the gate of a float32 output.

    An output whose largest number is tiny, such as the tail of a sigmoid, may differ by SMALLEST,
    which is above its ceiling. A limit of a quarter of the adapter's effect keeps that from hiding
    a lost or a wrong fold.
    """
    top = largest(expected)
    most = SMALLEST / top if top else 0.0
    if most <= ceiling:
        return Gate(tol, ceiling)
    effect = 0.0
    if base is not None:
        effect = rel(base(), expected)
    return Gate(tol, most, max(ceiling, 0.25 * min(effect or 1.0, 1.0)))


def narrow_gate(tol: float, eps: float, base: npt.ArrayLike, expected: npt.ArrayLike) -> Gate:
    """Return the gate for a narrow dtype: 8 epsilons, and at most 32.

    Half the adapter's effect keeps a lost fold from passing as rounding, down to 4 epsilons, where
    no output of that dtype can tell the two apart.
    """
    half = 0.5 * rel(base, expected)
    first = max(tol, min(8 * eps, max(4 * eps, half)))
    return Gate(first, max(first, min(32 * eps, half or 32 * eps)))


@dataclass(frozen=True)
class Parity:
    """One comparison at one size; `of` names what was compared: fold, onnxruntime, torch.

    Where every output of the reference is zero it is blank, and proves nothing.
    """

    sizes: Sizes
    max_abs: float
    rel: float
    tol: float
    output: str = ""
    of: str = ""
    blank: bool = False

    @property
    def ok(self) -> bool:
        """True if the difference is within the gate."""
        return self.rel <= self.tol

    def to_json(self) -> Json:
        """Return one row of `parity[]`; an infinite difference is null."""
        row: Json = strict_json({**vars(self), "sizes": dict(self.sizes), "ok": self.ok})
        return row


def shapes_of(feeds: JsonView) -> dict[str, tuple[int, ...]]:
    """Return {input: shape} for a report; of a cache only the first input, since all are alike."""
    # that of a decoder, or those of the parts of an encoder-decoder's cache
    shown = [f"past_key_values.0.{part}key" for part in ("", "decoder.", "encoder.")]
    return {
        name: array.shape
        for name, array in feeds.items()
        if name in shown or not name.startswith("past_key_values.")
    }


def sizes_text(sizes: Mapping[str, Sequence[int]]) -> str:
    """Return the shapes of inputs as text for people.

    >>> sizes_text({"x": (2, 5), "mask": (2,)})
    'x [2, 5], mask [2]'
    """
    return ", ".join(f"{visible(name)} {list(shape)}" for name, shape in sizes.items())


@np.errstate(invalid="ignore")  # inf − inf of two equal outputs
def compare(
    ours: Outputs, reference: Outputs, sizes: Sizes, tol: float | Mapping[str, float], of: str = ""
) -> Parity:
    """Compare outputs at one size; return the one nearest to its gate, or furthest above it."""
    worst = Parity(sizes, math.inf, math.inf, 0.0, "", of)
    worst_share = -math.inf
    all_zero = not any(map(np.any, reference.values()))
    for name in reference:
        gate = tol if isinstance(tol, float) else tol[name]
        if name not in ours:
            return Parity(sizes, math.inf, math.inf, gate, name, of)
        gap = _largest_gap(ours[name], reference[name])
        if gap == 0.0 and not np.any(reference[name]):
            difference = 0.0  # equal zeros, of which rel says nothing
        else:
            difference = rel(ours[name], reference[name])
        share_of_gate = difference / max(gate, 1e-30)
        if share_of_gate >= worst_share:
            worst = Parity(sizes, gap, difference, gate, name, of, blank=all_zero)
            worst_share = share_of_gate
    return worst


def _largest_gap(ours: Array, reference: Array) -> float:
    """Return max|a − b|; infinite if the shapes differ."""
    a = np.asarray(ours)
    b = np.asarray(reference)
    if a.shape != b.shape:
        return math.inf
    gap = 0.0
    for a_part, b_part in _parts(a, b):
        gap = float(np.maximum(gap, np.abs(a_part - b_part).max(initial=0.0)))  # NaN stays NaN
    return gap


@dataclass(frozen=True)
class Report:
    """The result of a command; `bool(report)` is True if every check passed."""

    command: str
    ok: bool
    parity: tuple[Parity, ...] = ()
    outputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: JsonView = field(default_factory=dict)

    __repr__ = short

    def __bool__(self) -> bool:
        """True if every check passed."""
        return self.ok

    def _repr_html_(self) -> str:
        """The result and the comparisons, for notebooks."""
        head = ("of", "sizes", "rel", "gate", "ok")
        rows = []
        for row in self.parity:
            sizes = sizes_text(row.sizes)
            numbers = (f"{row.rel:.2e}", f"{row.tol:.1e}", str(row.ok))
            rows.append((row.of or "models", sizes, *numbers))
        return html(f"{self.command}: {'ok' if self.ok else 'FAILED'}", [head, *rows])

    def to_json(self) -> Json:
        """Return the JSON fields of docs/json.md that this command fills."""
        return {
            "command": self.command,
            "ok": self.ok,
            "outputs": list(self.outputs),
            "warnings": list(self.warnings),
            "parity": [row.to_json() for row in self.parity],
            **self.details,
        }

    def __str__(self) -> str:
        """A few lines of text for people."""
        lines = [f"{self.command}: {'ok' if self.ok else 'FAILED'}"]
        for unproven in self.details.get("unproven", ()):
            lines.append(f"  not proven at {sizes_text(unproven['sizes'])}: {unproven['reason']}")
        lines += [f"  {_parity_text(row)}" for row in self.parity]
        for name, value in self.details.items():
            if isinstance(value, dict):
                continue
            if not isinstance(value, list):
                lines.append(f"  {name}: {value}")
            elif not any(isinstance(item, dict) for item in value):  # a table its command shows
                lines.append(f"  {name}: {', '.join(map(str, value)) or 'none'}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(map(visible, lines))  # a name from a file may have line breaks


def _parity_text(row: Parity) -> str:
    """Return one comparison as a line for people."""
    if not row.ok:
        verdict = "over the gate"
    elif row.blank:
        verdict = "too small to prove anything"
    else:
        verdict = "ok"
    compared = f"{row.of or 'models'} at {sizes_text(row.sizes)}"
    return f"{compared}: rel {row.rel:.2e} (gate {row.tol:.1e}) {verdict}"


def compare_fairly(
    ours: Outputs,
    reference: Outputs,
    sizes: Sizes,
    gates: Mapping[str, Gate],
    own: Callable[[], Iterable[Mapping[str, float]]],
    *,
    of: str = "",
) -> Parity:
    """Compare; if a first gate is exceeded, widen gates to 4 × `own` + 1e-7, at most to `most`.

    `own` tells how far rounding alone moves each output of the reference: at least so far, then at
    least so far … It may take long, and is asked no further than until the gates are met. What the
    blocks of a stack give, `present.0.key` …, is on the way to the other outputs, and a few runs
    tell too little of sixty each: the most that any output is moved counts for them.
    """
    first_gates = {name: gate.first for name, gate in gates.items()}
    parity = compare(ours, reference, sizes, first_gates, of)
    exceeded = gates.get(parity.output)
    if parity.ok or exceeded is None or exceeded.most <= exceeded.first:
        return parity
    for rounding in own():
        wider = wider_gates(gates, rounding)
        parity = compare(ours, reference, sizes, wider, of)
        if parity.ok:
            telling_gates = {name: min(gate, gates[name].tells) for name, gate in wider.items()}
            return _of_telling_outputs(parity, ours, reference, telling_gates)
    return parity


def wider_gates(gates: Mapping[str, Gate], rounding: Mapping[str, float]) -> dict[str, float]:
    """Return gates that allow for measured rounding; see compare_fairly."""
    largest_rounding = max(rounding.values(), default=0.0)
    wider = {}
    for name, gate in gates.items():
        moved = rounding.get(name, 0.0)
        if _OF_BLOCK.match(name):
            moved = largest_rounding
        wider[name] = min(max(gate.first, 4 * moved + 1e-7), gate.most)
    return wider


def _of_telling_outputs(
    parity: Parity, ours: Outputs, reference: Outputs, gates: Mapping[str, float]
) -> Parity:
    """Compare only outputs that show the adapter's effect, after all outputs passed."""
    telling = {
        name: values
        for name, values in reference.items()
        if compare(ours, {name: values}, {}, gates).ok
    }
    if not telling:
        return replace(parity, blank=True)
    return compare(ours, telling, parity.sizes, gates, parity.of)


def grow(worst: dict[str, float], values: Outputs, exact: Outputs) -> dict[str, float]:
    """Update the largest difference so far of each output, in place; return it."""
    for name, value in values.items():
        difference = rel(value, exact[name])
        if math.isfinite(difference):
            worst[name] = max(worst.get(name, 0.0), difference)
        else:
            worst.setdefault(name, 0.0)
    return worst


def demand(parity: Sequence[Parity], what: str) -> None:
    """Raise unless something was compared and every gate was met; nothing is written then."""
    if not parity:
        raise LoraFxError(
            "no size could be compared: the inputs have size 1, which the model refuses",
            "pass --inputs with two or more rows",
        )
    for of in dict.fromkeys(row.of for row in parity):
        rows = [row for row in parity if row.of == of]
        if not all(row.ok and row.blank for row in rows):
            continue
        rounding = max(row.rel for row in rows)
        if rounding:
            raise LoraFxError(
                f"{of or what}: every output is so small that its rounding (up to {rounding:.1e} "
                "of it) "
                "hides the adapter, so nothing is proven",
                "pass --inputs with real data that gives larger outputs",
            )
        raise LoraFxError(
            "every output is zero, so nothing is proven",
            "use trained weights, because a last layer of zeros gives only zeros; or pass "
            "--inputs with real data",
        )
    for row in parity:
        if not row.ok:
            compared = f"{what} ({row.of})" if row.of else what
            raise NoEffectError(
                f"{compared}: output {row.output!r} at {sizes_text(row.sizes)}: "
                f"rel {row.rel:.2e}, the gate is {row.tol:.1e}",
                "pass --inputs with real data, and report this model; nothing was written",
            )
