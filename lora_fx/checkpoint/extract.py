"""extract: an adapter that turns one checkpoint into another, tensor by tensor.

Δ = tuned − base of every matrix that differs is approximated by the best b @ a of a rank (see
svd.py); alpha = rank, so that base + b @ a ≈ tuned. Peak memory is a few times one Δ, whatever
the size of the checkpoints; errors are measured on the fp32 factors, element by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.svd import Triplets, above_noise, balanced, leading, squared_distance
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.base_fingerprint import file_fingerprint
from lora_fx.checkpoint.extract_options import RANK, ExtractOptions
from lora_fx.checkpoint.extract_result import Extracted, Extraction, Outcome
from lora_fx.checkpoint.extract_scope import scope_of
from lora_fx.checkpoint.extract_sides import Sides, check_lookups, sides_of
from lora_fx.checkpoint.file_targets import targets_of
from lora_fx.checkpoint.tensor_pair import TensorPair, pair_of
from lora_fx.checkpoint.tensor_uses import TensorUse, config_of, uses
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError, NoEffectError, expect_path
from lora_fx.files.checkpoint import tensors
from lora_fx.files.hub import local, origin
from lora_fx.files.read import trusting
from lora_fx.files.run_files import check_unchanged, remembering
from lora_fx.files.stored_tensors import same_bytes, stored
from lora_fx.formats.detect import is_adapter
from lora_fx.inputs import generator
from lora_fx.targets.selectors import select_names

_COUNTER = "num_batches_tracked"
"""The name of a counter in every batch norm of torch, which training changes."""
LITTLE = 0.5
"""The share of ‖Δ‖² below which an update gets a note that it keeps little."""


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    also_full: bool = False,
    allow_missing: bool = False,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    whole: str | Sequence[str] | None = None,
    trust: bool = False,
) -> Adapter:
    """Return the adapter that turns `base` into `tuned`, as well as its ranks allow.

    Args:
        base: A Hugging Face folder, its id on the Hub (hf:ORG/NAME), or a .safetensors file.
        tuned: The same, with the same tensors.
        rank: The rank of every update, capped by the smaller side; 16 where energy is not given.
        energy: Instead of rank: per tensor the lowest rank that holds this share of ‖Δ‖².
        max_rank: Cap of what energy chooses; 128.
        include: Selectors of the weights to look at; all where none is given.
        exclude: Selectors of tensors to leave out, of any shape.
        also_full: Vectors that differ (norms, biases) go into the adapter as whole tensors.
        allow_missing: Leave out, with a note, tensors of one side only or of two shapes.
        fan_in_fan_out: Linear weights are stored [in, out]; None: config.json says.
        seed: The seed of the random subspaces; each key draws numbers of its own.
        whole: Selectors of tensors that go into the adapter whole where they differ, such as a
            head that was trained whole.
        trust: Read pickles, by torch's unpickler that runs no code.

    Returns:
        fp32 updates by tensor name, with layouts, alpha = rank. metadata["notes"] has what must be
        said; `extraction` also gives the errors.

    Raises:
        NoEffectError: Nothing differs.
        LoraFxError: Names or shapes that do not fit each other, integers or quantised values that
            differ, values that are not finite; all by name.
    """
    options = ExtractOptions(
        rank=rank, energy=energy, max_rank=max_rank, include=include, exclude=exclude,
        also_full=also_full, allow_missing=allow_missing, fan_in_fan_out=fan_in_fan_out, seed=seed,
        whole=whole, trust=trust,
    )  # fmt: skip
    return extraction(base, tuned, options).adapter


def _refuse_adapter(tuned: str | Path) -> None:
    """Raise for the folder of an adapter in place of a tuned model."""
    is_model = (Path(tuned) / "config.json").is_file()
    if Path(tuned).is_dir() and is_adapter(tuned) and not is_model:
        raise LoraFxError(
            f"{tuned}: an adapter, from which there is nothing to extract; expected a tuned model",
            "use it as it is: lora-fx truncate lowers its ranks, lora-fx convert its format",
        )


@remembering()
def extraction(
    base: str | Path,
    tuned: str | Path,
    options: ExtractOptions,
    progress: Callable[[float], None] | None = None,
) -> Extraction:
    """Extract as `extract` does, and return the report too.

    Args:
        base: As of `extract`.
        tuned: As of `extract`.
        options: What is asked for.
        progress: Called with the share of bytes that is done.
    """
    for side, path in (("base", base), ("tuned", tuned)):
        expect_path(path, side, "call extract(base, tuned)")
    base = local(base)
    tuned = local(tuned)
    _refuse_adapter(tuned)
    with trusting(options.trust):
        base_side = (str(base), tensors(base), config_of(base))
        tuned_side = (str(tuned), tensors(tuned), config_of(tuned))
        sides = sides_of(base_side, tuned_side)
    targets = targets_of(sides.base)
    tensor_uses = uses(sides.base, targets, config_of(base), options.fan_in_fan_out, sides.table)
    scope, notes = scope_of(targets, (str(base), sides.base), (str(tuned), sides.tuned), options)
    check_lookups(sides, scope, str(tuned))
    for note in sides.notes:
        key, _, _ = note.partition(":")
        if key in scope:
            notes.append(note)
    whole_keys = select_names(scope, options.whole or (), "whole")
    for key in whole_keys:
        tensor_uses[key] = replace(tensor_uses[key], layout=None)

    changes = _changes(scope, sides, tensor_uses, whole_keys, options, progress)
    check_unchanged()
    if not changes.entries:
        hint = "check that TUNED is the tuned model"
        if changes.left_out:
            hint = (
                f"only vectors differ ({changes.left_out[0]} …); pass --also-full to extract "
                "them too"
            )
        raise NoEffectError(f"{tuned}: no weight differs from {base}", hint)

    notes += _notes(changes.rows, tensor_uses, changes.left_out)
    low_rank = [key for key, entry in changes.entries.items() if isinstance(entry, LowRank)]
    metadata = {"base_model_name_or_path": str(base), "notes": notes, **origin(base)}
    metadata |= file_fingerprint(low_rank, sides.base)
    return Extraction(
        Adapter(changes.entries, metadata),
        tuple(changes.rows),
        tuple(changes.unchanged),
        tuple(changes.left_out),
        skipped=len(sides.base) - len(scope),
    )


@dataclass(frozen=True)
class _Changes:
    """The changes from one checkpoint to the other.

    Attributes:
        entries: Key → its update, or its whole new tensor.
        rows: How near each low-rank update is to its Δ.
        unchanged: Tensors that are equal.
        left_out: Vectors that differ but were not requested.
    """

    entries: dict[str, Entry]
    rows: list[Extracted]
    unchanged: list[str]
    left_out: list[str]


def _changes(
    scope: Sequence[str],
    sides: Sides,
    tensor_uses: Mapping[str, TensorUse],
    whole_keys: Collection[str],
    options: ExtractOptions,
    progress: Callable[[float], None] | None,
) -> _Changes:
    """Compare every tensor in the scope, and approximate what differs."""
    changes = _Changes({}, [], [], [])
    bytes_done = 0
    bytes_in_all = sum(sides.base[key].stop - sides.base[key].start for key in scope) or 1
    for key in scope:
        pair = pair_of(key, sides.base[key], sides.tuned[key], tensor_uses[key].lead)
        change, row = _change(pair, tensor_uses[key], options)
        if change is None:
            changes.unchanged.append(key)
        elif isinstance(change, Full) and not options.also_full and key not in whole_keys:
            changes.left_out.append(key)
        else:
            changes.entries[key] = change
        if row is not None:
            changes.rows.append(row)
        bytes_done += pair.base.stop - pair.base.start
        if progress is not None:
            progress(bytes_done / bytes_in_all)
    return changes


def _change(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """Return the update that turns one tensor into the other; a whole tensor for a vector."""
    if same_bytes(pair.base, pair.tuned):
        return None, None
    for info in (pair.base, pair.tuned):
        if info.dtype not in FLOATING:
            raise LoraFxError(
                f"{info.file}: tensor {pair.key!r} is {info.dtype} and differs; expected one of "
                f"{', '.join(FLOATING)}",
                f"pass --exclude {_COUNTER if pair.key.endswith(_COUNTER) else pair.key} to leave "
                "it out",
            )
    if use.layout is not None:
        return _approximate(pair, use, options)
    if not _differs(pair):
        return None, None
    return Full(stored(pair.tuned).astype(pair.dtype, copy=False), use.tied), None


def _differs(pair: TensorPair) -> bool:
    """Whether any element of a tensor differs in value; −0 equals 0."""
    return any(pair.delta(i)[0].any() for i in range(pair.batch))


DeltaOf = Callable[[int], tuple[Array, float, float]]
"""A function of a matrix's number in a stack that returns Δ, ‖Δ‖² and ‖base‖²."""


