"""The Adapter: a named set of updates, key → LowRank or Full, that knows no file format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_fx.adapter.fused import other_split, place
from lora_fx.adapter.lowrank import Full, LowRank, truncated
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, is_on_base, is_plain, name_of
from lora_fx.adapter.variant import LEARNS, names_taken, slots_of, variant_of
from lora_fx.dtypes import Array, factor_dtype
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import plain_layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.plan import select_names
from lora_fx.targets.target import Found, base_name, check_disjoint, own_use, split_use
from lora_fx.text import Json, JsonView, counted, html, human, near, some


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


# bind: an adapter in the keys and layouts of a model; every misfit is named.


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
    entries |= _bind_full(adapter.full, found)
    for key, entry in _resplit(adapter, found).items():
        if isinstance(entry, Full):
            continue
        assert isinstance(entry, LowRank)  # check_plain
        name, bound = _bind_lowrank(key, entry, found)
        if name in entries:
            raise LoraFxError(
                f"adapter keys name {name!r} twice ({key!r} is an alias)",
                "one tensor has one update; merge the two first",
            )
        entries[name] = bound
    check_disjoint(found[k] for k, v in entries.items() if isinstance(v, LowRank))
    return replace(adapter, entries=entries, metadata=reading(found, entries, adapter.metadata))


OTHER_READERS = "other_readers"
"""The adapter metadata that keeps what reads a tensor beside the products of its update."""


def reading(found: Found, keys: Iterable[str], metadata: JsonView) -> Json:
    """Metadata of an adapter of a model that says what else reads the tensors of its updates.

    Args:
        found: The model's targets; targets of a checkpoint, whose readers nobody knows, change
            nothing.
        keys: The keys of the updates.
        metadata: What else is known.
    """
    if not any(t.sites for t in found.targets):
        return dict(metadata)
    known = {k: found.get(k) for k in keys}
    rows = {k: list(t.other_readers) for k, t in known.items() if t and t.other_readers}
    kept = {k: v for k, v in metadata.items() if k != OTHER_READERS}
    return {**kept, **({OTHER_READERS: rows} if rows else {})}


def _resplit(adapter: Adapter, found: Found) -> dict[str, Entry]:
    """Updates of split projections for a fused weight, and the reverse, under the model's keys."""
    entries: dict[str, Entry] = {}
    for key, entry in adapter.entries.items():
        if isinstance(entry, LowRank) and found.get(key) is None:
            entries |= other_split(key, entry, found) or {key: entry}
        else:
            entries[key] = entry
    return entries


def _bind_full(full: Mapping[str, Full], found: Found) -> dict[str, Full]:
    """Whole tensors under the first names of the model's; one value of all names is one change."""
    groups: dict[str, dict[str, Full]] = {}
    for key, entry in full.items():
        if key not in found.shapes:
            raise LoraFxError(
                f"adapter tensor {key!r} is not in the model", near(key, found.shapes)
            )
        have, want = tuple(entry.value.shape), tuple(found.shapes[key])
        if have != want:
            raise MisfitError(
                f"adapter tensor {key!r} is {list(have)}; the model's is {list(want)}"
            )
        groups.setdefault(found.first_names.get(key, key), {})[key] = entry
    bound = {}
    for name, entries in groups.items():
        names = [n for n, first in found.first_names.items() if first == name]
        key, entry = next(iter(entries.items()))
        if not means_all(entries, names):
            raise LoraFxError(
                f"the adapter's whole tensor {key!r} is for that name alone; the model has one "
                f"tensor for it and {some([n for n in names if n != key])}",
                "lora_fx.insert, fold, attach or export of the model itself, with the adapter, "
                "gives that name a tensor of its own",
            )
        several = len(names) > 1
        bound[name] = replace(entry, tied=several, twins=tuple(n for n in names if n != name))
    return bound


def means_all(entries: Mapping[str, Full], names: Collection[str]) -> bool:
    """True for whole tensors that are one change of a tensor with all of these names.

    PEFT saves the modules one by one: where it keeps them tied (ensure_weight_tying) all are
    there, and equal.

    Args:
        entries: Those of the tensor, by the name that they were saved under.
        names: All names of the tensor.
    """
    first = next(iter(entries.values()))
    equal = all(np.array_equal(first.value, entry.value) for entry in entries.values())
    return equal and (any(e.tied for e in entries.values()) or set(names) <= set(entries))


