"""Tokens of things: equal as long as nothing of a thing has changed, and equal to no other else."""

from __future__ import annotations

import functools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import CellType, FunctionType
from typing import Any, ClassVar
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from lora_fx.fx.capture import snapshot
from lora_fx.fx.capture.snapshot import Snapshot, Unseen

VARIABLE: ContextVar[list[int]] = ContextVar("VARIABLE")


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = [1]


class Lazy:
    shared: ClassVar[list[int]] = [1]

    @functools.cached_property
    def doubled(self) -> list[int]:
        return self.shared * 2

    def read(self) -> list[int]:
        return self.shared

    @property
    def tripled(self) -> list[int]:
        return self.shared * 3

    @staticmethod
    def fixed(x: list[int] = shared) -> list[int]:
        return x


class Endless:
    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return 1


def counting(numbers: list[int], *, start: int = 0) -> int:
    return len(numbers) + start


def closure(numbers: list[int]) -> Callable[[], int]:
    return lambda: len(numbers)


def unfilled() -> FunctionType:
    """A function with an empty cell."""
    return FunctionType(closure([1]).__code__, globals(), closure=(CellType(),))


def changing(kind: str) -> tuple[Any, Callable[[], object]]:
    """A thing, and what changes it."""
    numbers = [1, 2]
    match kind:
        case "list":
            return numbers, lambda: numbers.append(3)
        case "dict in tuple":
            content = {"a": 1}
            return (content,), lambda: content.update(b=2)
        case "set":
            names = {"a"}
            return names, lambda: names.add("b")
        case "deque":
            queue = deque([1])
            return queue, lambda: queue.append(2)
        case "counter":
            counter = Counter("a")
            return counter, lambda: counter.update("b")
        case "tensor":
            tensor = torch.zeros(2)
            return tensor, lambda: tensor.add_(1)
        case "array":
            array = np.zeros(2)
            return array, lambda: array.fill(1)
        case "bytearray":
            data = bytearray(b"a")
            return data, lambda: data.extend(b"b")
        case "module's mode":
            layer = nn.Linear(2, 2)
            return layer, layer.eval
        case "module's attribute":
            layer = nn.Linear(2, 2)
            return layer, lambda: setattr(layer, "extra", 1)
        case "slots":
            slotted = Slotted()
            return slotted, lambda: slotted.value.append(2)
        case "class":
            lazier = type("Lazier", (Lazy,), {"__module__": "user", "extra": numbers})
            return lazier, lambda: numbers.append(3)
        case "partial":
            return functools.partial(counting, numbers, start=1), lambda: numbers.append(3)
        case "method":
            lazy = Lazy()
            return lazy.read, lambda: setattr(lazy, "extra", 1)
        case "closure":
            return closure(numbers), lambda: numbers.append(3)
        case "cached function":
            return functools.lru_cache(closure(numbers)), lambda: numbers.append(3)
        case "built-in method":
            return numbers.append, lambda: numbers.append(3)
        case "context variable":
            VARIABLE.set(numbers)
            return VARIABLE, lambda: numbers.append(3)
        case "weak reference":
            lazy = Lazy()
            changing.alive = lazy  # type: ignore[attr-defined]
            return ref(lazy), lambda: setattr(lazy, "extra", 1)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["list", "dict in tuple", "set", "deque", "counter", "tensor", "array", "bytearray",
     "module's mode", "module's attribute", "slots", "class", "partial", "method", "closure",
     "cached function", "built-in method", "context variable", "weak reference"],
)  # fmt: skip
def test_a_token_changes_with_its_thing(kind: str) -> None:
    thing, change = changing(kind)
    before = Snapshot().token(thing)
    assert before == Snapshot().token(thing)
    change()
    assert before != Snapshot().token(thing)


@pytest.mark.parametrize(
    "thing",
    [1, 1.5, float("nan"), 2j, "a", None, torch.float32, torch, Lazy, Lazy(),
     Lazy.fixed, vars(Lazy)["doubled"], vars(Lazy)["tripled"], vars(Lazy)["fixed"], len,
     unfilled(), {1, 2}, {"a": [1]}, object(), nn.ReLU()],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
def test_a_token_stays_with_its_thing(thing: Any) -> None:
    assert Snapshot().token(thing) == Snapshot().token(thing)


def test_numbers_of_one_value_are_told_apart_by_type_and_sign() -> None:
    now = Snapshot()
    tokens = [now.token(x) for x in (1, True, 1.0, 0.0, -0.0)]
    assert len(set(map(repr, tokens))) == len(tokens)


@pytest.mark.parametrize(
    "thing",
    [iter([1]), Endless(), random.Random(0), random.random, np.array([object()]), np.zeros(1 << 18),
     bytearray(1 << 21), lambda x: id(x), lambda: globals()],
    ids=["iterator", "endless", "random", "random's method", "objects", "large", "bytes",
         "id", "globals"],
)  # fmt: skip
def test_what_cannot_be_seen_into_equals_nothing(thing: Any) -> None:
    assert repr(Snapshot().token(thing)).count("Unseen object")
    assert Snapshot().token(thing) != Snapshot().token(thing)


def test_a_module_that_holds_blocks_equals_nothing() -> None:
    block = nn.Linear(2, 2)
    around = Snapshot([id(block)])
    assert isinstance(around.token(nn.Sequential(block)), Unseen)
    assert not isinstance(around.token(nn.ReLU()), Unseen)


def test_a_thing_that_holds_itself_has_a_token() -> None:
    thing: list[object] = [1]
    thing.append(thing)
    assert Snapshot().token(thing) == Snapshot().token(thing)


def test_a_snapshot_is_of_a_bounded_number_of_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MOST", 3)
    now = Snapshot()
    tokens = [now.token([i]) for i in range(4)]
    assert [isinstance(token, Unseen) for token in tokens] == [False, False, False, True]


def test_names_of_code_are_gathered() -> None:
    now = Snapshot()
    now.token(lambda x: vars(x).keys())
    assert {"vars", "keys"} <= now.names
