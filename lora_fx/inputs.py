"""The inputs of a model: a signature of names, dtypes and dimensions, and values for checks.

Symbols take the sizes (2, 5), (3, 7), (1, 11): the first number is the batch (dimension 0), the
second the first other symbol, and every further symbol has sizes of its own, in no fixed order;
`past`, the tokens in a decoder's cache, takes first · second mod 7, and `past + length` their sum.
Where the graph is true for some sizes only, the nearest of those are taken. Integers lie below the
rows of the table they index, a mask has everywhere the value that the example's has most often
(over a cache that is not empty, the first row is padded by one), floats are N(0, 1), from seed 0.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lora_fx.conditions import Condition, Size, broken
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, expect
from lora_fx.text import Json, by_key, is_whole

Named = Mapping[str, Any]
"""The arguments of a call by name; each is a tensor, or a pytree of torch."""
Dynamic = Mapping[str, Mapping[int, str] | Sequence[int]]
"""{input: {dimension: symbol}} or {input: (dimension, …)}; an empty symbol gets a new name."""
SIZES: tuple[tuple[int, int], ...] = ((2, 5), (3, 7), (1, 11))
OTHERS = {5: (9, 3, 12, 4), 7: (4, 13, 6, 10), 11: (6, 8, 3, 14)}
"""The sizes of further symbols, by the size of the first symbol."""
HALVES = {5: (2, 3), 7: (3, 2), 11: (2, 2)}
"""Factors of half the example's height or width, for free sides, by the first symbol's size."""
LARGE_SIDE = 24
"""The least height or width of an example whose free sides stay near that size."""
BATCH = "batch"
LENGTH = "length"
PAST = "past"
CACHE_SIZES: tuple[tuple[int, int], ...] = (*SIZES, (2, 1))
"""The sizes for a decoder, with 3, 0, 4 and 2 tokens in the cache; the last adds one token."""
LARGEST_CUT = 512
"""The largest constant in a model for which proofs choose longer sizes; more would be slow."""
Extents = tuple[int, int] | Mapping[str, int]
"""The sizes of one check: (batch, first other symbol), or some symbols by name."""


def generator(key: str, seed: int) -> np.random.Generator:
    """Return a random generator for one key, independent of other draws."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))


