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

from lora_fx.adapter.adapter import OTHER_READERS, Adapter, mix
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.match import match
from lora_fx.checkpoint.merge_options import MergeOptions
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.provenance import history, layout_hash, refuse_again, sample_hash
from lora_fx.checkpoint.refusal import READ_TOO, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.checkpoint.requantise import in_all, sampled
from lora_fx.checkpoint.stored_codes import refuse_codes
from lora_fx.checkpoint.tensor_change import TensorChange, change_of, requantised, scales_change
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.checkpoint.tied_uses import (
    check_unknown,
    of_one_use,
    one_change,
    spread,
    tie_and_names,
)
from lora_fx.checkpoint.trained_on import base_note, other_model
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.hub import hub_record
from lora_fx.files.quantised.dequantise import (
    CodesInfo,
    dequantised,
    is_view,
    refuse_left,
    view_notes,
)
from lora_fx.files.safetensors import TensorInfo
from lora_fx.text import Json, by_key, human, table


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


_RECORDED = ("allow_unused", "allow_missing", "other_readers", "dequantise", "requantise")


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
        base = dequantised(base, options.dtype_of_codes, options.shard_bytes)
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
        dtype = options.dtype_of_codes if isinstance(info, CodesInfo) else options.dtype
        change = change_of(name, info, by_tensor.get(name, []), base, dtype)
        if name in copies and change.value is None:
            change = replace(change, what=(f"copy of {copies[name]}", *change.what))
        elif name in sources:
            change = replace(change, what=("added",))
        changes[name] = change
        if (int8 := change.int8) is not None:
            _check_free(int8.name, by_tensor, base)
            changes[int8.name] = scales_change(int8.name, int8.scales, name)
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
    sizes = f"{human(plan.disk)}B of {options.dtype_of_codes}, now {human(base.size)}B"
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
