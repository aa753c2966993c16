"""The class Adapter: a set of updates (key → LowRank or Full), independent of file formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_fx.adapter.bind import OTHER_READERS, bound_entries, reading
from lora_fx.adapter.expert_stacks import place
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.learning import LEARNS
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.mix import HOWS, Pair, mixed_update
from lora_fx.adapter.scaled_rows import has_gains, scaled_gains
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, is_on_base, is_plain, name_of
from lora_fx.adapter.variant import names_taken
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect
from lora_fx.ir.layout import plain_layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name
from lora_fx.targets.selectors import select_names
from lora_fx.text import Json, JsonView, counted, html, human, some

INVOCATION = "invocation"
"""The field of metadata with an aLoRA's invocation tokens; see `lora_fx.adapter.invocation`."""


class FileNames(Protocol):
    """The names of an adapter whose keys are not a model's parameter names (kohya, diffusers)."""

    @property
    def format(self) -> str:
        """The format of the names: kohya or diffusers."""

    def resolve(self, adapter: Adapter, names: Iterable[str]) -> Adapter:
        """Return the adapter with a model's parameter names as keys; see `formats.naming`."""

    def to_json(self) -> Json:
        """Return the metadata from which these names are restored when a saved adapter is read."""


@dataclass(frozen=True)
class Adapter(Mapping[str, Entry]):
    """A mapping of keys to updates, with metadata (dropout, base name, where it was trained).

    An adapter from a file is *unbound*: its keys are the file's names and its layouts are not
    known. `bind` gives it those of a model.

    Attributes:
        entries: key → update.
        metadata: Facts about the adapter, by name, as JSON has them.
        names: How its keys lead to parameters, where its file does not name them; else None.
    """

    entries: Mapping[str, Entry]
    metadata: JsonView = field(default_factory=dict)
    names: FileNames | None = None

    def __repr__(self) -> str:
        """The kinds and shapes of the adapter's updates."""
        _, *rows = self._rows()
        updates = [" ".join(filter(None, row)) for row in rows]
        return f"Adapter({some(updates)})"

    def _repr_html_(self) -> str:
        """The table of the adapter's updates, for notebooks."""
        return html(
            f"{counted(len(self), 'update')}, {human(self.parameters)} parameters", self._rows()
        )

    def _rows(self) -> list[tuple[str, ...]]:
        """A table of the adapter's updates; its first row has the names of the columns."""
        rows: list[tuple[str, ...]] = [("key", "kind", "shape", "rank")]
        for key, entry in self.entries.items():
            value = entry.value if isinstance(entry, Full) else entry
            shape = getattr(value, "shape", ())
            shape_text = str(list(shape)) if shape else ""
            rank_text = f"rank {entry.rank}" if isinstance(entry, LowRank) else ""
            rows.append((key, name_of(entry), shape_text, rank_text))
        return rows

    def __getitem__(self, key: str) -> Entry:
        """The update of a key."""
        return self.entries[key]

    def __len__(self) -> int:
        """Number of updates."""
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self.entries)

    @property
    def lowrank(self) -> dict[str, LowRank]:
        """The low-rank updates."""
        return {key: entry for key, entry in self.entries.items() if isinstance(entry, LowRank)}

    @property
    def full(self) -> dict[str, Full]:
        """The whole tensors."""
        return {key: entry for key, entry in self.entries.items() if isinstance(entry, Full)}

    @property
    def others(self) -> dict[str, str]:
        """{key: what it is} of entries that only a merge of checkpoints can apply."""
        return {key: name_of(entry) for key, entry in self.entries.items() if not is_plain(entry)}

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on an aLoRA acts; empty for an adapter that acts on all tokens."""
        return tuple(self.metadata.get(INVOCATION, ()))

    @property
    def parameters(self) -> int:
        """Number of trained elements."""
        return sum(_size(key, entry) for key, entry in self.entries.items())

    def deltas(self, base: object = None, dtype: npt.DTypeLike = "float64") -> dict[str, Array]:
        """Return {key: ΔW in stored layout}; for an unbound update, ΔW is [out, in].

        Args:
            base: Not needed by lora and rslora.
            dtype: The dtype of the arithmetic and of the result; of complex factors the complex one
                of as many bits a part.

        Raises:
            LoraFxError: An update whose effect depends on the base (DoRA, PiSSA, OLoRA).
        """
        emitter = NumpyEmitter()
        deltas = {}
        for key, low in self.lowrank.items():
            if not is_plain(low):
                raise LoraFxError(
                    f"the adapter's {key!r} is {name_of(low)}, whose ΔW depends on the base",
                    "merge it into its base",
                )
            matrix = low.matrix(dtype)
            layout = low.layout or plain_layout(matrix.shape)
            deltas[key] = layout.to_stored(emitter, matrix)
        return deltas

    def weighted(self, weight: float) -> Adapter:
        """Return the adapter with every ΔW multiplied by `weight`; refuse whole tensors and rows.

        Raises:
            LoraFxError: The weight is no finite number; or it is not 1, and the adapter holds whole
                tensors, rows, or DoRA, whose effect is not in proportion to its update.
        """
        expect(weight, Real, "the weight", "a number", "pass 0.5, for example")
        if not math.isfinite(weight):
            raise LoraFxError(
                f"the weight is {weight}; expected a finite number", "pass 0.5, for example"
            )
        if weight == 1.0:
            return self
        scaled: dict[str, Entry] = {}
        for key, entry in self.entries.items():
            if isinstance(entry, Hadamard) or (isinstance(entry, LowRank) and is_plain(entry)):
                scaled[key] = replace(entry, alpha=entry.alpha * weight)
            elif isinstance(entry, (Kronecker, Dense)):
                scaled[key] = replace(entry, scale=entry.scale * weight)
            elif isinstance(entry, LowRank) and has_gains(entry):
                scaled[key] = scaled_gains(entry, weight)
            else:
                raise LoraFxError(
                    f"weight {weight:g}: the adapter's {key!r} is {name_of(entry)}",
                    "leave the weight out; only updates that are proportional to their scale can "
                    "have one",
                )
        return replace(self, entries=scaled)

    def select(
        self, include: str | Sequence[str] = "", exclude: str | Sequence[str] = ""
    ) -> Adapter:
        """Return the updates that `include` selects (all if empty) and `exclude` does not.

        Args:
            include: Selectors of keys: globs on a dotted suffix, or re:REGEX.
            exclude: The same.

        Raises:
            LoraFxError: A selector that names no key, or nothing left.
        """
        names = list(dict.fromkeys(map(base_name, self.entries)))
        chosen = set(names)
        if include:
            chosen = set(select_names(names, include, "include"))
        if exclude:
            chosen -= set(select_names(names, exclude, "exclude"))
        entries = {key: entry for key, entry in self.entries.items() if base_name(key) in chosen}
        if not entries:
            raise LoraFxError("no update of the adapter is left", "change --include and --exclude")
        return replace(self, entries=entries)

    def resolved(self, names: Iterable[str]) -> Adapter:
        """Return this adapter with a model's parameter names as keys, if its file has others."""
        if self.names is None:
            return self
        return self.names.resolve(self, names)

    def bind(
        self, model: object, args: Sequence[object] = (), kwargs: JsonView | None = None
    ) -> Adapter:
        """Return this adapter with the keys and layouts of a module, Captured, Found or folder.

        Raises:
            LoraFxError: A key that the model lacks, a shape that does not fit, or a whole ΔW, which
                insert and fold add to the base's values.
        """
        import lora_fx  # the verbs live above this module; only the facade knows them

        if isinstance(model, Found):
            return bind(self, model)
        return bind(self, lora_fx.find(model, args, kwargs))


