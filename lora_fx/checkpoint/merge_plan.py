"""The plan of a merge, from headers and adapters alone: what will be written, and every refusal.

Nothing of the base but its headers is read here, and samples of weights where an adapter says
what it was trained on; nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import OTHER_READERS, Adapter, mix
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import ReplacedRows, Rotation, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.fold import Matrix, Stats, TensorFold, arithmetic, in_dtype, joined, region
from lora_fx.checkpoint.match import match
from lora_fx.checkpoint.model_families import Tie
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.provenance import (
    base_note,
    history,
    layout_hash,
    other_model,
    refuse_again,
    sample_hash,
)
from lora_fx.checkpoint.refusal import READ_TOO, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.checkpoint.requantise import Int8, in_all, int8_of, refuse_codes, sampled, stored_as
from lora_fx.checkpoint.tied_uses import (
    check_unknown,
    of_one_use,
    one_change,
    spread,
    tie_and_names,
)
from lora_fx.dtypes import DTYPES, FLOATING, Array, finfo, long_name
from lora_fx.errors import LoraFxError, MisfitError, expect_name, near, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.hub import hub_record
from lora_fx.files.quantised.dequantise import (
    SHARD,
    CodesInfo,
    dequantised,
    is_view,
    refuse_left,
    view_notes,
)
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.target import overlap
from lora_fx.text import Json, by_key, human, size_in_bytes, table


def refuse_rank(how: str, rank: int | None) -> None:
    """Refuse a rank for a mix that has none to choose."""
    if rank is not None and how != "svd":
        raise LoraFxError(f"rank has no say for a {how} mix", "leave it out; rank belongs to svd")


@dataclass(frozen=True)
class Given:
    """An adapter, its weight, its name in messages, its hash without the weight, its path.

    `stated` is True where the weight was given, and not left at 1.
    """

    adapter: Adapter
    weight: float
    where: str
    hash: str
    path: Path | None = None
    stated: bool = False

    def record(self) -> Json:
        """What the metadata of a merge keeps of it."""
        return {"hash": self.hash, "weight": self.weight, **hub_record(self.path)}


HOWS = ("sum", "cat", "linear", "svd")
_RECORDED = ("allow_unused", "allow_missing", "other_readers", "dequantise", "requantise")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Which numbers a merge writes, and what it accepts; an object that exists is in order."""

    how: str = "sum"
    rank: int | None = None
    dtype: str | None = None
    allow_unused: bool = False
    untie: bool = False
    add: bool = False
    again: bool = False
    allow_missing: bool = False
    any_base: bool = False
    other_readers: bool = False
    trust: bool = False
    dequantise: bool = False
    requantise: bool = False
    lossy: bool = False
    max_shard_size: int | str | None = None

    def __post_init__(self) -> None:
        """Raise for a mix or dtype that is not known, and for sizes that are none."""
        object.__setattr__(self, "dtype", long_name(self.dtype))
        if self.dtype not in (None, *FLOATING):
            known = f"one of {', '.join(FLOATING)}"
            name = str(self.dtype).removeprefix("torch.")
            raise LoraFxError(f"no dtype {self.dtype!r}", near(name, FLOATING, known))
        expect_name(self.how, HOWS, "no mix", f"one of {', '.join(HOWS)}")
        refuse_rank(self.how, self.rank)
        if self.rank is not None and self.rank < 1:
            raise LoraFxError(f"rank is {self.rank}; expected 1 or more", "for example --rank 16")
        if self.dequantise and self.requantise:
            raise LoraFxError("both --dequantise and --requantise", "choose one")
        if self.lossy and not self.requantise:
            raise LoraFxError("--lossy is of --requantise", "leave it out")
        if self.requantise and self.dtype is not None:
            raise LoraFxError("--dtype beside --requantise, which keeps dtypes", "leave it out")
        if self.max_shard_size is not None and not self.dequantise:
            raise LoraFxError("--max-shard-size is of --dequantise", "shards stay as they are else")
        if self.shard < 1:
            raise LoraFxError("shards of 0 bytes; expected 1 or more", "--max-shard-size 5GB")

    @property
    def stored(self) -> str:
        """The dtype of weights that were codes."""
        return self.dtype or "bfloat16"

    @property
    def shard(self) -> int:
        """Bytes of a shard where weights were codes; raises for a text that is no size."""
        size = self.max_shard_size
        return SHARD if size is None else size if isinstance(size, int) else size_in_bytes(size)