@dataclass(frozen=True)
class Input:
    """One tensor input.

    Attributes:
        name: Argument name; parts of a container have `.i` after it.
        dtype: int64, float32, bool …
        shape: Sizes of the example.
        dims: Dimension → symbol, for the dynamic ones.
        high: Integers lie below this; None while unknown.
        fill: What a mask mostly is in the example: what it says of a place that counts. None where
            no example tells: booleans take turns then, which leaves no row out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: Mapping[int, str] = field(default_factory=dict)
    high: int | None = None
    fill: int | None = None

    @property
    def is_integer(self) -> bool:
        """True for token ids, labels, and masks of integers."""
        return "int" in self.dtype

    @property
    def is_mask(self) -> bool:
        """True for booleans, and for integers whose name contains "mask"."""
        return self.dtype == "bool" or (self.is_integer and "mask" in self.name)

    def to_json(self) -> Json:
        """Return one row of `inputs[]`: dimensions are numbers or symbols."""
        dims = [self.dims.get(dim, size) for dim, size in enumerate(self.shape)]
        return {"name": self.name, "dtype": self.dtype, "shape": dims}


@dataclass(frozen=True)
class Inputs:
    """The tensor inputs of a model, in the order of its flattened arguments.

    Attributes:
        specs: One for each.
        conditions: What sizes have to satisfy.
        cuts: Numbers that the graph compares or cuts sizes with.
    """

    specs: tuple[Input, ...]
    conditions: tuple[Condition, ...] = ()
    cuts: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(spec.name for spec in self.specs)

    @property
    def checks(self) -> tuple[Extents, ...]:
        """The sizes of every check; they include both sides of each cut."""
        checks: list[Extents] = list(CACHE_SIZES if PAST in self._symbols() else SIZES)
        if not self.others:
            return tuple(checks)

        lengths = set[int]()
        for cut in self.cuts:
            if cut <= LARGEST_CUT:
                lengths |= {cut, cut + 1}
        # the largest cuts last, and not all of many: each is a run of both models
        near_cuts = dict.fromkeys(sorted(lengths))
        for condition in self.conditions:
            for bound in condition.bounds():
                if bound is not None and bound <= 64:
                    near_cuts.setdefault(bound)
        untried = [length for length in near_cuts if length not in (5, 7, 11)]
        symbol = self.others[0]
        checks += [{symbol: length} for length in untried[:6]]
        return tuple(checks)

    def with_dims(self, requested: Mapping[str, Mapping[int, str]]) -> Inputs:
        """Return the inputs with these dimensions as the dynamic ones."""
        specs = [replace(spec, dims=requested.get(spec.name, {})) for spec in self.specs]
        return replace(self, specs=tuple(specs))

    @property
    def others(self) -> list[str]:
        """The symbols other than the batch and a cache's length."""
        return _without_batch_and_past(self._symbols())

    def alike(self) -> Inputs:
        """Return the inputs with one symbol in the place of all `others`."""
        stand_in = {symbol: self.others[0] for symbol in self.others}

        def renamed(text: str) -> str:
            return " + ".join(stand_in.get(term, term) for term in _terms(text))

        specs = []
        for spec in self.specs:
            dims = {dim: renamed(text) for dim, text in spec.dims.items()}
            specs.append(replace(spec, dims=dims))
        return replace(self, specs=tuple(specs))

    def _symbols(self) -> list[str]:
        """Return the symbols of all dimensions, in order."""
        texts: list[str] = []
        for spec in self.specs:
            texts += spec.dims.values()
        return _symbols_in(texts)

    @cached_property
    def _places(self) -> dict[Size, str]:
        """Return the symbol of every size: equal sizes share one, fixed sizes are numbers."""
        places: dict[Size, str] = {}
        for spec in self.specs:
            for dim, size in enumerate(spec.shape):
                places[spec.name, dim] = spec.dims.get(dim, str(size))

        for condition in self.conditions:
            for place, text in condition.equal_sizes(places):
                before = places.get(place, "0")
                if before != text and not before.isdigit() and before not in _terms(text):
                    places = {
                        other: text if symbol == before else symbol
                        for other, symbol in places.items()
                    }
                    break
        return places

    def _sides(self) -> dict[str, int]:
        """Return the free heights and widths of images, with the example's size."""
        sides = {}
        for spec in self.specs:
            if len(spec.shape) <= 3 or spec.is_integer:
                continue
            for dim, symbol in spec.dims.items():
                if dim > 1 and spec.shape[dim] >= LARGE_SIDE:
                    sides[symbol] = spec.shape[dim]
        return sides

    def _requested(self, size: Extents, places: Mapping[Size, str]) -> dict[str, int]:
        """Return the value of every symbol at one size, before conditions are applied."""
        if isinstance(size, tuple):
            batch, length = size
            named: Mapping[str, int] = {}
        else:
            batch, length = SIZES[0]
            named = size

        symbols = _symbols_in(places.values())
        others = _without_batch_and_past(symbols)
        requested = {BATCH: batch, PAST: batch * length % 7}
        requested.update(dict.fromkeys(others, length))
        if length in OTHERS:
            further = itertools.cycle(OTHERS[length])
            requested.update((symbol, next(further)) for symbol in others[1:])
        if length in HALVES:
            # small images vanish in a model's strides
            halves = itertools.cycle(HALVES[length])
            for symbol, side in self._sides().items():
                requested[symbol] = side * next(halves) // 2
        return {
            symbol: int(named.get(symbol, extent))
            for symbol, extent in requested.items()
            if symbol in symbols
        }

    def values(self, size: Extents) -> dict[str, int] | None:
        """Return symbol values at one size, or at the nearest valid one; None if none was found."""
        requested = self._requested(size, self._places)
        nearest = self._nearest(requested)
        if nearest is None:
            # sums of sizes that must be equal, as joint attention has them, are where all sizes are
            others = _without_batch_and_past([*requested])
            alike = dict.fromkeys(others, max((requested[other] for other in others), default=0))
            nearest = self._nearest({**requested, **alike})
        return nearest

    def _nearest(self, requested: Mapping[str, int]) -> dict[str, int] | None:
        """Return the valid symbol values nearest to the requested ones; None if none are near."""
        places = self._places
        restricted = set[str]()
        for condition in self.conditions:
            restricted |= _symbols_about(condition, places)
        movable = [symbol for symbol in requested if symbol in restricted]
        for steps in _steps(len(movable)):
            tried = dict(requested)
            for symbol, step in zip(movable, steps, strict=True):
                tried[symbol] += step
            if any(extent < min(1, requested[symbol]) for symbol, extent in tried.items()):
                continue  # an empty cache is one, an empty input is not
            if broken(self.conditions, _extents(places, tried)) is None:
                return tried
        return None

    def sizes(self, size: Extents) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input at one size, or at the nearest valid one."""
        values = self.values(size)
        if values is None:  # the example is certain
            return {spec.name: spec.shape for spec in self.specs}
        extents = _extents(self._places, values)
        shapes = {}
        for spec in self.specs:
            shapes[spec.name] = tuple(extents[spec.name, dim] for dim in range(len(spec.shape)))
        return shapes

    def symbol(self, name: str, d: int) -> str:
        """Return the symbol of a dimension; sizes that must be equal have the same one."""
        return self._places.get((name, d), f"{name}[{d}]")

    @cached_property
    def _places_by_demand(self) -> dict[Size, str]:
        """Return the symbols of every size; only demanded conditions make sizes equal."""
        demands = tuple(other for other in self.conditions if other.demanded)
        return replace(self, conditions=demands)._places

    def implied(self, condition: Condition) -> bool:
        """Whether a condition holds whenever sizes with the same symbol are equal."""
        # names and demands say so: a branch, which asked the same, is what is to be told
        places = self._places_by_demand
        about = sorted(condition.about & {*places})
        return _implied(condition, tuple((place, places[place]) for place in about))

    def outside(self, condition: Condition, near: Extents = SIZES[0]) -> dict[str, int] | None:
        """Return symbol values that break this condition and no other; None if there are none.

        Args:
            condition: The one to break.
            near: What symbols that it does not speak of are.
        """
        places = self._places
        requested = self._requested(near, places)
        about = _symbols_about(condition, places)
        for move in _moves([symbol for symbol in requested if symbol in about], condition):
            tried = {**requested, **move}
            extents = _extents(places, tried)
            if not condition.holds(extents) and broken(self.conditions, extents) is None:
                return tried
        return None

    def sample(self, size: Extents = SIZES[0], seed: int = 0) -> dict[str, Array]:
        """Return arrays of one size; each input has its own generator, from (seed, name)."""
        shapes = self.sizes(size)
        cached_tokens = (self.values(size) or {}).get(PAST, 0)
        arrays: dict[str, Array] = {}
        for spec in self.specs:
            rng = generator(spec.name, seed)
            shape = shapes[spec.name]
            dtype = numpy_dtype(spec.dtype)
            if spec.is_mask:
                arrays[spec.name] = _mask(spec, shape, padded=cached_tokens > 0)
            elif spec.is_integer:
                below = max(1, spec.high or 2)
                arrays[spec.name] = rng.integers(0, below, shape).astype(dtype)
            else:
                arrays[spec.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
        return arrays

    def to_json(self) -> list[Json]:
        """Return the rows of `inputs[]`."""
        return [spec.to_json() for spec in self.specs]


def _mask(spec: Input, shape: tuple[int, ...], *, padded: bool) -> Array:
    """Return a mask filled with the most frequent value of the example's mask.

    Args:
        spec: The input.
        shape: Of the mask.
        padded: Tokens lie in a cache: the first place of the first row does not count, else a graph
            may ignore the mask.
    """
    counts = 1 if spec.fill is None else spec.fill
    mask = np.full(shape, counts, numpy_dtype(spec.dtype))
    covers_cache = "+" in spec.dims.get(1, "")
    if covers_cache and padded:
        mask[:1, :1] = 1 - counts
    elif spec.fill is None and mask.dtype == np.bool_:
        mask[..., 1::2] = False
    return mask


def _moves(symbols: Sequence[str], condition: Condition) -> list[dict[str, int]]:
    """Return symbol values that may break a condition: near its numbers, and small pairs."""
    moves = []
    for symbol in symbols:
        moves += [{symbol: extent} for extent in condition.turns()]
    # an empty cache is one; no other input is
    small = {symbol: range(0 if symbol == PAST else 1, 5) for symbol in symbols}
    for first, second in itertools.combinations(symbols, 2):  # a sum is small where both are
        for extents in itertools.product(small[first], small[second]):
            moves.append(dict(zip((first, second), extents, strict=True)))
    return moves


@lru_cache(8)
def _steps(count: int, reach: int = 64) -> Sequence[tuple[int, ...]]:
    """Return offsets for `count` values, small ones first; above three values, all change alike."""
    changes = [0]
    for change in range(1, reach):
        changes += [change, -change]
    if count == 1:
        return [(change,) for change in [*changes, *range(reach, 4096)]]
    if count > 3:
        return [(change,) * count for change in changes]
    if count == 3:
        changes = changes[:13]
    return sorted(
        itertools.product(changes, repeat=count), key=lambda combination: sum(map(abs, combination))
    )


def _terms(symbol: str) -> list[str]:
    """Return the terms of a sum such as `past + length`."""
    return [term.strip() for term in symbol.split("+")]


def _symbols_in(texts: Iterable[str]) -> list[str]:
    """Return the terms of some sums, in order and without repeats."""
    symbols: dict[str, None] = {}
    for text in texts:
        symbols.update(dict.fromkeys(_terms(text)))
    return list(symbols)


def _symbols_about(condition: Condition, places: Mapping[Size, str]) -> set[str]:
    """Return the symbols of the sizes that a condition depends on."""
    return set(_symbols_in(places.get(place, "") for place in condition.about))


def _without_batch_and_past(symbols: Iterable[str]) -> list[str]:
    """Return the symbols without the batch, a cache's length, and numbers."""
    return [symbol for symbol in symbols if symbol not in (BATCH, PAST) and not symbol.isdigit()]