def check_entries(adapter: Adapter) -> None:
    """Raise for an adapter that a user made of something else than updates.

    Raises:
        LoraFxError: Names the key, and what it has.
    """
    expect(adapter.entries, Mapping, "entries", "updates by key", "call Adapter({key: update})")
    for key, entry in adapter.entries.items():
        expect(
            entry,
            Entry,
            f"the adapter's {key!r}",
            "an update",
            "wrap it: lora_fx.LowRank(a, b, alpha), or lora_fx.Full(value) for a whole tensor",
        )
        if isinstance(entry, LowRank) and entry.a.shape[-2] != entry.b.shape[-1]:
            raise LoraFxError(
                f"the adapter's {key!r} has A {[*entry.a.shape]} and B {[*entry.b.shape]}, of "
                "different ranks",
                "pass A [rank, in] and B [out, rank]",
            )


def _size(key: str, entry: Entry) -> int:
    """Number of trained elements of one update."""
    if isinstance(entry, LowRank) and entry.variant_tensors:
        return sum(slot.value.size for slot in slots_of(key, entry) if slot.trained)
    return sum(value.size for value in vars(entry).values() if isinstance(value, np.ndarray))


def check_plain(adapter: Adapter, what: str, *, reading_weight: bool = False) -> None:
    """Raise LoraFxError for an entry that is neither a plain s·b·a nor a whole tensor.

    Args:
        adapter: Bound or not.
        what: The thing that should take it, for messages.
        reading_weight: Let through a variant that reads W itself.
    """
    accepts = is_on_base if reading_weight else is_plain
    for key, entry in adapter.entries.items():
        if accepts(entry):
            continue
        kinds = ", ".join(names_taken(reading_weight=reading_weight))
        raise LoraFxError(
            f"{what}: the adapter's {key!r} is {name_of(entry)}; expected {kinds} or a whole "
            "tensor",
            "fold it into a checkpoint with lora-fx merge",
        )