LENIENT = MergeOptions(untie=True, again=True, any_base=True, other_readers=True)
"""For a merge that is looked at, not carried out: what an option would allow is no refusal."""


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out.

    Attributes:
        base: The checkpoint.
        given: The adapters.
        changes: Tensor of the output → what becomes of it.
        added: Names among them that the base lacks → the shard that takes them.
        tie: Set where config.json has to say that head and embedding are no longer tied.
        one_use: Keys of updates that mean one use of a tied table, for which it is untied.
        notes: What should be said.
        options: As asked.
        unverified: Those of the notes that say why a base is not known to be an adapter's; none
            where every adapter says that this is the base it was trained on.
    """

    base: Checkpoint
    given: tuple[Given, ...]
    changes: Mapping[str, TensorChange]
    added: Mapping[str, str] = field(default_factory=dict)
    tie: Tie | None = None
    one_use: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: MergeOptions = field(default_factory=MergeOptions)
    unverified: tuple[str, ...] = ()

    def record(self) -> str:
        """The metadata of the output: the base's history and this merge, without its defaults."""
        asked, mixed = self.options, len(self.given) > 1 and self.options.how in ("linear", "svd")
        kept = {"how": asked.how, "rank": asked.rank} if mixed else {}
        kept |= {n: True for n in _RECORDED if getattr(asked, n)}
        options = {n: v for n, v in kept.items() if v is not None}
        old = ((n, self.base.tensors[n]) for n in self.changes if n not in self.added)
        named = hub_record(self.base.path)
        this = {
            **stamp(),
            "base": {"layout": layout_hash(self.base.tensors), "sample": sample_hash(old)} | named,
            "adapters": [g.record() for g in self.given],
            "dtype": asked.dtype,
        } | ({"options": options} if options else {})
        return json.dumps([*history(self.base), this], separators=(",", ":"))

    @property
    def touched_bytes(self) -> int:
        """Bytes of the output that are computed."""
        return sum(c.nbytes for c in self.changes.values())

    @property
    def disk(self) -> int:
        """Bytes that the output will take, without headers' growth."""
        old = (c.source for n, c in self.changes.items() if n not in self.added)
        return self.base.size + self.touched_bytes - sum(s.stop - s.start for s in old)

    def to_json(self) -> Json:
        """What a dry run prints."""
        return {
            "tensors": [c.to_json() for c in self.changes.values()],
            "touched_bytes": self.touched_bytes,
            "disk_bytes": self.disk,
        }

    def __str__(self) -> str:
        """A table, and the sums."""
        rows = [("tensor", "shape", "dtype", "update")]
        rows += [
            (c.name, "×".join(map(str, c.shape)), c.dtype, "; ".join(c.what))
            for c in self.changes.values()
        ]
        total = len(self.base.tensors) + len(self.added)
        lines = table([(*r,) for r in rows])
        lines.append(
            f"{len(self.changes)} of {total} tensors change, {human(self.touched_bytes)}B of "
            f"{human(self.disk)}B; disk needed: {human(self.disk)}B"
        )
        return "\n".join(lines)


