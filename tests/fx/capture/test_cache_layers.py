"""Blocks that fill a key-value cache, each its own layer: copies where that is all they do with it.

A graph with copies is that of the long way, node for node. A block that does anything more with the
cache, or with the number of its layer, has none.
"""

# mypy: disable-error-code="override"
# Blocks with a cache take one argument more than the blocks of test_repeat.

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.fx.capture.decoder import decoder
from tests.fx.capture.test_repeat import Block, captures, rows
from tests.onnx.decoders import MODELS

cache_utils = pytest.importorskip("transformers.cache_utils")


AnyBlock: Any = Block
"""Its forward takes no cache, and those of its subclasses do."""


class Fills(AnyBlock):  # type: ignore[misc]
    """Puts what it computes behind what its layer has, and reads both."""

    def forward(self, x: Any, cache: Any) -> Any:
        y = super().forward(x)
        keys, values = cache.update(y[:, None], -y[:, None], self.index)
        return y + keys.mean((1, 2))[:, None] * values.amax((1, 2))[:, None]


class IsInRange(Fills):
    """Asks what is so for the number of every layer."""

    def forward(self, x: Any, cache: Any) -> Any:
        y = super().forward(x, cache)
        return -y if self.index < len(cache.layers) else y


class ReadsOwn(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) + cache.layers[self.index].keys.sum((1, 2))[:, None]


class Around(AnyBlock):  # type: ignore[misc]
    """A block with one in it that fills the layer; the number is that of the inner one."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.inner = Fills(index)

    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x) + self.inner(x, cache)


class AroundByNumber(Around):
    """The inner blocks are alike, and the outer ones are not."""

    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) * (1.0 + self.index)


class Scales(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) * (1 + self.index)


class IsFirst(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        y = super().forward(x, cache)
        return -y if self.index == 0 else y


class ByName(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) * {"1": 2.0}.get(f"{self.index}", 1.0)


class ByKind(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) * (2.0 if isinstance(self.index, int) else 1.0)


class ReadsFirst(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) + cache.layers[0].keys.mean((1, 2))[:, None]


class ReadsBefore(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) + cache.layers[self.index - 1].keys.mean((1, 2))[:, None]


class ReadsAll(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        y = super().forward(x, cache)
        return y + sum(layer.keys.mean((1, 2))[:, None] for layer in cache.layers)


class ReadsLength(Fills):
    """The length of a cache is that of its first layer."""

    def forward(self, x: Any, cache: Any) -> Any:
        return super().forward(x, cache) * cache.get_seq_length()


class Counts(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        cache.calls = getattr(cache, "calls", 0) + 1
        return super().forward(x, cache)


class AddsLayer(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        cache.layers.append(cache_utils.DynamicLayer())
        return super().forward(x, cache)


class MarksLayer(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        cache.layers[self.index].mark = self.index
        return super().forward(x, cache)


class WritesLayer(Fills):
    def forward(self, x: Any, cache: Any) -> Any:
        cache.layers[self.index].keys.add_(1.0)
        return super().forward(x, cache)


FIRST: list[Any] = []
"""The first layer of the present cache, as code beside a model may keep it."""


class WritesFirst(Fills):
    """Changes the first layer without asking the cache for it."""

    def forward(self, x: Any, cache: Any) -> Any:
        FIRST[0].keys = FIRST[0].keys + 1.0
        return super().forward(x, cache)


class TwoNumbers(Fills):
    """Two numbers in a block, of which one is that of its layer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.turned = 2 - index


class OwnCache(cache_utils.DynamicCache):  # type: ignore[misc,name-defined]
    """A class of the user's: what its methods do is not known."""

    def update(self, keys: Any, values: Any, index: Any, **named: Any) -> Any:
        return super().update(keys * (1.0 + len(self.layers[0].keys)), values, index, **named)


class WithCache(nn.Module):
    """Blocks that share one filled cache, whose layers are outputs too."""

    def __init__(self, kind: type[Block], cache: Any = cache_utils.DynamicCache) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind(i) for i in range(3)])
        self.cache = cache

    def forward(self, x: Any) -> Any:
        past = x[:, None].tanh()
        cache = self.cache([(past + i, past * i) for i in range(len(self.blocks))])
        FIRST[:] = cache.layers[:1]
        for block in self.blocks:
            x = block(x, cache)
        return x, [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]


ALIKE = (Fills, IsInRange, ReadsOwn, Around, AroundByNumber)
APART = (
    *(Scales, IsFirst, ByName, ByKind, ReadsFirst, ReadsBefore, ReadsAll, ReadsLength, Counts),
    *(AddsLayer, MarksLayer, WritesLayer, WritesFirst, TwoNumbers),
)


@pytest.mark.parametrize("kind", ALIKE)
def test_copies_fill_the_layers_of_their_blocks(kind: type[Block]) -> None:
    torch.manual_seed(0)
    (cap, ours), (_, long) = captures(WithCache(kind))
    assert (ours.copies, long.copies) == (2, 0)
    assert rows(ours.graph) == rows(long.graph)
    assert ours.door.conditions == long.door.conditions
    assert not any("alike" in n for n in cap.notes)


@pytest.mark.parametrize("kind", [*APART, OwnCache])
def test_more_that_is_done_with_a_cache_is_traced_by_itself(kind: Any) -> None:
    torch.manual_seed(0)
    model = WithCache(Fills, OwnCache) if kind is OwnCache else WithCache(kind)
    (cap, ours), (_, long) = captures(model)
    assert ours.copies == 0
    assert rows(ours.graph) == rows(long.graph)
    assert not any("alike" in n for n in cap.notes)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_of_a_decoder_is_traced_as_one_op(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.fx.experimental import proxy_tensor

    original = proxy_tensor.proxy_call
    traced: list[str] = []

    def counted(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        traced.append(str(func))
        return original(mode, func, *args, **kwargs)

    monkeypatch.setattr(proxy_tensor, "proxy_call", counted)
    counts: list[int] = []
    for depth in (2, 4):
        traced.clear()
        model = MODELS[name](depth).requires_grad_(False)
        captured = decoder(model)
        counts.append(len(traced))
        assert captured.traced(False, captured.named).copies == depth - 1
    assert counts[1] - counts[0] == 2
