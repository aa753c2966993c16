"""extract: an adapter that turns one checkpoint into another, tensor by tensor.

Δ = tuned − base of every matrix that differs is approximated by the best b @ a of a rank (see
lowrank.py); alpha = rank, so that base + b @ a ≈ tuned. Peak memory is a few times one Δ, whatever
the size of the checkpoints; errors are measured on the fp32 factors, element by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank, above_noise, balanced, leading, squared_distance
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.fold import arithmetic
from lora_fx.checkpoint.match import check_scaled, tie_of
from lora_fx.checkpoint.model_families import TensorUse, Tie, config_of, is_head, targets_of, uses
from lora_fx.checkpoint.provenance import file_fingerprint
from lora_fx.dtypes import FLOATING, Array, NumpyDtype
from lora_fx.errors import LoraFxError, NoEffectError, lead_between, one_line
from lora_fx.files.checkpoint import tensors
from lora_fx.files.hub import local, origin
from lora_fx.files.read import trusting
from lora_fx.files.run_files import check_unchanged, remembering
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import same_bytes, stored, stored_elements
from lora_fx.inputs import generator
from lora_fx.targets.plan import select, select_names, split
from lora_fx.targets.target import Found
from lora_fx.text import Json, JsonView, short, some, table

RANK = 16
LITTLE = 0.5
"""A share of ‖Δ‖² below which an update is said to keep little of its Δ."""
MAX_RANK = 128
"""Cap of a rank that `energy` chooses, where none is given."""


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What `extract` is asked for; an object that exists is in order."""

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    also_full: bool = False
    allow_missing: bool = False
    fan_in_fan_out: bool | None = None
    seed: int = 0
    whole: str | Sequence[str] | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        """Raise for what is out of range, and for options that exclude each other."""
        for name, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LoraFxError(f"{name} {value!r} is not a positive whole number", "16 is usual")
        if self.energy is None:
            if self.max_rank is not None:
                raise LoraFxError("max_rank caps what energy chooses", "give energy, or only rank")
            return
        if self.rank is not None:
            raise LoraFxError(
                "rank and energy exclude each other", "max_rank caps what energy chooses"
            )
        if not 0.0 < self.energy < 1.0:
            raise LoraFxError(f"energy {self.energy!r} is not between 0 and 1", "0.9, for example")

    @property
    def limit(self) -> int:
        """The rank, or the highest that energy may choose."""
        if self.energy is None:
            return RANK if self.rank is None else self.rank
        return MAX_RANK if self.max_rank is None else self.max_rank


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
    """The adapter that turns `base` into `tuned`, as well as its ranks allow.

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


@remembering()
def extraction(
    base: str | Path,
    tuned: str | Path,
    options: ExtractOptions,
    progress: Callable[[float], None] | None = None,
) -> Extraction:
    """As extract, with the report; `progress` is told the share of bytes that is done."""
    base, tuned = local(base), local(tuned)
    with trusting(options.trust):
        sides = sides_of(*((str(p), tensors(p), config_of(p)) for p in (base, tuned)))
    old, new = sides.old, sides.new
    found = targets_of(old)
    kinds = uses(old, found, config_of(base), options.fan_in_fan_out, sides.table)
    scope, notes = scope_of(found, (str(base), old), (str(tuned), new), options)
    check_lookups(sides, scope, str(tuned))
    notes += (n for n in sides.notes if n.partition(":")[0] in scope)
    full = select_names(scope, options.whole or (), "whole")
    kinds |= {key: replace(kinds[key], layout=None) for key in full}
    entries: dict[str, Entry] = {}
    rows: list[Extracted] = []
    unchanged: list[str] = []
    left_out: list[str] = []
    done, total = 0, sum(old[k].stop - old[k].start for k in scope) or 1
    for key in scope:
        pair = pair_of(key, old[key], new[key], kinds[key].lead)
        change, row = _change(pair, kinds[key], options)
        if change is None:
            unchanged.append(key)
        elif isinstance(change, Full) and not options.also_full and key not in full:
            left_out.append(key)
        else:
            entries[key] = change
        if row is not None:
            rows.append(row)
        done += pair.base.stop - pair.base.start
        if progress is not None:
            progress(done / total)
    check_unchanged()
    if not entries:
        hint = f"only vectors differ ({left_out[0]} …); --also-full takes them" if left_out else ""
        raise NoEffectError(
            f"{tuned}: no weight differs from {base}", hint or "is it the tuned model?"
        )
    notes += _notes(rows, kinds, left_out)
    low = [k for k, entry in entries.items() if isinstance(entry, LowRank)]
    metadata = {"base_model_name_or_path": str(base), "notes": notes, **origin(base)}
    metadata |= file_fingerprint(low, old)
    skipped = len(old) - len(scope)
    return Extraction(
        Adapter(entries, metadata), tuple(rows), tuple(unchanged), tuple(left_out), skipped
    )


def _change(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """What has become of one tensor; one without low-rank update is taken whole."""
    if same_bytes(pair.base, pair.tuned):
        return None, None
    for info in (pair.base, pair.tuned):
        if info.dtype not in FLOATING:
            raise LoraFxError(
                f"{info.file}: tensor {pair.key!r} is {info.dtype} and differs; expected one of "
                f"{', '.join(FLOATING)}",
                f"--exclude {pair.key} leaves it out",
            )
    if use.layout is not None:
        return _approximate(pair, use, options)
    if not any(pair.delta(i)[0].any() for i in range(pair.batch)):
        return None, None
    return Full(stored(pair.tuned).astype(pair.dtype, copy=False), use.tied), None


def _approximate(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """The update of one tensor and its row."""
    delta = functools.lru_cache(1)(pair.delta)  # one matrix at a time
    limit = min(options.limit, pair.rows, pair.columns)
    k = limit if options.energy is None else min(limit, RANK)
    while True:
        parts, norms = [], []
        for i in range(pair.batch):
            matrix, changed, original = delta(i)
            norms.append((changed, original))
            parts.append(leading(matrix, k, generator(f"{pair.key}[{i}]", options.seed)))
        total = math.fsum(n for n, _ in norms)
        if not total:
            return None, None
        rank, enough = k, True
        if options.energy is not None:
            reached = np.cumsum(sum(s**2 for _, s, _ in parts)) >= options.energy * total
            enough = bool(reached.any())
            rank = int(np.argmax(reached)) + 1 if enough else k
        if enough or k == limit:
            break
        k = min(limit, 2 * k)
    factors = [balanced(*p, rank) for p in parts]
    lost = math.fsum(squared_distance(delta(i)[0], a, b) for i, (a, b) in enumerate(factors))
    first = math.fsum(float(s[0]) ** 2 for _, s, _ in parts)
    shape = (pair.rows, pair.columns)
    noise = [above_noise(s, n, shape) for (_, s, _), (n, _) in zip(parts, norms, strict=True)]
    row = Extracted(
        key=pair.key,
        shape=pair.base.shape,
        rank=rank,
        norm=math.sqrt(total),
        base_norm=math.sqrt(math.fsum(n for _, n in norms)),
        error=math.sqrt(lost),
        stable_rank=total / first,
        above_noise=max(noise),
        known=k,
        enough=enough,
    )
    return _update(use, factors), row


def _update(use: TensorUse, factors: Sequence[tuple[Array, Array]]) -> LowRank:
    """Factors of the stored matrices as an update."""
    a, b = (np.stack(side) for side in zip(*factors, strict=True))
    if use.swapped:
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    if not use.lead:
        a, b = a[0], b[0]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    origin = Origin(op=use.op, tied=use.tied)
    return LowRank(a, b, float(b.shape[-1]), use.layout, origin=origin)


def _notes(
    rows: Sequence[Extracted], kinds: dict[str, TensorUse], left_out: Sequence[str]
) -> Iterator[str]:
    for r in rows:
        said, kept = f"{r.key}: rank {r.rank}", 1 - r.relative**2
        if not r.enough:
            yield f"{said} is the cap and holds {kept:.1%} of ‖Δ‖²"
        elif kept < LITTLE:
            asked = f"was it trained whole? --whole {r.key} takes it so"
            yield f"{said} keeps {kept:.0%} of ‖Δ‖²: {asked}"
        if kinds[r.key].tied:
            yield f"{r.key}: the table is the output head too, and the update acts on both"
    if left_out:
        yield (
            "vectors that differ and are not in the adapter, which --also-full "
            f"would take: {', '.join(left_out)}"
        )


# The difference tuned − base of one tensor, one matrix at a time.
#
# Both files are read by blocks; what is held is one Δ in fp32 (fp64 where either side is) and two
# blocks.


BLOCK = 1 << 18
"""Elements of one block."""


@dataclass(frozen=True)
class TensorPair:
    """The same tensor of two checkpoints, seen as `batch` matrices of rows × columns as stored.

    Elements are numbered in stored order, so that a matrix and a block of its rows are ranges.
    """

    key: str
    base: TensorInfo
    tuned: TensorInfo
    batch: int
    rows: int
    columns: int

    @property
    def dtype(self) -> NumpyDtype:
        """The dtype of Δ: fp64 where either side is, else fp32."""
        return np.dtype(arithmetic(self.base.dtype, self.tuned.dtype))

    def delta(self, batch: int) -> tuple[Array, float, float]:
        """One matrix of Δ, ‖Δ‖² and ‖base‖² of it in fp64.

        Raises:
            LoraFxError: NaN or infinite values on either side.
        """
        size = self.rows * self.columns
        result = np.empty(size, self.dtype)
        changed = original = 0.0
        for lo in range(0, size, BLOCK):
            hi = min(lo + BLOCK, size)
            sides = self.base, self.tuned
            found = (stored_elements(info, batch * size + lo, batch * size + hi) for info in sides)
            old, new = (block.astype(self.dtype, copy=False) for block in found)
            for info, block in zip(sides, (old, new), strict=True):
                if count := np.count_nonzero(~np.isfinite(block)):
                    raise LoraFxError(
                        f"{info.file}: tensor {self.key!r} has {count} NaN or infinite values (or "
                        "more); expected finite ones",
                        "training may have diverged; use an earlier checkpoint, or --exclude the "
                        "tensor",
                    )
            np.subtract(new, old, out=result[lo:hi])
            changed += _squares(result[lo:hi])
            original += _squares(old)
        if not math.isfinite(changed):
            raise LoraFxError(
                f"{self.tuned.file}: tensor {self.key!r} minus that of {self.base.file} overflows",
                "are the two of one model? --exclude leaves the tensor out",
            )
        return result.reshape(self.rows, self.columns), changed, original


def pair_of(key: str, base: TensorInfo, tuned: TensorInfo, lead: int) -> TensorPair:
    """A tensor of two checkpoints, of which `lead` leading axes count matrices."""
    shape = base.shape or (1,)
    sizes = math.prod(shape[:lead]), shape[lead], math.prod(shape[lead + 1 :])
    return TensorPair(key, base, tuned, *sizes)


def _squares(block: Array) -> float:
    wide = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))


# What an extraction found: an adapter, and how near each update is to its Δ.


@dataclass(frozen=True)
class Extracted:
    """One update. Norms are Frobenius's.

    Attributes:
        key: The tensor's name.
        shape: As stored.
        rank: The rank of the update.
        norm: ‖Δ‖.
        base_norm: ‖W‖.
        error: ‖Δ − b@a‖.
        stable_rank: ‖Δ‖²/σ₁²; of a stack Σ‖Δ‖²/Σσ₁².
        above_noise: Singular values, of those computed, above what white noise would have (see
            lowrank.above_noise); the most of a stack.
        known: How many singular values were computed.
        enough: False where the cap kept `energy` from being reached.
    """

    key: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    base_norm: float
    error: float
    stable_rank: float
    above_noise: int
    known: int
    enough: bool = True

    @property
    def change(self) -> float | None:
        """‖Δ‖/‖W‖; None where W is zero."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def relative(self) -> float:
        """‖Δ − b@a‖/‖Δ‖."""
        return self.error / self.norm

    def to_json(self) -> Json:
        """One row of `extracted[]` in docs/json.md."""
        names = ("rank", "norm", "change", "error", "relative", "stable_rank")
        numbers = {name: getattr(self, name) for name in (*names, "above_noise", "known")}
        return {"key": self.key, "shape": list(self.shape), **numbers}


