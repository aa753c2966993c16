"""The Adapter: a named set of updates, key → LowRank or Full, that knows no file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_fx.adapter.bind import OTHER_READERS, bind_full, bind_lowrank, reading
from lora_fx.adapter.expert_stacks import place
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.fused import other_split
from lora_fx.adapter.learning import LEARNS
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.mix import HOWS, mixed_update
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, is_on_base, is_plain, name_of
from lora_fx.adapter.variant import names_taken
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import plain_layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name
from lora_fx.targets.selectors import select_names
from lora_fx.targets.target import check_disjoint
from lora_fx.text import Json, JsonView, counted, html, human, some


class FileNames(Protocol):
    """How the keys of a file lead to parameters, where they do not name those of one model."""

    @property
    def format(self) -> str:
        """Whose names they are: kohya or diffusers."""

    def resolve(self, adapter: Adapter, names: Iterable[str]) -> Adapter:
        """The adapter under a model's parameter names; see `lora_fx.formats.naming`."""

    def to_json(self) -> Json:
        """What a file of the adapter keeps of this in its metadata."""


@dataclass(frozen=True)
class Adapter(Mapping[str, Entry]):
    """A mapping of keys to updates, with metadata (dropout, base name, where it was trained).

    An adapter from a file is *unbound*: its keys are the file's names and its layouts are not
    known. `bind` gives it those of a model.

    Attributes:
        entries: key → update.
        metadata: What else is known of it, by name, as JSON has it.
        names: Put there by the reader of a file that does not name parameters; else None.
    """

    entries: Mapping[str, Entry]
    metadata: JsonView = field(default_factory=dict)
    names: FileNames | None = None

    def __repr__(self) -> str:
        """The kinds and shapes of its updates."""
        rows = self._rows()[1:]
        return f"Adapter({some([' '.join(filter(None, row)) for row in rows])})"

    def _repr_html_(self) -> str:
        """The table of its updates, for notebooks."""
        return html(
            f"{counted(len(self), 'update')}, {human(self.parameters)} parameters", self._rows()
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("key", "kind", "shape", "rank")]
        for key, entry in self.entries.items():
            value = entry.value if isinstance(entry, Full) else entry
            shape = str(list(shape)) if (shape := getattr(value, "shape", ())) else ""
            rank = f"rank {entry.rank}" if isinstance(entry, LowRank) else ""
            rows.append((key, name_of(entry), shape, rank))
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
        return {k: v for k, v in self.entries.items() if isinstance(v, LowRank)}

    @property
    def full(self) -> dict[str, Full]:
        """The whole tensors."""
        return {k: v for k, v in self.entries.items() if isinstance(v, Full)}

    @property
    def others(self) -> dict[str, str]:
        """{key: what it is} of entries that only a merge of checkpoints can apply."""
        return {k: name_of(v) for k, v in self.entries.items() if not is_plain(v)}

    @property
    def parameters(self) -> int:
        """Number of trained elements."""
        return sum(_size(key, entry) for key, entry in self.entries.items())

    def deltas(self, base: object = None, dtype: npt.DTypeLike = "float64") -> dict[str, Array]:
        """{key: ΔW in stored layout}; an unbound update is taken as [out, in].

        Args:
            base: Not needed by lora and rslora.
            dtype: The dtype of the arithmetic and of the result; of complex factors the complex one
                of as many bits a part.

        Raises:
            LoraFxError: An update whose effect depends on the base (DoRA, PiSSA, OLoRA).
        """
        e = NumpyEmitter()
        result = {}
        for key, low in self.lowrank.items():
            if not is_plain(low):
                raise LoraFxError(
                    f"the adapter's {key!r} is {name_of(low)}; it has no ΔW of its own",
                    "merge it into its base",
                )
            matrix = low.matrix(dtype)
            layout = low.layout or plain_layout(matrix.shape)
            result[key] = layout.to_stored(e, matrix)
        return result

    def weighted(self, weight: float) -> Adapter:
        """Every change times `weight`; whole tensors and rows cannot be scaled.

        Raises:
            LoraFxError: The weight is not 1 and the adapter holds whole tensors, rows, or DoRA,
                whose effect is not in proportion to its update.
        """
        if weight == 1.0:
            return self
        scaled: dict[str, Entry] = {}
        for key, entry in self.entries.items():
            if isinstance(entry, Hadamard) or (isinstance(entry, LowRank) and is_plain(entry)):
                scaled[key] = replace(entry, alpha=entry.alpha * weight)
            elif isinstance(entry, (Kronecker, Dense)):
                scaled[key] = replace(entry, scale=entry.scale * weight)
            else:
                raise LoraFxError(
                    f"weight {weight:g}: the adapter's {key!r} is {name_of(entry)}",
                    "only updates in proportion to their scale can be weighted",
                )
        return replace(self, entries=scaled)

    def select(
        self, include: str | Sequence[str] = "", exclude: str | Sequence[str] = ""
    ) -> Adapter:
        """Some of its updates: all that include names, or all, without those that exclude names.

        Args:
            include: Selectors of keys: globs on a dotted suffix, or re:REGEX.
            exclude: The same.

        Raises:
            LoraFxError: A selector that names no key, or nothing left.
        """
        names = list(dict.fromkeys(map(base_name, self.entries)))
        kept = select_names(names, include, "include") if include else names
        gone = select_names(names, exclude, "exclude") if exclude else ()
        every = {k: e for k, e in self.entries.items() if base_name(k) in {*kept} - {*gone}}
        if not every:
            raise LoraFxError("no update of the adapter is left", "name others, or fewer")
        return replace(self, entries=every)

    def resolved(self, names: Iterable[str]) -> Adapter:
        """This adapter under a model's parameter names, where its file does not name those."""
        return self if self.names is None else self.names.resolve(self, names)

    def bind(
        self, model: object, args: Sequence[object] = (), kwargs: JsonView | None = None
    ) -> Adapter:
        """This adapter in the keys and layouts of a model (module, Captured, Found or folder).

        Raises:
            LoraFxError: A key that the model lacks, or a shape that does not fit.
        """
        import lora_fx  # the verbs live above this module; only the facade knows them

        found = model if isinstance(model, Found) else lora_fx.find(model, args, kwargs)
        return bind(self, found)