@lru_cache(4096)
def _implied(condition: Condition, places: tuple[tuple[Size, str], ...]) -> bool:
    """Whether the condition holds for every tried combination of its symbols' values."""
    place_to_text = dict(places)
    symbols = [symbol for symbol in _symbols_in(place_to_text.values()) if not symbol.isdigit()]
    symbols.sort()
    tried: list[dict[str, int]] = []
    for extents in itertools.product((1, 2, 3, 8, 37, 10**9), repeat=min(len(symbols), 4)):
        tried.append(dict(zip(symbols, extents, strict=False)))
    turns = condition.turns()
    for symbol in symbols:
        for others in (1, 2, 3):
            for turn in turns:
                tried.append({**dict.fromkeys(symbols, others), symbol: turn})
    return all(condition.holds(_extents(place_to_text, values)) for values in tried)


def _extents(places: Mapping[Size, str], values: Mapping[str, int]) -> dict[Size, int]:
    """Return the number for every size, given the values of the symbols."""
    extents_of_texts = {text: _extent(text, values) for text in {*places.values()}}
    return {place: extents_of_texts[text] for place, text in places.items()}


def _extent(symbol: str, values: Mapping[str, int]) -> int:
    """Return the value of a symbol, or of a sum of symbols and numbers."""
    total = 0
    for term in _terms(symbol):
        total += int(term) if term.isdigit() else values.get(term, 1)
    return total


