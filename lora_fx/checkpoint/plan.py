"""The plan of a merge, from headers and adapters alone: what will be written, and every refusal.

Nothing of the base but its headers is read here, and samples of weights where an adapter says
what it was trained on; nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_fx.adapter.adapter import Adapter, mix
from lora_fx.checkpoint.change import Change, change_of
from lora_fx.checkpoint.match import Placed, match, named
from lora_fx.checkpoint.provenance import adapter_hash, base_note, refuse_again
from lora_fx.checkpoint.quantised import refuse_codes
from lora_fx.checkpoint.renamed import renaming
from lora_fx.checkpoint.tied import (
    Tie,
    at_its_use,
    check_unknown,
    needs_untying,
    one_use,
    spread,
    tie_of,
)
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import WEIGHTS, TensorInfo
from lora_fx.text import human, table

__all__ = ["HOWS", "Change", "Given", "Options", "Plan", "make_plan"]
HOWS = ("sum", "cat", "linear", "svd")


@dataclass(frozen=True)
class Given:
    """An adapter, its weight, its name in messages, its hash without the weight, its path."""

    adapter: Adapter
    weight: float
    where: str
    hash: str
    path: Path | None = None

    @classmethod
    def of(cls, adapter: Adapter, weight: float, where: str, path: Path | None = None) -> Given:
        """With its hash."""
        return cls(adapter, weight, where, adapter_hash(adapter), path)


@dataclass(frozen=True)
class Options:
    """What a merge may be asked for; see `lora_fx.merge`."""

    how: str = "sum"
    rank: int | None = None
    dtype: str | None = None
    allow_unused: bool = False
    untie: bool = False
    add: bool = False
    again: bool = False
    allow_missing: bool = False
    any_base: bool = False


@dataclass(frozen=True)
class Plan:
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
        unverified: Those of the notes that say why a base is not known to be an adapter's.
    """

    base: Checkpoint
    given: tuple[Given, ...]
    changes: Mapping[str, Change]
    added: Mapping[str, str] = field(default_factory=dict)
    tie: Tie | None = None
    one_use: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    unverified: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """True when every adapter says that this is the base it was trained on."""
        return not self.unverified

    @property
    def recorded(self) -> dict[str, Any]:
        """Options that say which numbers come out, for the output's metadata: no defaults."""
        asked, mixed = self.options, len(self.given) > 1 and self.options.how in ("linear", "svd")
        kept = {"how": asked.how, "rank": asked.rank} if mixed else {}
        kept |= {n: True for n in ("allow_unused", "allow_missing") if getattr(asked, n)}
        return {n: v for n, v in kept.items() if v is not None}

    @property
    def touched_bytes(self) -> int:
        """Bytes of the output that are computed."""
        return sum(c.nbytes for c in self.changes.values())

    @property
    def disk(self) -> int:
        """Bytes that the output will take, without headers' growth."""
        old = sum(
            c.source.stop - c.source.start for n, c in self.changes.items() if n not in self.added
        )
        return self.base.size + self.touched_bytes - old

    def to_json(self) -> dict[str, Any]:
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


