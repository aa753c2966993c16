"""Inputs from a signature of names, dtypes and dimensions: the sizes and values of every check.

Symbols take the sizes (2, 5), (3, 7), (1, 11): the first number is the batch (dimension 0), the
second every other symbol; `past`, the tokens in a decoder's cache, takes first · second mod 7, and
`past + length` their sum. Integers lie below the rows of the table they index, masks are ones (over
a cache that is not empty, the first row is padded by one), floats are N(0, 1), from seed 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.dtypes import numpy_dtype
from lora_fx.errors import LoraFxError

Named = Mapping[str, Any]
"""Arguments of a call by name; each is a tensor, or one of torch's pytrees."""
SIZES: tuple[tuple[int, int], ...] = ((2, 5), (3, 7), (1, 11))
BATCH = "batch"
LENGTH = "length"
PAST = "past"
CACHE_SIZES: tuple[tuple[int, int], ...] = (*SIZES, (2, 1))
"""Of a decoder: 3, 0, 4 and 2 tokens in the cache; one new token is what it mostly runs on."""


@dataclass(frozen=True)
class Input:
    """One tensor input.

    Attributes:
        name: Argument name; parts of a container have `.i` after it.
        dtype: int64, float32, bool …
        shape: Sizes of the example.
        dims: Dimension → symbol, for the dynamic ones.
        high: Integers lie below this; None while unknown.
        upper: Dimension → the largest size that the model takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: Mapping[int, str] = field(default_factory=dict)
    high: int | None = None
    upper: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_integer(self) -> bool:
        """True for token ids, labels, masks of integers."""
        return "int" in self.dtype

    @property
    def is_mask(self) -> bool:
        """True for booleans, and for integers that their name calls a mask."""
        return self.dtype == "bool" or (self.is_integer and "mask" in self.name)

    def to_json(self) -> dict[str, Any]:
        """One row of `inputs[]`: dimensions are numbers or symbols."""
        dims = [self.dims.get(i, n) for i, n in enumerate(self.shape)]
        return {"name": self.name, "dtype": self.dtype, "shape": dims}


@dataclass(frozen=True)
class Inputs:
    """The tensor inputs of a model, in the order of its flattened arguments."""

    specs: tuple[Input, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(s.name for s in self.specs)

    @property
    def checks(self) -> tuple[tuple[int, int], ...]:
        """(batch, other) of every check."""
        cached = any(symbol == PAST for s in self.specs for symbol in s.dims.values())
        return CACHE_SIZES if cached else SIZES

    def with_dims(self, requested: Mapping[str, Mapping[int, str]]) -> Inputs:
        """The same inputs with these dimensions dynamic."""
        return Inputs(tuple(replace(s, dims=requested.get(s.name, {})) for s in self.specs))

    def sizes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shape of every input where symbols take (batch, other)."""
        result = {}
        for s in self.specs:
            shape = list(s.shape)
            for d, symbol in s.dims.items():
                n = sum(_extent(part.strip(), size) for part in symbol.split("+"))
                shape[d] = min(n, s.upper.get(d, n))
            result[s.name] = tuple(shape)
        return result

    def sample(
        self, size: tuple[int, int] = SIZES[0], seed: int = 0
    ) -> dict[str, npt.NDArray[Any]]:
        """Arrays of one size; each input has a generator of its own, from (seed, name)."""
        shapes = self.sizes(size)
        result: dict[str, npt.NDArray[Any]] = {}
        for s in self.specs:
            digest = hashlib.sha256(f"{seed}:{s.name}".encode()).digest()
            rng = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
            shape, dtype = shapes[s.name], numpy_dtype(s.dtype)
            if s.is_mask:
                result[s.name] = np.ones(shape, dtype)
                if "+" in s.dims.get(1, "") and shape[1] > size[1]:
                    result[s.name][:1, :1] = 0  # padding: else a graph may ignore the mask
            elif s.is_integer:
                result[s.name] = rng.integers(0, max(1, s.high or 2), shape).astype(dtype)
            else:
                result[s.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
        return result

    def to_json(self) -> list[dict[str, Any]]:
        """Rows of `inputs[]`."""
        return [s.to_json() for s in self.specs]


def _extent(symbol: str, size: tuple[int, int]) -> int:
    if symbol == PAST:
        return size[0] * size[1] % 7
    return size[0] if symbol == BATCH else size[1]


def default_dynamic(inputs: Inputs) -> dict[str, dict[int, str]]:
    """Dimension 0 of all, dimension 1 of integers, masks and 3-d floats; never height or width."""
    first = next((s.shape[0] for s in inputs.specs if s.shape), None)
    lengths = {s.shape[1] for s in inputs.specs if _has_length(s)}
    result: dict[str, dict[int, str]] = {}
    for s in inputs.specs:
        if not s.shape:
            continue
        if 0 in s.shape:
            raise LoraFxError(
                f"the example for {s.name!r} has size 0: {list(s.shape)}", "give at least one row"
            )
        dims = {0: BATCH if s.shape[0] in (first, 1) else f"{s.name}_0"}
        if _has_length(s) and not (s.shape[1] == 1 and not s.is_integer):  # 1 is broadcast
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
    dynamic: Mapping[str, Any] | None,
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
        _known(name, ranks)
        pairs = dims.items() if isinstance(dims, Mapping) else [(d, None) for d in dims]
        for d, symbol in pairs:
            d = int(d)
            if not -ranks[name] <= d < ranks[name]:
                raise LoraFxError(
                    f"input {name!r} has {ranks[name]} dimensions, so there is no dimension {d}",
                    "dimensions count from 0",
                )
            d %= ranks[name]
            label = str(symbol) if symbol else BATCH if d == 0 else f"{name}_{d}"
            result.setdefault(name, {})[d] = label
    for text in static:
        name, colon, dim = text.partition(":")
        _known(name, ranks)
        if colon:
            result.get(name, {}).pop(int(dim), None)
        else:
            result.pop(name, None)
    return result


def _known(name: str, ranks: Mapping[str, int]) -> None:
    if name not in ranks:
        raise LoraFxError(f"no input is named {name!r}", f"the inputs are {', '.join(ranks)}")


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