def default_dynamic(inputs: Inputs) -> dict[str, dict[int, str]]:
    """Return the defaults: dimension 0 of all, dimension 1 of integers, masks and 3-d floats."""
    batch = next((spec.shape[0] for spec in inputs.specs if spec.shape), None)
    lengths = {spec.shape[1] for spec in inputs.specs if _has_length(spec)} - {0}
    dynamic: dict[str, dict[int, str]] = {}
    for spec in inputs.specs:
        if not spec.shape:
            continue
        if spec.shape[0] == 0:
            raise LoraFxError(
                f"the example for input {spec.name!r} has size 0: {list(spec.shape)}",
                "pass at least one row",
            )
        dims = {0: f"{spec.name}_0"}
        if spec.shape[0] in (batch, 1):
            dims[0] = BATCH
        if _has_free_length(spec):
            dims[1] = LENGTH if len(lengths) == 1 else f"{spec.name}_length"
        dynamic[spec.name] = dims
    return dynamic


def _has_free_length(spec: Input) -> bool:
    """Whether dimension 1 may differ from the example's size."""
    if not _has_length(spec) or spec.shape[1] == 0:  # an empty dimension stays one
        return False
    is_broadcast = spec.shape[1] == 1 and not spec.is_integer
    return not is_broadcast