def make_plan(base: Checkpoint, given: Sequence[Given], options: Options) -> Plan:
    """Match adapters to a checkpoint and check everything that can be checked without reading it.

    Raises:
        LoraFxError: Every reason not to merge that headers and adapters show.
    """
    if options.how not in HOWS:
        raise LoraFxError(f"no mix {options.how!r}", f"the mixes are {', '.join(HOWS)}")
    if not given:
        raise LoraFxError("no adapter to merge", "lora-fx merge BASE ADAPTER -o OUT")
    _check_given(base, given, options)
    given = [replace(g, adapter=named(g.adapter, base.tensors)) for g in given]
    config, notes = base.config(), []
    placed: list[Placed] = []
    weighted = _weighted(given, options)
    tie = tie_of(base.tensors, config, [k for a, _ in weighted for k in a.entries])
    known = dict(base.tensors) if tie is None else tie.known(base.tensors)
    for adapter, where in weighted:
        refuse_codes(adapter.entries, base, config)
        new = _new(adapter, base) if options.add else {}
        here, said = match(
            adapter,
            known,
            config,
            str(base.path),
            new=new,
            allow_unused=options.allow_unused,
            allow_missing=options.allow_missing,
        )
        notes += [*adapter.metadata.get("notes", ()), *said, *(f"added: {n}" for n in new)]
        if not here:
            raise LoraFxError(
                f"{where}: none of its keys is in {base.path}",
                "is it the adapter of another model?",
            )
        placed += (at_its_use(p, tie, str(base.path)) for p in here)
        known |= new
    check_unknown(placed, tie, base.tensors, config, str(base.path))
    checks = [base_note(g.adapter, g.where, base, known, options.any_base) for g in given]
    sources = {n: t for n, t in known.items() if n not in base.tensors and t.stop == 0}
    copies: dict[str, str] = {}
    meant: tuple[str, ...] = ()
    if tie is not None:
        apart = needs_untying(placed, tie, config, str(base.path), untie=options.untie)
        copies = tie.new(base.tensors) if apart else {}
        meant = tuple(dict.fromkeys(p.key for p in one_use(placed, tie)))
        sources |= {n: base.tensors[source] for n, source in copies.items()}
        placed = spread(placed, tie, {*base.tensors, *sources})
        tie = tie if apart else None
    by_tensor: dict[str, list[Placed]] = {}
    for p in placed:
        by_tensor.setdefault(p.tensor, []).append(p)
    changes = {}
    for name in (*(n for n in base.tensors if n in by_tensor), *(n for n in sources)):
        info = sources.get(name) or base.tensors[name]
        change = change_of(name, info, by_tensor.get(name, []), base, options.dtype)
        if name in copies and change.value is None:
            change = replace(change, what=(f"copy of {copies[name]}", *change.what))
        elif name in sources:
            change = replace(change, what=("added",))
        changes[name] = change
        if (scales := change.scales) is not None:
            _check_free(scales.name, by_tensor, base)
            changes[scales.name] = scales
    notes += _kept(changes.values(), options)
    homes = {n: info.file.relative_to(base.folder).as_posix() for n, info in sources.items()}
    unverified = tuple(c for c in checks if c)
    notes = list(dict.fromkeys([*notes, *unverified]))
    return Plan(base, tuple(given), changes, homes, tie, meant, tuple(notes), options, unverified)


def _check_free(scales: str, placed: Mapping[str, Sequence[Placed]], base: Checkpoint) -> None:
    if scales in placed:
        raise LoraFxError(
            f"{base.path}: {placed[scales][0].key!r} changes the scales of an int8 weight that "
            "another update changes too",
            "merge one adapter after the other",
        )


def _kept(changes: Iterable[Change], options: Options) -> list[str]:
    """What --dtype does not mean."""
    names = [c.name for c in changes if c.int8 is not None]
    if not names or options.dtype is None:
        return []
    return [f"--dtype {options.dtype}: {len(names)} int8 tensors stay int8, {names[0]} among them"]


def _check_given(base: Checkpoint, given: Sequence[Given], options: Options) -> None:
    """Raise for weights that are no numbers, and for an adapter that is merged twice."""
    if options.rank is not None and options.rank < 1:
        raise LoraFxError(f"rank is {options.rank}; expected 1 or more", "for example --rank 16")
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
    refuse_again(base, [(g.where, g.hash) for g in given], again=options.again)


def _weighted(given: Sequence[Given], options: Options) -> list[tuple[Adapter, str]]:
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
    dtypes = [t.dtype for t in base.tensors.values() if t.dtype in WEIGHTS] or ["float32"]
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count)
    rename = renaming(adapter, base.tensors, base.config(), [])

    def kept(name: str) -> str:
        return dtype if name in WEIGHTS else name

    return {
        key: TensorInfo(kept(full.value.dtype.name), tuple(full.value.shape), shard, 0, 0)
        for key, full in adapter.full.items()
        if rename.info(key, base.tensors) is None
    }