def _size(key: str, entry: Entry) -> int:
    """Number of trained elements of one update."""
    if isinstance(entry, LowRank) and entry.variant_tensors:
        return sum(slot.value.size for slot in slots_of(key, entry) if slot.trained)
    return sum(value.size for value in vars(entry).values() if isinstance(value, np.ndarray))


def check_plain(adapter: Adapter, what: str, *, reading_weight: bool = False) -> None:
    """Raise for an entry that is more than s·b·a or a whole tensor.

    Args:
        adapter: Bound or not.
        what: What should take it, for messages.
        reading_weight: Let through a variant that reads W itself.
    """
    kinds = ", ".join(names_taken(reading_weight=reading_weight))
    taken = is_on_base if reading_weight else is_plain
    for key, entry in adapter.entries.items():
        if not taken(entry):
            raise LoraFxError(
                f"{what}: the adapter's {key!r} is {name_of(entry)}; expected {kinds} or a whole "
                "tensor",
                "lora-fx merge folds it into a checkpoint",
            )


def bind(adapter: Adapter, found: Found) -> Adapter:
    """An adapter in the keys and layouts of `found`; every misfit is named.

    Args:
        adapter: Bound or not; its keys may be aliases.
        found: The model's targets.
    """
    stacks = place(adapter.entries, found.shapes.get, tuple(found.shapes))
    adapter = replace(adapter, entries=stacks)
    check_plain(adapter, "a graph", reading_weight=True)
    adapter = adapter.resolved(found.shapes)
    entries: dict[str, Entry] = {}
    entries |= bind_full(adapter.full, found)
    for key, entry in _resplit(adapter, found).items():
        if isinstance(entry, Full):
            continue
        assert isinstance(entry, LowRank)  # check_plain
        name, bound = bind_lowrank(key, entry, found)
        if name in entries:
            raise LoraFxError(
                f"adapter keys name {name!r} twice ({key!r} is an alias)",
                "one tensor has one update; merge the two first",
            )
        entries[name] = bound
    check_disjoint(found[k] for k, v in entries.items() if isinstance(v, LowRank))
    return replace(adapter, entries=entries, metadata=reading(found, entries, adapter.metadata))


def _resplit(adapter: Adapter, found: Found) -> dict[str, Entry]:
    """Updates of split projections for a fused weight, and the reverse, under the model's keys."""
    entries: dict[str, Entry] = {}
    for key, entry in adapter.entries.items():
        if isinstance(entry, LowRank) and found.get(key) is None:
            entries |= other_split(key, entry, found) or {key: entry}
        else:
            entries[key] = entry
    return entries


def mix(
    parts: Sequence[tuple[Adapter, float]], how: str = "cat", rank: int | None = None
) -> Adapter:
    """One adapter from several, each with a weight.

    Args:
        parts: (adapter, weight); bound to one model, or files of one naming.
        how: cat, svd or linear.
        rank: The rank of an svd mix; the largest of the parts where none is given.

    Raises:
        LoraFxError: A whole tensor, unequal ranks in a linear mix, updates that do not fit.
    """
    if how not in HOWS:
        raise LoraFxError(f"no mix {how!r}", f"the mixes are {', '.join(HOWS)}")
    if rank is not None and how != "svd":
        raise LoraFxError(f"a {how} mix has no rank to choose", "rank belongs to svd")
    for adapter, _ in parts:
        if adapter.full:
            raise LoraFxError(
                f"a mix cannot hold the whole tensor {next(iter(adapter.full))!r}",
                "only low-rank updates can be mixed",
            )
        check_plain(adapter, "a mix")
    keys = dict.fromkeys(k for adapter, _ in parts for k in adapter.lowrank)
    entries = {}
    for key in keys:
        pairs = [(adapter.lowrank[key], w) for adapter, w in parts if key in adapter.lowrank]
        entries[key] = mixed_update(key, pairs, how, rank)
    metadata = dict(parts[0][0].metadata) if parts else {}
    metadata.pop(LEARNS, None)
    read = {k: v for a, _ in parts for k, v in a.metadata.get(OTHER_READERS, {}).items()}
    metadata |= {OTHER_READERS: read} if read else {}
    return Adapter(entries, metadata, parts[0][0].names if parts else None)
