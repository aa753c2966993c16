"""Inputs from a signature of names, dtypes and dimensions: the sizes and values of every check.

Symbols take the sizes (2, 5), (3, 7), (1, 11): the first number is the batch (dimension 0), the
second the first other symbol, and every further symbol has sizes of its own, in no fixed order;
`past`, the tokens in a decoder's cache, takes first · second mod 7, and `past + length` their sum.
Where the graph is true for some sizes only, the nearest of those are taken. Integers lie below the
rows of the table they index, masks are what the example's mostly are (over a cache that is not
empty, the first row is padded by one), floats are N(0, 1), from seed 0.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lora_fx.conditions import Condition, Size, broken
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.text import Json

Named = Mapping[str, Any]
"""Arguments of a call by name; each is a tensor, or one of torch's pytrees."""
Dynamic = Mapping[str, Mapping[int, str] | Sequence[int]]
"""{input: {dimension: symbol}} or {input: (dimension, …)}; an empty symbol stands for a new one."""
SIZES: tuple[tuple[int, int], ...] = ((2, 5), (3, 7), (1, 11))
OTHERS = {5: (9, 3, 12, 4), 7: (4, 13, 6, 10), 11: (6, 8, 3, 14)}
"""Sizes of the further symbols, by that of the first."""
HALVES = {5: (2, 3), 7: (3, 2), 11: (2, 2)}
"""Half sizes of the example that free heights and widths take, by the size of the first symbol."""
LARGE_SIDE = 24
"""From this size on a free side keeps near the example's."""
BATCH = "batch"
LENGTH = "length"
PAST = "past"
CACHE_SIZES: tuple[tuple[int, int], ...] = (*SIZES, (2, 1))
"""A decoder's: 3, 0, 4 and 2 tokens lie in the cache. One new token is what it mostly runs on."""
LARGEST_CUT = 512
"""Proofs do not run at longer sizes than a constant of this size asks for: they would take long."""
Extents = tuple[int, int] | Mapping[str, int]
"""One size of a check: (batch, first other symbol), or some symbols by name."""