@dataclass(frozen=True)
class _Decomposition:
    """The leading singular triplets of each matrix of one tensor's Δ.

    Attributes:
        triplets: Of each matrix.
        delta_energies: ‖Δ‖² of each matrix.
        base_energies: ‖base‖² of each matrix.
    """

    triplets: list[Triplets]
    delta_energies: list[float]
    base_energies: list[float]

    @property
    def energy(self) -> float:
        """‖Δ‖² of the whole tensor."""
        return math.fsum(self.delta_energies)

    @property
    def singular_values(self) -> list[Array]:
        """The computed singular values of each matrix."""
        return [values for _, values, _ in self.triplets]


def _decompose(pair: TensorPair, delta_of: DeltaOf, count: int, seed: int) -> _Decomposition:
    """Compute the first `count` singular triplets of each matrix of a tensor's Δ."""
    decomposition = _Decomposition([], [], [])
    for i in range(pair.batch):
        delta, delta_energy, base_energy = delta_of(i)
        random = generator(f"{pair.key}[{i}]", seed)
        decomposition.triplets.append(leading(delta, count, random))
        decomposition.delta_energies.append(delta_energy)
        decomposition.base_energies.append(base_energy)
    return decomposition


def _approximate(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """Approximate the Δ of one tensor by a low-rank update; return it and its report row.

    Where `energy` chooses the rank, so many singular values are computed that they hold it: 16 at
    first, then twice as many, until they do or the cap is reached.
    """
    delta_of = functools.lru_cache(1)(pair.delta)  # one matrix at a time
    limit = min(options.limit, pair.rows, pair.columns)
    count = limit if options.energy is None else min(limit, RANK)
    while True:
        decomposition = _decompose(pair, delta_of, count, options.seed)
        energy = decomposition.energy
        if not energy:
            return None, None
        rank: int | None = count
        if options.energy is not None:
            rank = _rank_for(decomposition.singular_values, options.energy * energy)
        if rank is not None or count == limit:
            break
        count = min(limit, 2 * count)

    is_enough = rank is not None
    rank = rank or count
    factors = [balanced(*triplets, rank) for triplets in decomposition.triplets]
    missed = [squared_distance(delta_of(i)[0], a, b) for i, (a, b) in enumerate(factors)]
    row = Extracted(
        key=pair.key,
        shape=pair.base.shape,
        rank=rank,
        norm=math.sqrt(energy),
        base_norm=math.sqrt(math.fsum(decomposition.base_energies)),
        error=math.sqrt(math.fsum(missed)),
        stable_rank=energy / _largest_energy(decomposition),
        above_noise=_above_noise(decomposition, (pair.rows, pair.columns)),
        known=count,
        enough=is_enough,
    )
    return _update(use, factors), row


def _largest_energy(decomposition: _Decomposition) -> float:
    """Return the sum of σ₁² over the matrices, where σ₁ is a matrix's largest singular value."""
    return math.fsum(float(values[0]) ** 2 for values in decomposition.singular_values)


def _above_noise(decomposition: _Decomposition, shape: tuple[int, int]) -> int:
    """Return how many singular values are above the noise level; a stack's largest count."""
    energies = zip(decomposition.singular_values, decomposition.delta_energies, strict=True)
    return max(above_noise(values, energy, shape) for values, energy in energies)


def _rank_for(singular_values: Sequence[Array], energy: float) -> int | None:
    """Return the lowest rank whose squared singular values reach `energy`; None if none does.

    Args:
        singular_values: Of each matrix of a stack, equally many.
        energy: A part of ‖Δ‖².
    """
    reached = np.cumsum(sum(values**2 for values in singular_values)) >= energy
    if not reached.any():
        return None
    return int(np.argmax(reached)) + 1


def _update(use: TensorUse, factors: Sequence[tuple[Array, Array]]) -> LowRank:
    """Return an update with the factors of the stored matrices."""
    a = np.stack([factor for factor, _ in factors])
    b = np.stack([factor for _, factor in factors])
    if use.swapped:
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    if not use.lead:
        a = a[0]
        b = b[0]
    return LowRank(
        np.ascontiguousarray(a),
        np.ascontiguousarray(b),
        float(b.shape[-1]),
        use.layout,
        origin=Origin(op=use.op, tied=use.tied),
    )


def _notes(
    rows: Sequence[Extracted], tensor_uses: Mapping[str, TensorUse], left_out: Sequence[str]
) -> Iterator[str]:
    """Yield notes on updates that keep little of Δ, on tied tables and on vectors left out."""
    for row in rows:
        share = 1 - row.relative**2
        if not row.enough:
            yield (
                f"{row.key}: rank {row.rank} is the maximum (--max-rank) and keeps {share:.1%} of "
                "‖Δ‖²"
            )
        elif share < LITTLE:
            yield (
                f"{row.key}: rank {row.rank} keeps only {share:.0%} of ‖Δ‖²; if the whole tensor "
                f"was trained, --whole {row.key} stores it whole"
            )
        if tensor_uses[row.key].tied:
            yield f"{row.key}: this table is also the output head, and the update changes both uses"
    if left_out:
        yield (
            "vectors that differ but are not in the adapter (--also-full adds them): "
            f"{', '.join(left_out)}"
        )
