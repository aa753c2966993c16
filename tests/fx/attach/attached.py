"""What the tests of attach share: random adapters, the explicit fp64 oracle, snapshots."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.compare import rel
from lora_fx.targets.keys import base_name, split_key


def randomise(model: nn.Module, seed: int = 0) -> lora_fx.Adapter:
    """Give every B of an adapted model values that matter; returns its adapter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in f".{name}":
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1])
    adapter: lora_fx.Adapter = model.adapter()
    return adapter


def leaves(out: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def gap(got: Any, want: Any) -> float:
    """The largest rel over the outputs."""
    pairs = list(zip(leaves(got), leaves(want), strict=True))
    assert pairs
    return max(rel(a.detach().double().numpy(), b.detach().double().numpy()) for a, b in pairs)


def wide(x: Any) -> Any:
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.double() if floating else x


def explicit(
    model: nn.Module, adapter: lora_fx.Adapter, args: Any, kwargs: Any | None = None
) -> Any:
    """The output of a plain fp64 copy whose parameters hold W + s·b·a."""
    plain = copy.deepcopy(model).double().eval()
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")  # the grouped product has no fp64
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for key, change in adapter.deltas().items():
            if key.endswith("~"):  # the table's models add an explicit change themselves
                plain.change = torch.from_numpy(change)
                continue
            w = weights[base_name(key)]
            _, region = split_key(key, tuple(w.shape))
            w[tuple(slice(lo, hi) for lo, hi in region)] += torch.from_numpy(change)
        return plain(*pytree.tree_map(wide, args), **pytree.tree_map(wide, kwargs or {}))


def effect(model: nn.Module, args: Any, kwargs: Any | None = None) -> Callable[[Any], float]:
    """out → how much an adapted output differs from the base model's."""
    with torch.no_grad():
        base = copy.deepcopy(model).eval()(*args, **(kwargs or {}))
    return lambda out: gap(out, base)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that detach has to give back, module by module."""
    rows: list[Any] = []
    for name, m in model.named_modules(remove_duplicate=False):
        rows.append((name, type(m), id(m), sorted(m.__dict__), list(m._modules)))
        rows.append([(k, len(v)) for k, v in m.__dict__.items() if k.endswith("_hooks")])
        rows.append([(k, id(p), p is None or p.requires_grad) for k, p in m._parameters.items()])
        if isinstance(m, nn.RNNBase):
            rows.append([id(w) for w in m._flat_weights])
            rows.append([id(r() if r else None) for r in m._flat_weight_refs])
        rows.append(m.__dict__["training"])
    return rows


def state(model: nn.Module) -> dict[str, Any]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def train(
    model: nn.Module, args: Any, kwargs: Any | None = None, steps: int = 5, lr: float = 0.05
) -> list[float]:
    """Plain SGD on the mean square of the outputs; returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    losses = []
    for _ in range(steps):
        out = leaves(model(*args, **(kwargs or {})))
        loss = sum((t.float() - 0.3).square().mean() for t in out if t.is_floating_point())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapter_gap(a: lora_fx.Adapter, b: lora_fx.Adapter) -> float:
    """The largest absolute difference of any tensor of two adapters with the same keys."""
    assert list(a.entries) == list(b.entries)
    worst = 0.0
    for key, low in a.lowrank.items():
        other = b.lowrank[key]
        assert replace(low, a=other.a, b=other.b) == other
        for x, y in ((low.a, other.a), (low.b, other.b)):
            worst = max(worst, float(np.abs(x - y).max()))
    for key, full in a.full.items():
        worst = max(worst, float(np.abs(full.value - b.full[key].value).max()))
    return worst