def generator(key: str, seed: int) -> np.random.Generator:
    """A generator for one key, so that its numbers do not depend on what else is drawn."""
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
        """True for token ids, labels, masks of integers."""
        return "int" in self.dtype

    @property
    def is_mask(self) -> bool:
        """True for booleans, and for integers that their name calls a mask."""
        return self.dtype == "bool" or (self.is_integer and "mask" in self.name)

    def to_json(self) -> Json:
        """One row of `inputs[]`: dimensions are numbers or symbols."""
        dims = [self.dims.get(i, n) for i, n in enumerate(self.shape)]
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
        """Their names."""
        return tuple(s.name for s in self.specs)

    @property
    def checks(self) -> tuple[Extents, ...]:
        """The sizes of every check; both sides of each cut are among them."""
        cached = PAST in self._symbols()
        free = next(iter(self.others), None)
        near = sorted({n + k for n in self.cuts if n <= LARGEST_CUT for k in (0, 1)})
        bounds = [n for c in self.conditions for n in c.bounds() if n is not None and n <= 64]
        near += [n for n in dict.fromkeys(bounds) if n not in near]
        # the largest cuts last, and not all of many: each is a run of both models
        more = [{free: n} for n in near if n not in (5, 7, 11)][:6] if free else []
        return (*(CACHE_SIZES if cached else SIZES), *more)

    def with_dims(self, requested: Mapping[str, Mapping[int, str]]) -> Inputs:
        """The same inputs with these dimensions dynamic."""
        specs = tuple(replace(s, dims=requested.get(s.name, {})) for s in self.specs)
        return replace(self, specs=specs)

    @property
    def others(self) -> list[str]:
        """The symbols that are neither the batch nor a cache's length."""
        return [s for s in self._symbols() if s not in (BATCH, PAST) and not s.isdigit()]

    def alike(self) -> Inputs:
        """The same inputs where one symbol stands for all of `others`."""
        one = {s: self.others[0] for s in self.others}

        def text(symbols: str) -> str:
            return " + ".join(one.get(t, t) for t in _terms(symbols))

        specs = [replace(s, dims={d: text(t) for d, t in s.dims.items()}) for s in self.specs]
        return replace(self, specs=tuple(specs))

    def _symbols(self) -> list[str]:
        """The symbols of all dimensions, in their order."""
        texts = (t for s in self.specs for t in s.dims.values())
        return list(dict.fromkeys(t for text in texts for t in _terms(text)))

    def _places(self) -> dict[Size, str]:
        """The symbols of every size: one for sizes that have to be equal, numbers where fixed."""
        places = {
            (s.name, d): s.dims.get(d, str(n)) for s in self.specs for d, n in enumerate(s.shape)
        }
        for c in self.conditions:
            for size, text in c.equal_sizes(places):
                old = places.get(size, "0")
                if old != text and not old.isdigit() and old not in _terms(text):
                    places = {k: text if t == old else t for k, t in places.items()}
                    break
        return places

    def _sides(self) -> dict[str, int]:
        """The free heights and widths of images, with the example's size."""
        return {
            symbol: s.shape[d]
            for s in self.specs
            for d, symbol in s.dims.items()
            if len(s.shape) > 3 and not s.is_integer and d > 1 and s.shape[d] >= LARGE_SIDE
        }

    def _wanted(self, size: Extents, places: Mapping[Size, str]) -> dict[str, int]:
        """What every symbol should be at one size."""
        named: Mapping[str, int] = {} if isinstance(size, tuple) else size
        first = size if isinstance(size, tuple) else SIZES[0]
        symbols = dict.fromkeys(t for text in places.values() for t in _terms(text))
        others = [s for s in symbols if s not in (BATCH, PAST) and not s.isdigit()]
        table = OTHERS.get(first[1], ())
        wanted = {BATCH: first[0], PAST: first[0] * first[1] % 7}
        for i, s in enumerate(others):
            wanted[s] = first[1] if i == 0 or first[1] not in OTHERS else table[(i - 1) % 4]
        sides = {s: n for s, n in self._sides().items() if first[1] in HALVES}
        for i, (s, n) in enumerate(sides.items()):  # small images vanish in a model's strides
            wanted[s] = n * HALVES[first[1]][i % 2] // 2
        return {s: int(named.get(s, n)) for s, n in wanted.items() if s in symbols}

    def values(self, size: Extents) -> dict[str, int] | None:
        """The symbols at one size, or at the nearest one allowed; None where none was found."""
        places = self._places()
        wanted = self._wanted(size, places)
        named = {t for c in self.conditions for s in c.about for t in _terms(places.get(s, ""))}
        moved = [s for s in wanted if s in named]
        for steps in _steps(len(moved)):
            tried = {**wanted, **{s: wanted[s] + k for s, k in zip(moved, steps, strict=True)}}
            if any(n < min(1, wanted[s]) for s, n in tried.items()):
                continue  # an empty cache is one, an empty input is not
            given = {place: _extent(text, tried) for place, text in places.items()}
            if broken(self.conditions, given) is None:
                return tried
        return None

    def sizes(self, size: Extents) -> dict[str, tuple[int, ...]]:
        """The shape of every input where symbols take these values, or the nearest allowed."""
        places, values = self._places(), self.values(size)
        if values is None:  # the example is certain
            return {s.name: s.shape for s in self.specs}
        return {
            s.name: tuple(_extent(places[s.name, d], values) for d in range(len(s.shape)))
            for s in self.specs
        }

    def symbol(self, name: str, d: int) -> str:
        """The symbol of a dimension, the same for sizes that have to be equal."""
        return self._places().get((name, d), f"{name}[{d}]")

    def implied(self, condition: Condition) -> bool:
        """Whether a condition holds wherever sizes of one symbol are equal."""
        # names and demands say so: a branch, which asked the same, is what is to be told
        demands = tuple(c for c in self.conditions if c.demanded)
        places = replace(self, conditions=demands)._places()
        about = sorted(condition.about & {*places})
        return _implied(condition, tuple((s, places[s]) for s in about))

    def outside(self, condition: Condition, near: Extents = SIZES[0]) -> dict[str, int] | None:
        """Values of symbols that break a condition and no other; None where there are none.

        Args:
            condition: The one to break.
            near: What symbols that it does not speak of are.
        """
        places = self._places()
        wanted = self._wanted(near, places)
        about = {t for s in condition.about for t in _terms(places.get(s, ""))}
        named = [s for s in wanted if s in about]
        moves = [{s: n} for s in named for n in condition.turns()]
        small = {s: range(s != PAST, 5) for s in named}  # an empty cache is one; no other input is
        for a, b in itertools.combinations(named, 2):  # a sum is small where both are
            moves += [{a: m, b: n} for m in small[a] for n in small[b]]
        for move in moves:
            tried = {**wanted, **move}
            given = {size: _extent(text, tried) for size, text in places.items()}
            if not condition.holds(given) and broken(self.conditions, given) is None:
                return tried
        return None

    def sample(self, size: Extents = SIZES[0], seed: int = 0) -> dict[str, Array]:
        """Arrays of one size; each input has a generator of its own, from (seed, name)."""
        shapes, before = self.sizes(size), (self.values(size) or {}).get(PAST, 0)
        result: dict[str, Array] = {}
        for s in self.specs:
            rng = generator(s.name, seed)
            shape, dtype = shapes[s.name], numpy_dtype(s.dtype)
            if s.is_mask:
                counts = 1 if s.fill is None else s.fill
                result[s.name] = np.full(shape, counts, dtype)
                if "+" in s.dims.get(1, "") and before:
                    result[s.name][:1, :1] = 1 - counts  # padding: else a graph may ignore the mask
                elif s.fill is None and dtype == np.bool_:
                    result[s.name][..., 1::2] = False
            elif s.is_integer:
                result[s.name] = rng.integers(0, max(1, s.high or 2), shape).astype(dtype)
            else:
                result[s.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
        return result

    def to_json(self) -> list[Json]:
        """Rows of `inputs[]`."""
        return [s.to_json() for s in self.specs]


@lru_cache(8)
def _steps(count: int, reach: int = 64) -> Sequence[tuple[int, ...]]:
    """Changes of so many values, small ones first."""
    line = [0, *(k for n in range(1, reach) for k in (n, -n))]
    if count == 1:
        return [(k,) for k in [*line, *range(reach, 4096)]]
    if count < 4:
        short = line if count < 3 else line[:13]
        return sorted(itertools.product(short, repeat=count), key=lambda t: sum(map(abs, t)))
    return [(k,) * count for k in line]


def _terms(symbol: str) -> list[str]:
    """The parts of a sum such as `past + length`."""
    return [part.strip() for part in symbol.split("+")]


@lru_cache(4096)
def _implied(condition: Condition, places: tuple[tuple[Size, str], ...]) -> bool:
    """Whether it holds for all that the symbols of its sizes may be, as far as trying tells."""
    symbols = sorted({t for _, text in places for t in _terms(text) if not t.isdigit()})
    turns = condition.turns()
    tried = itertools.product((1, 2, 3, 8, 37, 10**9), repeat=min(len(symbols), 4))
    values = [dict(zip(symbols, n, strict=False)) for n in tried]
    values += [
        {**dict.fromkeys(symbols, rest), s: n} for s in symbols for rest in (1, 2, 3) for n in turns
    ]
    return all(condition.holds({s: _extent(t, v) for s, t in places}) for v in values)


def _extent(symbol: str, values: Mapping[str, int]) -> int:
    """The value of a symbol, or of a sum of symbols and numbers."""
    return sum(int(t) if t.isdigit() else values.get(t, 1) for t in _terms(symbol))


def default_dynamic(inputs: Inputs) -> dict[str, dict[int, str]]:
    """Dimension 0 of all, dimension 1 of integers, masks and 3-d floats; never height or width."""
    first = next((s.shape[0] for s in inputs.specs if s.shape), None)
    lengths = {s.shape[1] for s in inputs.specs if _has_length(s)} - {0}
    result: dict[str, dict[int, str]] = {}
    for s in inputs.specs:
        if not s.shape:
            continue
        if s.shape[0] == 0:
            raise LoraFxError(
                f"the example for {s.name!r} has size 0: {list(s.shape)}", "give at least one row"
            )
        dims = {0: BATCH if s.shape[0] in (first, 1) else f"{s.name}_0"}
        # 1 is broadcast, and an empty part stays one
        if _has_length(s) and s.shape[1] and not (s.shape[1] == 1 and not s.is_integer):
            dims[1] = LENGTH if len(lengths) == 1 else f"{s.name}_length"
        result[s.name] = dims
    return result


def _has_length(s: Input) -> bool:
    if s.is_integer or s.is_mask:
        return len(s.shape) >= 2
    return len(s.shape) == 3


def merge_dynamic(
    inputs: Inputs,
    defaults: Mapping[str, Mapping[int, str]],
    dynamic: Dynamic | None,
    static: Sequence[str] = (),
) -> dict[str, dict[int, str]]:
    """Defaults, plus what `dynamic` asks for, less what `static` fixes.

    Args:
        dynamic: {input: {dimension: symbol}} or {input: (dimension, …)}.
        static: `NAME`, or `NAME:DIM`.
    """
    result = {k: dict(v) for k, v in defaults.items()}
    ranks = {s.name: len(s.shape) for s in inputs.specs}
    for name, dims in (dynamic or {}).items():
        expect_input(name, ranks)
        pairs = dims.items() if isinstance(dims, Mapping) else [(d, "") for d in dims]
        for d, symbol in pairs:
            d = int(d)
            if not -ranks[name] <= d < ranks[name]:
                raise LoraFxError(
                    f"input {name!r} has {ranks[name]} dimensions, so there is no dimension {d}",
                    "dimensions count from 0",
                )
            d %= ranks[name]
            given = symbol if isinstance(symbol, str) else getattr(symbol, "__name__", "")
            label = given or (BATCH if d == 0 else f"{name}_{d}")  # torch's Dim has a __name__
            result.setdefault(name, {})[d] = label
    for text in static:
        name, colon, dim = text.partition(":")
        expect_input(name, ranks)
        if colon:
            result.get(name, {}).pop(int(dim), None)
        else:
            result.pop(name, None)
    return result


OTHER_SIZES = (
    "--inputs FILE.npz brings arrays of sizes that the model takes; for a model of torch "
    "--static NAME:DIM keeps a dimension as its example has it"
)
"""The hint where a model refuses sizes that a check has drawn."""


def expect_input(name: str, names: Collection[str]) -> None:
    """Refuse the name of an input that a model does not have."""
    if name not in names:
        raise LoraFxError(f"no input is named {name!r}", f"the inputs are {', '.join(names)}")


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """`NAME:0=batch,2=h` of the command line.

    >>> parse_dynamic(["x:0=batch,2=h", "ids:1"])
    {'x': {0: 'batch', 2: 'h'}, 'ids': {1: ''}}
    """
    result: dict[str, dict[int, str]] = {}
    for text in texts:
        name, _, dims = text.partition(":")
        try:
            for part in dims.split(","):
                d, _, symbol = part.partition("=")
                result.setdefault(name, {})[int(d)] = symbol
        except ValueError as e:
            raise LoraFxError(
                f"--dynamic {text!r} is not NAME:DIM=SYMBOL,…",
                "for example --dynamic x:0=batch,2=height",
            ) from e
    return result