def make_plan(base: Checkpoint, given: Sequence[Given], options: MergeOptions) -> MergePlan:
    """Match adapters to a checkpoint and check everything that can be checked without reading it.

    Raises:
        LoraFxError: Every reason not to merge that headers and adapters show.
    """
    if not given:
        raise LoraFxError("no adapter to merge", "lora-fx merge BASE ADAPTER -o OUT")
    stored = base
    if (options.dequantise or options.requantise) and not is_view(base):
        base = dequantised(base, options.stored, options.shard)
        if options.dequantise:
            refuse_left(base)
            stored = base
    _check_given(base, given, options)
    given = [replace(g, adapter=g.adapter.resolved(base.tensors)) for g in given]
    config, notes = base.config(), _read_too(given, options)
    placed: list[Placed] = []
    weighted = _weighted(given, options)
    tie, known = tie_and_names(base, [k for a, _ in weighted for k in a.entries])
    for adapter, where in weighted:
        try:
            refuse_codes(adapter.entries, base, config)
        except LoraFxError as error:
            hint = error.hint
            if not (options.dequantise or options.requantise):
                hint = _ways_on(base, given, options) or hint
            pooled = (v for u in adapter.lowrank.values() if (v := variant_of(u)).constant_over)
            if (variant := next(pooled, None)) is not None:
                hint = f"lora-fx export puts {variant.title} into zero points, without loss; {hint}"
            raise LoraFxError(error.message, hint) from error
        new = _new(adapter, base) if options.add else {}
        with _of_another_model(adapter, where, base):
            here, said = match(
                adapter,
                known,
                config,
                str(base.path),
                new=new,
                allow_unused=options.allow_unused,
                allow_missing=options.allow_missing,
                source=where,
            )
        notes += [*adapter.metadata.get("notes", ()), *said, *(f"added: {n}" for n in new)]
        if not here:
            raise LoraFxError(
                f"{where}: none of its keys is in {base.path}",
                "is it the adapter of another model?",
            )
        placed += (p.at_its_use(tie, base, untie=options.untie) for p in here)
        known = {**known, **new}
    check_unknown(placed, tie, base)
    checks = [base_note(g.adapter, g.where, base, known, options.any_base) for g in given]
    sources = {n: t for n, t in known.items() if n not in base.tensors and t.stop == 0}
    copies: dict[str, str] = {}
    meant: tuple[str, ...] = ()
    if tie is not None:
        placed = one_change(placed, tie)
        apart = of_one_use(placed, tie, config, str(base.path), untie=options.untie)
        copies = tie.new(base.tensors) if apart else {}
        meant = tuple(dict.fromkeys(p.key for p in apart))
        sources |= {n: base.tensors[source] for n, source in copies.items()}
        placed = spread(placed, tie, {*base.tensors, *sources})
        tie = tie if apart else None
    by_tensor = by_key((p.tensor, p) for p in placed)
    changes: dict[str, TensorChange] = {}
    codes = [n for n, t in base.tensors.items() if isinstance(t, CodesInfo)]
    names = {*by_tensor, *codes} if options.dequantise else by_tensor.keys()
    for name in (*(n for n in base.tensors if n in names), *(n for n in sources)):
        info = base.tensors.get(name)
        if options.requantise and isinstance(info, CodesInfo):
            changes |= requantised(name, info, by_tensor[name], stored)
            continue
        info = sources.get(name) or base.tensors[name]
        dtype = options.stored if isinstance(info, CodesInfo) else options.dtype
        change = change_of(name, info, by_tensor.get(name, []), base, dtype)
        if name in copies and change.value is None:
            change = replace(change, what=(f"copy of {copies[name]}", *change.what))
        elif name in sources:
            change = replace(change, what=("added",))
        changes[name] = change
        if (int8 := change.int8) is not None:
            _check_free(int8.name, by_tensor, base)
            changes[int8.name] = _scales(int8.name, int8.scales, name)
    narrow = [c.name for c in changes.values() if c.int8 is not None]
    if narrow and options.dtype is not None:
        stay = f"{len(narrow)} int8 tensors stay int8, {narrow[0]} among them"
        notes.append(f"--dtype {options.dtype}: {stay}")
    notes += view_notes(stored)
    homes = {n: _home(stored, copies.get(n)) for n in sources}
    unverified = tuple(c for c in checks if c)
    notes = list(dict.fromkeys([*notes, *unverified]))
    return MergePlan(
        stored, tuple(given), changes, homes, tie, meant, tuple(notes), options, unverified
    )


@contextlib.contextmanager
def _of_another_model(adapter: Adapter, where: str, base: Checkpoint) -> Iterator[None]:
    """A block whose errors begin with what the two configs say, where they name two models."""
    try:
        yield
    except LoraFxError as error:
        if not (told := other_model(adapter, where, base)):
            raise
        if isinstance(error, MergeRefusal):
            raise error.after(told) from error
        raise LoraFxError(f"{told}: {error.message}", error.hint) from error


def _ways_on(base: Checkpoint, given: Sequence[Given], options: MergeOptions) -> str:
    """What merging into codes would cost, either way; empty where neither can be done."""
    try:
        plan = make_plan(base, given, replace(options, dequantise=True))
        folds = [
            (c.source, c.fold)
            for c in plan.changes.values()
            if isinstance(c.source, CodesInfo) and c.fold is not None and c.fold.matrix.parts
        ]
        kept, noise = in_all(sampled(folds))
    except LoraFxError:
        return ""
    sizes = f"{human(plan.disk)}B of {options.stored}, now {human(base.size)}B"
    return (
        f"--dequantise writes floats ({sizes}); --requantise keeps codes, and {kept:.0%} of the "
        f"update with noise of {noise:.1f} times its size, by a sample of rows"
    )


