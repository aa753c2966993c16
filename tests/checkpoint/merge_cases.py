"""Random merges, and what each should give: W + Σ w·s·BA in fp64, by definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.dtypes import numpy_dtype
from tests.checkpoint.made import Array, adapter, checkpoint

DTYPES = ("float32", "float16", "bfloat16", "float64")
FILED = ("linear", "conv1d", "conv2d", "embedding")
"""Kinds that PEFT's files know; the others are Adapters in memory."""
KINDS = (*FILED, "region", "stack", "turned stack")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a base: what kind of weight it is, and its sides."""

    name: str
    kind: str
    dtype: str
    out: int
    in_: int
    extent: tuple[int, ...]  # kernel, or experts, or the region's start and stop

    @property
    def shape(self) -> tuple[int, ...]:
        if self.kind in ("conv1d", "conv2d"):
            return (self.out, self.in_, *self.extent)
        if self.kind == "embedding":
            return (self.in_, self.out)
        if self.kind == "stack":
            return (*self.extent, self.out, self.in_)
        if self.kind == "turned stack":
            return (*self.extent, self.in_, self.out)
        return (self.out, self.in_)


@dataclass(frozen=True)
class Update:
    """One adapter's update of one tensor."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Case:
    """A base, adapters, and how they are merged."""

    seed: int
    conv1d_style: bool  # weights of linears are stored [in, out], as GPT-2's
    tensors: tuple[Tensor, ...]
    adapters: tuple[dict[str, Update], ...]
    weights: tuple[float, ...]
    rslora: bool
    form: str
    pad: int
    dtype: str | None


sides = st.sampled_from((1, 2, 3, 5, 8, 17, 24, 40, 63, 96))


@st.composite
def tensor(draw: Any, i: int, kinds: tuple[str, ...]) -> Tensor:
    kind = draw(st.sampled_from(kinds))
    out, in_ = draw(sides), draw(sides)
    if kind == "conv1d":
        extent: tuple[int, ...] = (draw(st.integers(1, 4)),)
    elif kind == "conv2d":
        extent = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    elif "stack" in kind:
        extent = (draw(st.integers(1, 4)),)
        in_ += out == in_  # a square one could lie either way
    elif kind == "region":
        low, left = draw(st.integers(0, out - 1)), draw(st.integers(0, in_ - 1))
        extent = (low, draw(st.integers(low + 1, out)), left, draw(st.integers(left + 1, in_)))
    else:
        extent = ()
    return Tensor(
        f"m.{i}.{kind.split()[0]}.weight", kind, draw(st.sampled_from(DTYPES)), out, in_, extent
    )


@st.composite
def cases(draw: Any) -> Case:
    style = draw(st.sampled_from((False, False, True)))
    kinds = FILED if style else KINDS
    tensors = tuple(draw(tensor(i, kinds)) for i in range(draw(st.integers(1, 4))))
    adapters = []
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        # A file or memory: a file holds what PEFT knows.
        mine = [t for t in tensors if t.kind in FILED] if draw(st.booleans()) else list(tensors)
        mine = [t for t in mine or tensors if draw(st.integers(0, 3))] or [tensors[0]]
        adapters.append(
            {
                t.name: Update(
                    draw(st.sampled_from((1, 2, 3, 4, 7, 12, 16, 33, 64))),
                    draw(st.sampled_from((0.0, 1.0, 4.0, 3.5, 16.0, 24.0, -5.0))),
                )
                for t in mine
            }
        )
    weights = tuple(draw(st.sampled_from((1.0, 1.0, 0.3, -1.0, -0.7, 2.0))) for _ in adapters)
    form = "folder" if style else draw(st.sampled_from(("file", "folder", "shards")))
    return Case(
        draw(st.integers(0, 2**32 - 1)), style, tensors, tuple(adapters), weights,
        draw(st.booleans()), form, draw(st.integers(0, 9)),
        draw(st.sampled_from((None, None, None, *DTYPES))),
    )  # fmt: skip


def _delta(t: Tensor, low: LowRank) -> Array:
    """What an update adds to the stored tensor, in fp64."""
    a, b = low.a.astype(np.float64), low.b.astype(np.float64)
    scale = low.alpha / (math.sqrt(low.rank) if low.variant == "rslora" else low.rank)
    delta = np.zeros(t.shape)
    if t.kind in ("stack", "turned stack"):
        for e in range(t.extent[0]):
            one = scale * (b[e] @ a[e])
            delta[e] = one if t.kind == "stack" else one.T
    elif t.kind == "region":
        top, bottom, left, right = t.extent
        delta[top:bottom, left:right] = scale * (b @ a)
    elif t.kind == "embedding":
        delta += scale * (b @ a).T
    else:
        delta += scale * (b @ a).reshape(t.shape)
    return delta