def _bind_lowrank(key: str, entry: LowRank, found: Found) -> tuple[str, LowRank]:
    plain, named = (key, "") if key in found.by_key else split_use(key)
    target = found.get(plain)
    if target is None:
        raise LoraFxError(f"adapter key {key!r} is no target of the model", near(key, found.by_key))
    layout, use = target.layout, named or entry.use
    lookup = entry.origin.op == "embedding"
    if target.tied and entry.layout is None:  # a file names a module, so it means one use
        if not entry.origin.tied:  # there the file means all uses
            use = use or target.named_use(key, lookup=lookup)
        if lookup:  # a lookup's in is the rows; the target's layout is the matmul's
            entry = variant_of(entry).turned(entry, key)
    elif entry.layout is None and key in (shared := target.modules) and len(shared) > 1:
        use = use or key
    if entry.layout == layout.transposed():
        # PEFT and extract go by the stored axes, or a table's name; the graph by what it contracts.
        entry = variant_of(entry).turned(entry, key)
    entry = _of_dtype(key, entry, target.parameter.dtype)
    entry = variant_of(entry).fitted(entry, key, layout)
    a, b = layout.factor_shapes(entry.rank)
    if entry.a.shape != a or entry.b.shape != b:
        raise MisfitError(
            f"the update of {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
            f"the weight {list(layout.stored)} needs A {list(a)} and B {list(b)}"
        )
    own = target.of_use(use) if use and target.sites else target
    if own is None:
        raise LoraFxError(
            f"the update of {key!r} acts on its use {use!r}, and the model has no such use",
            f"its uses are {', '.join(target.each_use)}",
        )
    if len(own.sites) < len(target.sites):
        target = own
    several = target.of_several
    twins = tuple(target.parameter.aliases) if several else ()
    origin = replace(entry.origin, op=target.op, tied=several, twins=twins)
    return target.key, replace(entry, layout=layout, use=own_use(target.key), origin=origin)


def _of_dtype(key: str, entry: LowRank, dtype: str) -> LowRank:
    """The update with complex a and b where the weight is complex; raises where it is real."""
    kind = factor_dtype(dtype)
    if kind.kind == "c":
        return replace(entry, a=entry.a.astype(kind), b=entry.b.astype(kind))
    if "c" in (entry.a.dtype.kind, entry.b.dtype.kind):
        raise MisfitError(f"the update of {key!r} has complex A and B; the weight is {dtype}")
    return entry


# Mixes of adapters: one adapter whose updates are weighted sums of others'.
#
# cat      a = [a₁; a₂; …], b = [w₁s₁b₁, w₂s₂b₂, …]: exact, the ranks add up
# svd      the best approximation of Σ wᵢsᵢbᵢaᵢ of a given rank (Eckart and Young 1936)
# linear   a = Σ ±√|wᵢsᵢ| aᵢ, b = Σ √|wᵢsᵢ| bᵢ: PEFT's linear, equal ranks; not the weighted sum of
# the changes, since it has cross terms bᵢaⱼ


HOWS = ("cat", "svd", "linear")
Pair = tuple[LowRank, float]


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
        entries[key] = _mixed(key, pairs, how, rank)
    metadata = dict(parts[0][0].metadata) if parts else {}
    metadata.pop(LEARNS, None)
    read = {k: v for a, _ in parts for k, v in a.metadata.get(OTHER_READERS, {}).items()}
    metadata |= {OTHER_READERS: read} if read else {}
    return Adapter(entries, metadata, parts[0][0].names if parts else None)


def _mixed(key: str, pairs: Sequence[Pair], how: str, rank: int | None) -> LowRank:
    first = pairs[0][0]
    for u, _ in pairs[1:]:
        same = u.a.shape[-1] == first.a.shape[-1] and u.b.shape[-2] == first.b.shape[-2]
        if (u.layout, u.use) != (first.layout, first.use) or not same:
            raise LoraFxError(
                f"the updates of {key!r} do not fit each other: in {first.a.shape[-1]}, out "
                f"{first.b.shape[-2]} and in {u.a.shape[-1]}, out {u.b.shape[-2]}",
                "bind both to the same model first",
            )
    if how == "linear":
        return _linear(key, pairs)
    a = np.concatenate([u.a for u, _ in pairs], axis=-2)
    b = np.concatenate([u.b * np.float32(w * u.scale) for u, w in pairs], axis=-1)
    if how == "svd":
        a, b = truncated(a, b, rank or max(u.rank for u, _ in pairs))
    return replace(first, a=a, b=b, alpha=float(b.shape[-1]), variant="lora", frozen=0)


def _linear(key: str, pairs: Sequence[Pair]) -> LowRank:
    first = pairs[0][0]
    ranks = {u.rank for u, _ in pairs}
    if len(ranks) > 1:
        raise LoraFxError(
            f"a linear mix needs equal ranks; {key!r} has {sorted(ranks)}", "use cat or svd"
        )
    a, b = np.zeros_like(first.a), np.zeros_like(first.b)
    for u, w in pairs:
        root = math.sqrt(abs(w * u.scale))
        a = a + u.a * np.float32(math.copysign(root, w * u.scale))
        b = b + u.b * np.float32(root)
    return replace(first, a=a, b=b, alpha=float(first.rank), variant="lora", frozen=0)
