"""A small text encoder, two adapters of it, and what may go wrong with an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank

ROWS = 40
WIDTH = 24
LAYERS = 3


class Layer(nn.Module):
    """Attention and a gated product, as encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unsqueeze(1)
        k = self.k_proj(x).unsqueeze(1)
        v = self.v_proj(x).unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = x + self.o_proj(attended)
        return self.norm(x + self.down_proj(nn.functional.gelu(self.up_proj(x))))


class Encoder(nn.Module):
    """Tokens to scores of three classes at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores


def encoder(seed: int = 0) -> tuple[Encoder, Tensor]:
    """The model and an example of its input."""
    torch.manual_seed(seed)
    return Encoder().eval(), torch.randint(0, ROWS, (2, 6))


def adapter(seed: int) -> Adapter:
    """An adapter whose effect is of a usual size."""
    model, ids = encoder()
    adapted = lora_fx.insert(model, (ids,), rank=4)
    generator = torch.Generator().manual_seed(seed)
    for factors in adapted.tensors().values():
        with torch.no_grad():
            drawn = torch.randn(factors["b"].shape, generator=generator)
            factors["b"].copy_(0.15 * drawn)
    return adapted.adapter()


@cache
def adapters() -> dict[str, Adapter]:
    return {"de": adapter(1), "fr": adapter(2)}


Change = Callable[[str, LowRank], LowRank | None]


def changed(source: Adapter, change: Change) -> Adapter:
    """The adapter with each update replaced; None leaves it out."""
    entries = {}
    for key, update in source.lowrank.items():
        after = change(key, update)
        if after is not None:
            entries[key] = after
    return Adapter(entries)


def scaled(factor: float) -> Callable[[Adapter], Adapter]:
    return lambda source: changed(
        source, lambda _, update: replace(update, b=update.b * np.float32(factor))
    )


def without(*words: str) -> Callable[[Adapter], Adapter]:
    """The adapter without the keys that contain one of the words."""

    def keep(key: str, update: LowRank) -> LowRank | None:
        is_dropped = any(word in key for word in words)
        return None if is_dropped else update

    return lambda source: changed(source, keep)


def exchanged(one: str, other: str) -> Callable[[Adapter], Adapter]:
    """The adapter with the updates of two roles exchanged, of equal shapes."""

    def exchange(source: Adapter) -> Adapter:
        entries = {}
        for key in source.lowrank:
            twin = key
            if one in key:
                twin = key.replace(one, other)
            elif other in key:
                twin = key.replace(other, one)
            entries[key] = source.lowrank[twin]
        return Adapter(entries)

    return exchange


def rounded(dtype: str) -> Callable[[Adapter], Adapter]:
    import ml_dtypes

    number = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)

    def cast(_: str, update: LowRank) -> LowRank:
        a = update.a.astype(number).astype(np.float32)
        return replace(update, a=a, b=update.b.astype(number).astype(np.float32))

    return lambda source: changed(source, cast)


def drawn_anew(source: Adapter) -> Adapter:
    rng = np.random.default_rng(9)
    return changed(
        source,
        lambda _, update: replace(
            update, b=(0.15 * rng.standard_normal(update.b.shape)).astype(np.float32)
        ),
    )


def cut_to(rank: int) -> Callable[[Adapter], Adapter]:
    """The first ranks alone, with the scale that the update had."""

    def cut(_: str, update: LowRank) -> LowRank:
        a = np.ascontiguousarray(update.a[..., :rank, :])
        b = np.ascontiguousarray(update.b[..., :rank])
        return replace(update, a=a, b=b, alpha=update.scale * rank)

    return lambda source: changed(source, cut)


def misread_a(source: Adapter) -> Adapter:
    """A [rank, in] read as if it lay [in, rank]."""
    return changed(
        source,
        lambda _, update: replace(
            update, a=np.ascontiguousarray(update.a.reshape(update.a.shape[::-1]).T)
        ),
    )


def reversed_rows(source: Adapter) -> Adapter:
    """The halves of B's rows exchanged, as where a fused weight's parts are in another order."""

    def exchange(key: str, update: LowRank) -> LowRank:
        if "up_proj" not in key:
            return update
        half = update.b.shape[0] // 2
        return replace(update, b=np.concatenate([update.b[half:], update.b[:half]]))

    return changed(source, exchange)


def one_layer_for_all(source: Adapter) -> Adapter:
    """Layer 0's updates in every layer, as where names lose their numbers."""
    entries = {}
    for key in source.lowrank:
        first = re.sub(r"layers\.\d", "layers.0", key)
        entries[key] = source.lowrank[first]
    return Adapter(entries)