def bind(adapter: Adapter, found: Found) -> Adapter:
    """Return the adapter with the keys and layouts of `found`; an error names each misfit.

    Args:
        adapter: Bound or not; its keys may be aliases.
        found: The model's targets.
    """
    placed = place(adapter.entries, found.shapes.get, tuple(found.shapes))
    adapter = replace(adapter, entries=placed)
    check_plain(adapter, "a graph", reading_weight=True)
    adapter = adapter.resolved(found.shapes)
    entries = bound_entries(adapter.entries, found)
    metadata = reading(found, entries, adapter.metadata)
    return replace(adapter, entries=entries, metadata=metadata)


def mix(
    parts: Sequence[tuple[Adapter, float]], how: str = "cat", rank: int | None = None
) -> Adapter:
    """Combine several adapters, each with a weight, into one.

    Args:
        parts: (adapter, weight); bound to one model, or files of one naming.
        how: cat, svd or linear.
        rank: The rank of an svd mix; the largest of the parts where none is given.

    Raises:
        LoraFxError: A whole tensor, unequal ranks in a linear mix, updates that do not fit.
    """
    _check_mixable(parts, how, rank)
    pairs_by_key: dict[str, list[Pair]] = {}
    for adapter, weight in parts:
        for key, low in adapter.lowrank.items():
            pairs_by_key.setdefault(key, []).append((low, weight))
    entries = {key: mixed_update(key, pairs, how, rank) for key, pairs in pairs_by_key.items()}
    if not parts:
        return Adapter(entries)

    first, _ = parts[0]
    metadata = dict(first.metadata)
    metadata.pop(LEARNS, None)
    readers: Json = {}
    for adapter, _ in parts:
        readers |= adapter.metadata.get(OTHER_READERS, {})
    if readers:
        metadata[OTHER_READERS] = readers
    return Adapter(entries, metadata, first.names)


def _check_mixable(parts: Sequence[tuple[Adapter, float]], how: str, rank: int | None) -> None:
    """Raise for an unknown mix, an option that the mix does not take, or an unmixable entry."""
    if how not in HOWS:
        raise LoraFxError(f"unknown mix {how!r}", f"use one of {', '.join(HOWS)}")
    if rank is not None and how != "svd":
        raise LoraFxError(f"a {how} mix does not take a rank", "leave rank out; only svd takes it")
    if len({adapter.invocation for adapter, _ in parts}) > 1:
        raise LoraFxError(
            "a mix of adapters that begin to act at different tokens is no adapter",
            "mix adapters with the same invocation tokens, or without any",
        )
    for adapter, _ in parts:
        if adapter.full:
            raise LoraFxError(
                f"a mix cannot hold the whole tensor {next(iter(adapter.full))!r}",
                "leave whole tensors out; only low-rank updates can be mixed",
            )
        check_plain(adapter, "a mix")