def _has_length(spec: Input) -> bool:
    if spec.is_integer or spec.is_mask:
        return len(spec.shape) >= 2
    return len(spec.shape) == 3


def possible_signals(
    inputs: Inputs, dynamic: Mapping[str, object], static: Sequence[str]
) -> tuple[str, ...]:
    """Return the floats of three dimensions of which a user says nothing about the last two."""
    fixed = {*static}
    names = []
    for spec in inputs.specs:
        if len(spec.shape) != 3 or spec.is_integer or spec.is_mask or spec.name in dynamic:
            continue
        texts = {spec.name, *(f"{spec.name}:{dim}" for dim in (1, 2, -1, -2))}
        if not texts & fixed:
            names.append(spec.name)
    return tuple(names)


def with_lengths(
    inputs: Inputs, dims: Mapping[str, Mapping[int, str]], signals: Sequence[str]
) -> dict[str, dict[int, str]]:
    """Return dynamic dimensions in which dimension 2 of signals is free, in place of dimension 1.

    Args:
        inputs: The example's.
        dims: The dynamic dimensions before.
        signals: Inputs [N, C, L].
    """
    lengths = {spec.shape[2] for spec in inputs.specs if spec.name in signals}
    others = {name for name, symbols in dims.items() if name not in signals and len(symbols) > 1}
    merged = {name: dict(symbols) for name, symbols in dims.items()}
    for name in signals:
        merged[name].pop(1, None)
        is_alone = len(lengths) == 1 and not others
        merged[name][2] = LENGTH if is_alone else f"{name}_length"
    return merged


def merge_dynamic(
    inputs: Inputs,
    defaults: Mapping[str, Mapping[int, str]],
    dynamic: Dynamic | None,
    static: Sequence[str] = (),
) -> dict[str, dict[int, str]]:
    """Return the default dynamic dimensions, plus `dynamic`, without `static`.

    Args:
        dynamic: {input: {dimension: symbol}} or {input: (dimension, …)}.
        static: `NAME`, or `NAME:DIM`.

    Raises:
        LoraFxError: No such input or dimension, or one that is in both.
    """
    merged = {name: dict(dims) for name, dims in defaults.items()}
    ranks = {spec.name: len(spec.shape) for spec in inputs.specs}
    asked: dict[str, set[int]] = {}
    for name, requested in (dynamic or {}).items():
        expect_input(name, ranks)
        for number, symbol in _symbols(name, requested).items():
            dim = _dimension(name, number, ranks[name])
            asked.setdefault(name, set()).add(dim)
            merged.setdefault(name, {})[dim] = _label(symbol) or _default_label(name, dim)
    for text in static:
        name, colon, dim_text = text.partition(":")
        expect_input(name, ranks)
        if colon and not re.fullmatch(r"-?\d{1,4}", dim_text):
            raise LoraFxError(
                f"static {text!r} is not NAME or NAME:DIM",
                f"name a dimension by its number, such as {name}:1",
            )
        fixed = {_dimension(name, int(dim_text), ranks[name])} if colon else {*range(ranks[name])}
        if fixed & asked.get(name, set()):
            raise LoraFxError(f"{text} is both dynamic and static", "leave one of them out")
        for dim in fixed:
            merged.get(name, {}).pop(dim, None)
        if not merged.get(name):
            merged.pop(name, None)
    return merged