def _home(base: Checkpoint, source: str | None) -> str:
    """The shard of a new tensor: that of what it is a copy of, else the last."""
    shards = [n for n, header in base.shards.items() if source in header.tensors]
    return shards[0] if shards else [*base.shards][-1]


def _read_too(given: Sequence[Given], options: MergeOptions) -> list[str]:
    """Raise where a weight is read by more than the products that its update is for; or note it."""
    notes = []
    for g in given:
        read = g.adapter.metadata.get(OTHER_READERS) or {}
        for key in (k for k in read if k in g.adapter.entries):
            said = f"{g.where}: the update of {key!r} does not reach {', '.join(read[key])}"
            if not options.other_readers:
                raise MergeRefusal(
                    READ_TOO,
                    [key],
                    f"{said}, which reads the tensor too; a merge would change that",
                    "lora-fx export keeps them apart; --other-readers merges all the same",
                )
            notes.append(f"{said}, which the merged tensor changes")
    return notes


def _check_free(scales: str, placed: Mapping[str, Sequence[Placed]], base: Checkpoint) -> None:
    if scales in placed:
        raise LoraFxError(
            f"{base.path}: {placed[scales][0].key!r} changes the scales of an int8 weight that "
            "another update changes too",
            "merge one adapter after the other",
        )


def _check_given(base: Checkpoint, given: Sequence[Given], options: MergeOptions) -> None:
    """Raise for weights that are no numbers, and for an adapter that is merged twice."""
    seen: dict[str, str] = {}
    for g in given:
        if not math.isfinite(g.weight):
            raise LoraFxError(
                f"{g.where}: its weight is {g.weight:g}; expected a finite number",
                "for example ADAPTER:0.5",
            )
        if g.hash in seen and not options.again:
            other = seen[g.hash]
            raise LoraFxError(
                f"{g.where} is given twice{'' if g.where == other else f', as {other} too'}",
                "give it once, with the sum of the weights; --again merges it twice",
            )
        seen[g.hash] = g.where
    hashes = [(g.where, g.hash) for g in given]
    refuse_again(base.path, history(base), hashes, again=options.again)


def _weighted(given: Sequence[Given], options: MergeOptions) -> list[tuple[Adapter, str]]:
    """The adapters to add one after the other: as given, or their one mix."""
    if len(given) == 1 or options.how in ("sum", "cat"):
        if options.rank is not None:
            raise LoraFxError(
                "only an svd mix of several adapters has a rank to choose",
                "--how svd, or no --rank",
            )
        return [(g.adapter.weighted(g.weight), g.where) for g in given]
    parts = [(g.adapter, g.weight) for g in given]
    return [(mix(parts, options.how, options.rank), " + ".join(g.where for g in given))]


def _new(adapter: Adapter, base: Checkpoint) -> dict[str, TensorInfo]:
    """Whole tensors that the base lacks, such as a new head, in the dtype of most of the base."""
    shard = base.folder / list(base.shards)[-1]
    dtypes = [t.dtype for t in base.tensors.values() if t.dtype in FLOATING] or ["float32"]
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count)
    rename = renaming(adapter, base.tensors, base.config(), [])
    new = {k: v.value for k, v in adapter.full.items() if rename.info(k) is None}
    kinds = {k: dtype if v.dtype.name in FLOATING else v.dtype.name for k, v in new.items()}
    return {k: TensorInfo(kinds[k], v.shape, shard, 0, 0) for k, v in new.items()}


# What becomes of one tensor of a checkpoint: all updates that mean it, checked against it.


_APART = "merge one adapter after the other"


Stage = tuple[TensorFold, str]
"""What a merge does to a tensor: its fold, and the dtype that it rounds to."""