Outcome = tuple[LowRank | Full | None, Extracted | None]
"""The update of a tensor, None where no element differs, and the row of a low-rank one."""


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter and its report.

    Attributes:
        adapter: The adapter.
        rows: One for each low-rank update.
        unchanged: Tensors that are equal on both sides.
        left_out: Vectors that differ and are not in the adapter.
        skipped: How many tensors of base were not looked at.
    """

    adapter: Adapter
    rows: tuple[Extracted, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[str, ...]
    skipped: int

    __repr__ = short

    @property
    def relative(self) -> float:
        """‖Δ − b@a‖/‖Δ‖ over all low-rank updates together."""
        norm = math.hypot(*(r.norm for r in self.rows))
        return math.hypot(*(r.error for r in self.rows)) / norm if norm else 0.0

    def to_json(self) -> Json:
        """What `lora-fx extract --json` adds."""
        return {
            "extracted": [r.to_json() for r in self.rows],
            "whole": list(self.adapter.full),
            "left_out": list(self.left_out),
            "unchanged": len(self.unchanged),
            "skipped": self.skipped,
            "relative": self.relative,
            "parameters": self.adapter.parameters,
        }

    def __str__(self) -> str:
        """A table for people."""
        head = ("key", "shape", "rank", "‖Δ‖/‖W‖", "error/‖Δ‖", "stable rank", "above noise")
        rows = [
            (
                r.key,
                "×".join(map(str, r.shape)),
                str(r.rank),
                "-" if r.change is None else f"{r.change:.2e}",
                f"{r.relative:.2e}",
                f"{r.stable_rank:.1f}",
                f"{'≥ ' if r.above_noise >= r.known else ''}{r.above_noise}",
            )
            for r in self.rows
        ]
        lines = table([head, *rows]) if rows else ["no low-rank update"]
        lines += [f"whole: {key}" for key in self.adapter.full]
        lines.append(
            f"low-rank updates: {len(self.rows)}; equal tensors: {len(self.unchanged)}; "
            f"not looked at: {self.skipped}; elements in the adapter: {self.adapter.parameters}"
        )
        lines.append(f"error over all updates: {self.relative:.6e} of ‖Δ‖")
        return "\n".join(lines)


# Which tensors of two checkpoints are compared, and the refusal of those that do not fit.


HeaderOf = tuple[str, Tensors]
"""A path, for messages, and its tensors."""


def scope_of(
    found: Found, base: HeaderOf, tuned: HeaderOf, options: ExtractOptions
) -> tuple[list[str], list[str]]:
    """Names to compare, in the order of base, and notes.

    Vectors are in the scope whatever `include` says: which of them differ has to be told.

    Raises:
        LoraFxError: A selector without a match; tensors of one side only, or of two shapes.
    """
    (_, old), (_, new) = base, tuned
    chosen = None if options.include is None else _whole(select(found, options.include))
    gone = _excluded(found, [*old, *(n for n in new if n not in old)], options.exclude or ())

    def wanted(name: str, info: TensorInfo) -> bool:
        return name not in gone and (chosen is None or len(info.shape) < 2 or name in chosen)

    lost = [n for n, t in old.items() if wanted(n, t) and n not in new]
    extra = [n for n, t in new.items() if wanted(n, t) and n not in old]
    shapes = [n for n, t in old.items() if wanted(n, t) and n in new and new[n].shape != t.shape]
    both = [f"{one_line(n, 100)} {list(old[n].shape)} and {list(new[n].shape)}" for n in shapes]
    misfits = (
        ([one_line(n, 100) for n in lost], f"only in {base[0]}"),
        ([one_line(n, 100) for n in extra], f"only in {tuned[0]}"),
        (both, "of two shapes"),
    )
    problems = [f"{len(names)} {what}: {some(names)}" for names, what in misfits if names]
    if problems and not options.allow_missing:
        raise LoraFxError(
            f"{tuned[0]} does not have the tensors of {base[0]}: {'; '.join(problems)}",
            _hint(old, new)
            if len(lost) == len(old)
            else "--allow-missing leaves them out, and "
            "--exclude those that it names; a grown vocabulary has no low-rank update",
        )
    bad = {*lost, *shapes}
    notes = [f"not in the adapter: {text}" for text in problems]
    return [n for n, t in old.items() if wanted(n, t) and n not in bad], notes


def _whole(chosen: Sequence[str]) -> set[str]:
    region = next((k for k in chosen if k.endswith("]")), None)
    if region is not None:
        raise LoraFxError(
            f"{region!r} is a part of a tensor; expected whole tensors",
            "name the tensor; merge and truncate work with parts, extract does not",
        )
    return set(chosen)


def _excluded(found: Found, names: Sequence[str], exclude: str | Sequence[str]) -> set[str]:
    """Names that a selector matches: as a target, else as any tensor."""
    gone: set[str] = set()
    for text in split(exclude):
        try:
            gone |= _whole(select(found, [text]))
        except LoraFxError as e:
            try:
                gone |= set(select_names(names, [text]))
            except LoraFxError:
                raise e from None
    return gone


def _hint(old: Tensors, new: Tensors) -> str:
    """The prefix that would make the names fit, if there is one."""
    verb, lead = lead_between([*old][:3], new)
    said = f"the names of the second {verb} the prefix {lead!r}"
    return said if verb else "are they of one model?"


# The two sides of an extraction under the same names, where either is tied.
#
# A tied file holds its table once, an untied one once for each use. What is one tensor on both
# sides is compared once; what is two on either side gets an update for each, so that the adapter
# says of every use what the tuned model has there.


NamedTensors = tuple[str, Tensors, JsonView]
"""A path, for messages, its tensors and its config.json."""


@dataclass(frozen=True)
class Sides:
    """What is compared.

    Attributes:
        old: The base's tensors; a use that the tuned model tells apart has a name of its own.
        new: The tuned model's, likewise.
        table: The table that is the head too, on both sides; empty where there is none, None where
            only its role can tell.
        tie: The tie of the base, else of the tuned model.
        notes: What has to be said.
    """

    old: Tensors
    new: Tensors
    table: str | None = None
    tie: Tie | None = None
    notes: tuple[str, ...] = ()


def sides_of(base: NamedTensors, tuned: NamedTensors) -> Sides:
    """Both sides with their ties resolved.

    Raises:
        LoraFxError: The tuned model has a head of its own, and the base cannot be given one.
    """
    old, new = dict(base[1]), dict(tuned[1])
    first, second = tie_of(old, base[2], new), tie_of(new, tuned[2], old)
    tie = first or second
    if tie is None:
        return Sides(old, new, "" if any(is_head(n) for n in new) else None)
    sources = tie.sources()
    for name, source in sources.items():
        if first and name in new and name not in old and source in old:
            old[name] = old[source]
        if second and name in old and name not in new and source in new:
            new[name] = new[source]
    copies = [n for n, s in sources.items() if _copy(old, n, s) and _copy(new, n, s)]
    for name in copies:
        del old[name], new[name]
    shape = old[tie.table].shape if tie.table in old else None
    unknown = not tie.head and any(n not in old and t.shape == shape for n, t in new.items())
    notes = []
    if first and tie.head in old and tie.head not in base[1]:
        check_scaled(first, base[2], base[0])
        notes.append(
            f"{tie.head}: a tensor of its own in {tuned[0]}, tied in {base[0]}: lora-fx merge "
            "--untie gives the base one"
        )
    one = first is not None and tie.head not in new and not unknown
    return Sides(old, new, tie.table if one else "", first, tuple(notes))


def _copy(side: Tensors, name: str, source: str) -> bool:
    """True where two names of a side have the same bytes."""
    return name in side and source in side and same_bytes(side[name], side[source])


def check_lookups(sides: Sides, scope: Collection[str], where: str) -> None:
    """Raise where lookups of one table differ, and updates of it cannot say how.

    An update of the table is one of all its lookups, so it has none of its own beside theirs.
    """
    tie = sides.tie
    own = [n for n in tie.lookups if n in scope] if tie is not None else []
    if tie is None or not own:
        return
    said = f"{where}: {own[0]!r} differs from {tie.table!r}, which is the same tensor in the base"
    if not tie.apart:
        raise LoraFxError(said, f"such models hold it once; --exclude {own[0]} leaves it out")
    if tie.table in scope and not same_bytes(sides.old[tie.table], sides.new[tie.table]):
        raise LoraFxError(
            f"{said}, and {tie.table!r} has changed as well: an update of it acts on all lookups",
            f"--exclude {tie.table} leaves it out, if the model looks nothing up in it",
        )