def _symbols(name: str, requested: object) -> Mapping[int, object]:
    """Return dimension → symbol, which is empty where only the dimension is given."""
    symbols = requested
    if isinstance(requested, Sequence) and not isinstance(requested, str):
        symbols = dict.fromkeys(requested, "")
    if not isinstance(symbols, Mapping) or not all(map(is_whole, symbols)):
        raise LoraFxError(
            f"dynamic has {requested!r} for input {name!r}; expected dimensions by number",
            f"pass dynamic={{{name!r}: {{1: 'length'}}}}, for example",
        )
    return symbols


def refuse_unequal(
    inputs: Inputs, dims: Mapping[str, Mapping[int, str]], dynamic: Dynamic | None
) -> None:
    """Raise if a user gives one name to dimensions of several sizes; 1 goes with each of them.

    Args:
        inputs: The example's.
        dims: All dynamic dimensions.
        dynamic: Those of the user.
    """
    shapes = {spec.name: spec.shape for spec in inputs.specs}
    places = by_key(
        (symbol, (name, dim)) for name, symbols in dims.items() for dim, symbol in symbols.items()
    )
    asked = merge_dynamic(inputs, {}, dynamic)
    for symbol in {symbol for symbols in asked.values() for symbol in symbols.values()}:
        sized = {f"{name}:{dim}": shapes[name][dim] for name, dim in places[symbol]}
        if len({*sized.values()} - {1}) > 1:
            sizes = ", ".join(f"{place} has {size}" for place, size in sized.items())
            raise LoraFxError(
                f"{symbol!r} names dimensions of several sizes: {sizes}",
                "give each size a name of its own",
            )


def _dimension(name: str, number: int, rank: int) -> int:
    """Return the dimension for a number; negative numbers count from the end."""
    if not -rank <= number < rank:
        raise LoraFxError(
            f"input {name!r} has {rank} dimensions, so there is no dimension {number}",
            "count dimensions from 0",
        )
    return number % rank


def _label(symbol: object) -> str:
    """Return the name of a symbol, which is a text or torch's Dim."""
    if isinstance(symbol, str):
        return symbol
    return str(getattr(symbol, "__name__", ""))


def _default_label(name: str, dim: int) -> str:
    return BATCH if dim == 0 else f"{name}_{dim}"


OTHER_SIZES = (
    "pass --inputs FILE.npz with arrays of sizes that the model accepts; for a torch model, "
    "--static NAME:DIM keeps a dimension at the size of its example"
)
"""The hint for a model that refuses the sizes that a check chose."""


def expect_arrays(inputs: object) -> None:
    """Raise for the `inputs` of a verb that are neither None nor arrays by input name."""
    hint = "pass inputs=dict(numpy.load('FILE.npz')), for example"
    expect(inputs or {}, Mapping, "inputs", "arrays by input name", hint)


def expect_input(name: str, names: Collection[str]) -> None:
    """Raise if a model has no input of this name."""
    if name not in names:
        raise LoraFxError(f"no input is named {name!r}", f"the inputs are {', '.join(names)}")


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Parse `NAME:0=batch,2=h` of the command line.

    >>> parse_dynamic(["x:0=batch,2=h", "ids:1"])
    {'x': {0: 'batch', 2: 'h'}, 'ids': {1: ''}}
    """
    dynamic: dict[str, dict[int, str]] = {}
    for text in texts:
        name, _, dims = text.partition(":")
        try:
            for entry in dims.split(","):
                dim, _, symbol = entry.partition("=")
                dynamic.setdefault(name, {})[int(dim)] = symbol
        except ValueError as error:
            raise LoraFxError(
                f"--dynamic {text!r} is not NAME:DIM=SYMBOL,…",
                "pass --dynamic x:0=batch,2=height, for example",
            ) from error
    return dynamic