@dataclass(frozen=True)
class TensorChange:
    """What becomes of one tensor of the output.

    Attributes:
        name: In the output.
        source: Where the base's tensor lies.
        dtype: The dtype of the output.
        fold: W + Δ; None where the tensor is replaced whole.
        value: The whole new tensor; None where it is folded.
        what: The kinds, ranks and scales of its updates, for people.
        earlier: Merges before this one, oldest first; only where verify looks back.
        int8: How it is stored where that is int8, which is quantised anew without being asked.
        scales_of: Where the tensor is the scales of such a weight, and is written with it: its
            name; else empty.
        codes: The weight that it holds the codes of, where these are made anew; `name` and
            `source` are those of the codes. None for others.
    """

    name: str
    source: TensorInfo
    dtype: str
    fold: TensorFold | None = None
    value: Array | None = None
    what: tuple[str, ...] = ()
    earlier: tuple[Stage, ...] = ()
    int8: Int8 | None = None
    scales_of: str = ""
    codes: CodesInfo | None = None

    @property
    def weight(self) -> TensorInfo:
        """Where W is read."""
        return self.codes or self.source

    def spans(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of about `most` of the rows that are folded, each of which can be done alone."""
        assert self.fold is not None
        if self.codes is not None:
            yield from self.codes.weight.spans(most)
            return
        for low in range(0, self.fold.matrix.rows, most):
            yield low, min(self.fold.matrix.rows, low + most)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base's tensor, which is that of the output's."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """How many bytes the output's tensor has."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    def to_json(self, s: Stats | None = None) -> Json:
        """A row of `tensors[]` in docs/json.md; what only a merge knows, `s`, is null before."""
        missed, gain = (s.missed, s.gain) if s else (None, None)
        return {
            "key": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "updates": list(self.what),
            "bytes": self.nbytes,
            "ratio": s.ratio if s and math.isfinite(s.ratio) else None,  # of a tensor of zeros
            "lost": s.lost if s else None,
            "gain": gain,
            "int8": {"scheme": self.int8.scheme, "scales": self.int8.name, "error": missed,
                     "own": s.coarse if s else None} if self.int8 else None,
            "requantised": {"format": self.codes.weight.format,
                            "scales": self.codes.weight.anew.scales, "kept": gain, "noise": missed}
            if self.codes and self.codes.weight.anew and self.requantised else None,
        }  # fmt: skip

    @property
    def requantised(self) -> bool:
        """True where its codes are made anew because that was asked for."""
        return self.codes is not None and self.int8 is None


def change_of(
    name: str, info: TensorInfo, placed: Sequence[Placed], base: Checkpoint, dtype: str | None
) -> TensorChange:
    """All updates of one tensor.

    Args:
        name: The tensor's name.
        info: Where it lies in the base, or what is known of a tensor to add.
        placed: The updates; none for a copy.
        base: The checkpoint.
        dtype: The output's dtype where it is a float tensor; as stored where None.

    Raises:
        LoraFxError: A tensor that nothing can be folded into, updates that exclude each other,
            values that the output's dtype cannot hold.
    """
    int8 = stored_as(name, info, base, [p.entry for p in placed])
    out = dtype if dtype and info.dtype in FLOATING else info.dtype
    whole = next((p.entry for p in placed if isinstance(p.entry, Full)), None)
    if whole is not None:
        if len(placed) > 1:
            key = next(p.key for p in placed if p.entry is whole)
            raise LoraFxError(
                f"{base.path}: {name!r} is replaced whole by {key!r} and changed by another "
                "update too",
                _APART,
            )
        _check_whole(name, info, whole.value, out)
        return TensorChange(name, info, out, value=whole.value, what=("replaced whole",))
    _check_apart(name, placed, base)
    matrices: list[Matrix] = []
    for p in placed:
        if not isinstance(p.entry, ReplacedRows):
            assert not isinstance(p.entry, Full)
            matrices.append(region(info.shape, p.bounds, p.entry))
    rows = _rows(name, placed, base)
    if rows or not matrices:
        split = -1 if isinstance(info, CodesInfo) else 1
        sizes = math.prod(info.shape[:split]), math.prod(info.shape[split:])
        matrices.append(Matrix(*sizes, ()))
    matrix = in_dtype(joined(name, matrices), arithmetic(info.dtype, out))
    codes = None
    if int8 is not None:
        int8.check(name, info, matrix)
        weight = int8.weight(info)
        codes = CodesInfo("float32", info.shape, info.file, info.start, info.stop, weight)
    what = tuple(map(_said, placed)) or (("dequantised",) if isinstance(info, CodesInfo) else ())
    fold = TensorFold(name, matrix, rows)
    return TensorChange(name, info, out, fold, what=what, int8=int8, codes=codes)


def requantised(
    name: str, info: CodesInfo, placed: Sequence[Placed], base: Checkpoint
) -> dict[str, TensorChange]:
    """All updates of a weight whose codes are made anew: what becomes of the tensors of it.

    Raises:
        LoraFxError: A format that is read and not written, a whole tensor in the place of codes.
    """
    if (int8 := int8_of(name, base)) is not None:
        change = change_of(name, base.tensors[name], placed, base, None)
        return {name: change, int8.name: _scales(int8.name, int8.scales, name)}
    weight = info.weight
    anew, why = weight.anew, f"{weight.format} is read, and not written"
    if any(isinstance(p.entry, Full) for p in placed):
        anew, why = None, "the adapter replaces it whole, by floats"
    if anew is None:
        raise LoraFxError(f"{base.path}: {name!r} cannot be quantised anew: {why}", "--dequantise")
    change = change_of(name, info, placed, base, "float32")
    codes, *scales = anew.recoded
    source, what = base.tensors[codes], (*change.what, f"requantised, {anew.scales} scales")
    change = replace(change, name=codes, source=source, dtype=source.dtype, what=what, codes=info)
    return {codes: change, **{n: _scales(n, base.tensors[n], name) for n in scales}}


def _scales(name: str, info: TensorInfo, weight: str) -> TensorChange:
    """What becomes of the scales of a weight that is quantised anew."""
    what = (f"new scales of {weight}",)
    return TensorChange(name, info, info.dtype, what=what, scales_of=weight)


def _check_whole(name: str, info: TensorInfo, value: Array, dtype: str) -> None:
    """Raise where a whole tensor cannot be stored as `dtype`."""
    kind = value.dtype.name
    floats = dtype in FLOATING and kind in FLOATING
    if not floats and kind != dtype:
        raise MisfitError(
            f"{info.file}: tensor {name!r} is {dtype}, but the adapter replaces it by {kind}; "
            "expected the same kind"
        )
    if not floats or not value.size:
        return
    high, low = float(value.max()), float(value.min())
    if not math.isfinite(high - low):
        raise LoraFxError(
            f"the adapter's whole tensor {name!r} has NaN or infinite values; expected finite ones",
            "training may have diverged; use an earlier checkpoint",
        )
    limit = float(finfo(dtype).max)
    if max(high, -low) > limit:
        worst = high if high > limit else low
        raise LoraFxError(
            f"{info.file}: tensor {name!r} is {dtype}, which cannot hold the adapter's {worst:g}",
            "--dtype bfloat16 or float32 can",
        )


def _check_apart(name: str, placed: Sequence[Placed], base: Checkpoint) -> None:
    """Raise where an update's rescaling and another update meet: their order would matter."""
    for p in placed:
        how = "rotates it (OFT)" if isinstance(p.entry, Rotation) else ""
        if isinstance(p.entry, LowRank) and variant_of(p.entry).reads_weight:
            how = f"rescales it ({name_of(p.entry)})"
        if isinstance(p.entry, LowRank) and p.entry.mutated:
            how = f"is for a base that {p.entry.mutated} changed"
        others = (q for q in placed if q is not p and not isinstance(q.entry, ReplacedRows))
        if how and any(overlap(p.bounds, q.bounds) for q in others):
            raise LoraFxError(
                f"{base.path}: {p.key!r} {how}, and another update changes {name!r} too", _APART
            )


def _rows(name: str, placed: Sequence[Placed], base: Checkpoint) -> Mapping[int, Array]:
    """Row → its new values, each from one update."""
    rows: dict[int, Array] = {}
    for p in placed:
        if not isinstance(p.entry, ReplacedRows):
            continue
        for i, value in zip(p.entry.index, p.entry.value, strict=True):
            if i in rows and not np.array_equal(rows[i], value):
                raise LoraFxError(
                    f"{base.path}: row {i} of {name!r} is replaced twice, by different values",
                    _APART,
                )
            rows[i] = value
    return rows


def _said(p: Placed) -> str:
    entry = p.entry
    if isinstance(entry, ReplacedRows):
        return f"{len(entry.index)} rows"
    assert not isinstance(entry, Full)
    rank = f" rank {entry.rank}" if hasattr(entry, "rank") else ""
    part = p.key[p.key.index("[") :] if p.key.endswith("]") else ""
    return f"{name_of(entry)}{part}{rank} scale {entry.scale:.6g}"