def build(case: Case, folder: Path) -> tuple[Path, list[tuple[Any, float]], dict[str, Array]]:
    """The base, the adapters with their weights, and the exact result of every touched tensor."""
    rng = np.random.default_rng(case.seed)
    base: dict[str, Array] = {}
    exact: dict[str, Array] = {}
    turned = {t.name for t in case.tensors if case.conv1d_style and t.kind == "linear"}
    for t in case.tensors:
        value = rng.standard_normal(t.shape) * 0.05
        value = value.T if t.name in turned else value
        base[t.name] = np.ascontiguousarray(value.astype(numpy_dtype(t.dtype)))
        base[f"{t.name[:-6]}still"] = rng.integers(0, 255, (3, 5), np.uint8)
    given: list[tuple[Any, float]] = []
    known = {t.name: t for t in case.tensors}
    for i, (updates, weight) in enumerate(zip(case.adapters, case.weights, strict=True)):
        lows = {n: _low(rng, known[n], u, case.rslora) for n, u in updates.items()}
        for name, low in lows.items():
            delta = weight * _delta(known[name], low)
            before = exact.get(name, base[name].astype(np.float64))
            exact[name] = before + (delta.T if name in turned else delta)
        filed = all(known[n].kind in FILED for n in lows)
        source = _filed(folder / f"adapter{i}", lows, known) if filed else _held(lows, known)
        given.append((source, weight))
    path = folder / ("base.safetensors" if case.form == "file" else "base")
    config = {"model_type": "gpt2"} if case.conv1d_style else {"model_type": "llama"}
    checkpoint(path, base, 2 if case.form == "shards" else 1, config=config, pad=case.pad)
    return path, given, exact


def _low(rng: np.random.Generator, t: Tensor, u: Update, rslora: bool) -> LowRank:
    out, in_, batch = t.out, t.in_, ()
    if t.kind == "region":
        out, in_ = t.extent[1] - t.extent[0], t.extent[3] - t.extent[2]
    elif t.kind in ("conv1d", "conv2d"):
        in_ *= math.prod(t.extent)
    elif "stack" in t.kind:
        batch = t.extent
    a = rng.standard_normal((*batch, u.rank, in_)) * 0.1
    b = rng.standard_normal((*batch, out, u.rank)) * 0.1
    variant = "rslora" if rslora else "lora"
    return LowRank(a.astype(np.float32), b.astype(np.float32), u.alpha, None, variant)


def _held(lows: dict[str, LowRank], known: dict[str, Tensor]) -> Adapter:
    entries = {}
    for name, low in lows.items():
        t, key = known[name], name
        if t.kind == "region":
            top, bottom, left, right = t.extent
            key = f"{name}[{top}:{bottom}, {left}:{right}]"
        if t.kind == "embedding":
            low = replace(low, origin=Origin(op="embedding"))
        entries[key] = low
    return Adapter(entries)


def _filed(path: Path, lows: dict[str, LowRank], known: dict[str, Tensor]) -> Path:
    """PEFT's folder; ranks and alphas that are not the first one's come as patterns."""
    tensors: dict[str, Array] = {}
    first = next(iter(lows.values()))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, low in lows.items():
        t, module = known[name], name.removesuffix(".weight")
        lead = f"base_model.model.{module}.lora_"
        a, b = low.a, low.b
        if t.kind == "embedding":
            tensors |= {f"{lead}embedding_A": a, f"{lead}embedding_B": b}
        else:
            if t.kind != "linear":
                a = a.reshape(-1, t.in_, *t.extent)
                b = b.reshape(*b.shape, *(1 for _ in t.extent))
            tensors |= {f"{lead}A.weight": a, f"{lead}B.weight": b}
        if low.rank != first.rank:
            ranks[module] = low.rank
        if low.alpha != first.alpha:
            alphas[module] = low.alpha
    return adapter(
        path, {}, tensors=tensors, r=first.rank, lora_alpha=first.alpha, rank_pattern=ranks,
        alpha_pattern=alphas, use_rslora=first.variant == "rslora",
    )  # fmt: skip