def shifted_layers(source: Adapter) -> Adapter:
    """Each layer's updates in the next layer, as where numbers begin with 1."""
    entries = {}
    for key in source.lowrank:
        earlier = re.sub(
            r"layers\.(\d)", lambda layer: f"layers.{(int(layer[1]) - 1) % LAYERS}", key
        )
        entries[key] = source.lowrank[earlier]
    return Adapter(entries)


def poisoned(value: float, word: str) -> Callable[[Adapter], Adapter]:
    """The adapter with one number of one update replaced."""

    def poison(key: str, update: LowRank) -> LowRank:
        if word not in key:
            return update
        b = update.b.copy()
        b.flat[0] = value
        return replace(update, b=b)

    return lambda source: changed(source, poison)


def partly(factor: float, word: str) -> Callable[[Adapter], Adapter]:
    """The adapter with some of its updates multiplied."""
    return lambda source: changed(
        source,
        lambda key, update: (
            replace(update, b=update.b * np.float32(factor)) if word in key else update
        ),
    )


def mixed(share: float) -> Callable[[Adapter], Adapter]:
    """The weighted sum of the adapter and the other one."""

    def mix(source: Adapter) -> Adapter:
        other = next(one for one in adapters().values() if one is not source)
        return lora_fx.adapter.adapter.mix([(source, share), (other, 1 - share)])

    return mix


DIFFERS = "differs"


def fits(scale: float) -> set[str]:
    """The verdicts on a scale: a fitted one is near it."""
    near = {f"scaled by {round(scale + step / 100, 2):g}" for step in range(-3, 4)}
    return {*near, DIFFERS}


FAILURES: Mapping[str, tuple[Callable[[Adapter], Adapter], set[str]]] = {
    "zero": (scaled(0), {"no effect"}),
    "twice": (scaled(2), {"scaled by 2"}),
    "half, as where alpha is ignored": (scaled(0.5), {"scaled by 0.5"}),
    "a quarter": (scaled(0.25), fits(0.25)),
    "rslora for lora": (scaled(1.5), fits(1.5)),
    "a small scale": (scaled(0.8), fits(0.8)),
    "a little too much": (scaled(1.04), fits(1.04)),
    "a little too small": (scaled(0.93), fits(0.93)),
    "negative": (scaled(-1), {DIFFERS}),
    "four times": (scaled(4), {DIFFERS}),
    "no q, first half": (without("0.q_proj", "1.q_proj"), {"without q, first half", DIFFERS}),
    "no q": (without("q_proj"), {"without q", DIFFERS}),
    "no up": (without("up_proj"), {"without up", DIFFERS}),
    "no attention": (without("q_proj", "k_proj", "v_proj", "o_proj"), {DIFFERS}),
    "the first layer alone": (without("layers.1", "layers.2"), {DIFFERS}),
    "no last layer": (without("layers.2"), {DIFFERS}),
    "one target missing": (without("layers.2.down_proj"), {"without down, second half", DIFFERS}),
    "q and k exchanged": (exchanged("q_proj", "k_proj"), {DIFFERS}),
    "v and o exchanged": (exchanged("v_proj", "o_proj"), {DIFFERS}),
    "halves of up exchanged": (reversed_rows, {DIFFERS}),
    "A read transposed": (misread_a, {DIFFERS}),
    "rank 2 of 4": (cut_to(2), {DIFFERS}),
    "rank 3 of 4": (cut_to(3), {DIFFERS}),
    "layer 0 everywhere": (one_layer_for_all, {DIFFERS}),
    "layers shifted": (shifted_layers, {DIFFERS}),
    "B drawn anew": (drawn_anew, {DIFFERS}),
    "the other adapter": (mixed(0.0), {"adapter fr", DIFFERS}),
    "two mixed": (mixed(0.5), {DIFFERS}),
    "a little of the other": (mixed(0.9), {DIFFERS}),
    "down twice": (partly(2, "down_proj"), {DIFFERS}),
    "v with the other sign": (partly(-1, "v_proj"), {DIFFERS}),
    "one infinite number": (poisoned(np.inf, "0.up_proj"), {"not finite"}),
    "one NaN": (poisoned(np.nan, "2.q_proj"), {"not finite"}),
    "overflow": (scaled(1e30), {"not finite", DIFFERS}),
}
"""What goes wrong with the adapter de, and the verdicts that are no mistake."""
