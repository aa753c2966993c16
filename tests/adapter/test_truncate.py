"""truncate: errors against explicit ΔW, ranks against numpy's SVD, goals for any adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.svd import distance, product_svd, truncated
from lora_fx.adapter.truncate import Truncation, truncation
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout, plain_layout


def update(
    rng: np.random.Generator, rank: int, out: int, in_: int, *batch: int, fall: float = 0.6
) -> LowRank:
    """Components that fall by a factor each, hidden by a random change of basis."""
    scale = fall ** np.arange(rank)
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * np.linspace(0.5, 2, rank)
    b = rng.standard_normal((*batch, out, rank)) * scale @ turn
    a = np.linalg.solve(turn, rng.standard_normal((*batch, rank, in_)))
    shape = (*batch, out, in_)
    n = len(batch)
    layout = Layout(shape, tuple(range(n)), (n,), (n + 1,), shape)
    return LowRank(a.astype(np.float32), b.astype(np.float32), 1.5 * rank, layout)


def explicit(before: Adapter, after: Adapter) -> float:
    """‖ΔW − ΔW'‖ over all updates, of the products themselves."""
    gone = after.deltas()
    return math.hypot(
        *(float(np.linalg.norm(d - gone.get(k, 0.0))) for k, d in before.deltas().items())
    )


def norm(adapter: Adapter) -> float:
    return math.hypot(*(float(np.linalg.norm(d)) for d in adapter.deltas().values()))


def check(before: Adapter, result: Truncation) -> None:
    """What holds whatever the goal: the printed error, the report, the conventions."""
    whole = norm(before)
    sizes = (u.scale * np.linalg.norm(u.a) * np.linalg.norm(u.b) for u in before.lowrank.values())
    rounding = 1e-14 * math.hypot(*map(float, sizes))  # of explicit products in fp64
    assert abs(result.error - explicit(before, result.adapter)) <= rounding
    assert abs(result.norm - whole) <= 1e-12 * whole
    assert abs(result.relative - result.error / whole) <= 1e-12
    after = result.adapter.lowrank
    assert set(result.removed) == set(before.lowrank) - set(after)
    assert result.parameters == sum(u.a.size + u.b.size for u in after.values())
    for row in result.rows:
        old, new = before.lowrank[row.key], after.get(row.key)
        assert row.before == old.rank and row.after == (new.rank if new else 0)
        if new is not None:
            assert new.variant == "lora" and (new.layout, new.use) == (old.layout, old.use)
            assert new.a.dtype == new.b.dtype == np.float32
        if new is not None and new.rank < old.rank:
            assert new.scale == 1.0
            s = np.linalg.svd(old.matrix(), compute_uv=False)
            lost = float(np.linalg.norm(s[..., new.rank :]))
            assert row.error == pytest.approx(lost, rel=1e-5, abs=1e-6 * row.norm)


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


@st.composite
def adapters(draw: Any) -> Adapter:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    entries: dict[str, Entry] = {}
    for i, (rank, out, in_) in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=4))):
        batch = draw(st.sampled_from([(), (), (3,), (2, 2)]))
        low = update(rng, rank, out, in_, *batch, fall=draw(st.floats(0.2, 1.0)))
        size = np.float32(draw(st.sampled_from([1.0, 1e-6, 0.0, 30.0])))
        variant = draw(st.sampled_from(["lora", "rslora"]))
        entries[f"l.{i}.weight"] = replace(low, b=low.b * size, variant=variant)
    entries["norm.weight"] = Full(np.ones(3, np.float32))
    adapter = Adapter(entries, {"dropout": 0.1})
    assume(norm(adapter) > 0)
    return adapter


@given(adapters(), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_rank(adapter: Adapter, rank: int) -> None:
    result = truncation(adapter, rank=rank)
    check(adapter, result)
    assert all(r.after <= rank for r in result.rows)
    for row in result.rows:
        s = np.linalg.svd(adapter.lowrank[row.key].matrix(), compute_uv=False)
        real = int((s > 1e-12 * s.max()).sum(-1).max()) if s.max() else 0
        assert row.after == min(rank, real)
    assert result.adapter.full == adapter.full and result.adapter.metadata == adapter.metadata


@given(adapters(), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_params(adapter: Adapter, params: int) -> None:
    cost = {k: (u.a.size + u.b.size) // u.rank for k, u in adapter.lowrank.items()}
    try:
        result = truncation(adapter, params=params)
    except LoraFxError as e:
        assert "is too small to keep any rank" in e.message
        some = [k for k, d in adapter.deltas().items() if d.any()]
        assert params < min(cost[k] for k in some)
        return
    check(adapter, result)
    assert result.parameters <= params
    left = params - result.parameters
    for row in result.rows:  # nothing that fits was left out, but numerically zero ranks
        s = np.linalg.svd(adapter.lowrank[row.key].matrix(), compute_uv=False)
        rest = s[..., row.after] if row.after < s.shape[-1] else np.zeros(1)
        assert cost[row.key] > left or rest.max() <= 1e-12 * s.max()


@given(adapters(), st.sampled_from([0.3, 0.9, 0.99, 0.999999, 1.0]))
@settings(max_examples=40, deadline=None)
def test_energy(adapter: Adapter, energy: float) -> None:
    result = truncation(adapter, energy=energy)
    check(adapter, result)
    assert result.energy >= energy - 1e-11
    _minimal(adapter, result, math.sqrt(1 - energy) * norm(adapter))


@given(adapters(), st.sampled_from([0.5, 0.1, 1e-3, 1e-7, 1e-9, 0.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_max_error(adapter: Adapter, bound: float, absolute: bool) -> None:
    """The error that is measured, with all rounding, is within the bound."""
    whole = norm(adapter)
    if absolute:
        result = truncation(adapter, max_abs_error=bound * whole)
    else:
        result = truncation(adapter, max_error=bound)
    check(adapter, result)
    assert result.error <= bound * whole * (1 + 1e-12)
    if bound >= 1e-3:
        _minimal(adapter, result, bound * whole)


def _minimal(adapter: Adapter, result: Truncation, bound: float) -> None:
    """One rank less of any update would be too much."""
    for key, low in result.adapter.lowrank.items():
        s = np.linalg.svd(adapter.lowrank[key].matrix(), compute_uv=False)
        last = float(np.linalg.norm(s[..., low.rank - 1])) if low.rank <= s.shape[-1] else 0.0
        if last > 1e-6 * norm(adapter):
            assert math.hypot(result.error, last) > bound * (1 - 1e-4)


def test_order_is_by_gain_for_cost() -> None:
    """Equal spectra: a cheap target keeps more ranks; a rank that does not fit is passed over."""
    rng = np.random.default_rng(0)

    def known(out: int, in_: int, *batch: int) -> LowRank:
        u = np.linalg.qr(rng.standard_normal((*batch, out, 4)))[0]
        v = np.linalg.qr(rng.standard_normal((*batch, in_, 4)))[0]
        b = u * np.array([8.0, 4, 2, 1])
        return LowRank(np.swapaxes(v, -1, -2).astype(np.float32), b.astype(np.float32), 4.0)

    adapter = Adapter({"dear": known(40, 60), "cheap": known(8, 12), "stack": known(6, 4, 5)})
    result = truncation(adapter, params=100 * 2 + 20 * 4 + 50 * 3)
    assert {r.key: r.after for r in result.rows} == {"dear": 2, "cheap": 4, "stack": 3}
    assert result.error == pytest.approx(math.sqrt(4 + 1 + 5 * 1), rel=1e-6)
    assert result.energy == pytest.approx(1 - 10 / (85 * 7), rel=1e-6)
    result = truncation(adapter, params=100 * 2 + 20 * 3 + 50 * 4)  # a step of the order
    assert {r.key: r.after for r in result.rows} == {"dear": 2, "cheap": 3, "stack": 4}
    kept = truncation(adapter, energy=result.energy - 1e-7)
    assert [r.after for r in kept.rows] == [r.after for r in result.rows]


def test_an_update_that_keeps_its_rank_is_kept_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    first, second = update(rng, 2, 6, 7), replace(update(rng, 5, 8, 9), variant="rslora")
    adapter = Adapter({"a.weight": first, "b.weight": second})
    result = lora_fx.truncate(adapter, rank=3).lowrank
    assert result["a.weight"] is first and result["b.weight"].scale == 1.0
    result = lora_fx.truncate(adapter, rank=5).lowrank
    assert result["b.weight"].a is second.a and result["b.weight"].variant == "lora"
    assert result["b.weight"].scale == pytest.approx(second.scale, rel=1e-15)


def test_what_is_saved_is_what_was_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    conv = replace(
        update(rng, 4, 8, 18), layout=plain_layout((8, 2, 3, 3)), origin=Origin(op="conv2d")
    )
    adapter = Adapter({"fc.weight": update(rng, 6, 10, 7), "c.weight": conv})
    result = truncation(adapter, max_error=0.2)
    assert result.rows[0].after < 6
    lora_fx.save_adapter(result.adapter, tmp_path / "x")
    again = lora_fx.load_adapter(tmp_path / "x")
    assert abs(explicit(adapter, again) - result.error) <= 1e-13 * result.norm
    assert {k: u.scale for k, u in again.lowrank.items()} == {
        k: u.scale for k, u in result.adapter.lowrank.items()
    }


def test_refusals() -> None:
    rng = np.random.default_rng(2)
    low = update(rng, 2, 6, 7)
    ones = np.ones((2, 3), np.float32)
    odd: dict[str, Entry] = {
        "DoRA": replace(low, magnitude=np.ones(6, np.float32)),
        "LoHa": Hadamard(ones, ones.T, ones, ones.T, 2.0),
        "LoKr": Kronecker(ones, ones, 1.0),
        "a whole ΔW": Dense(ones),
        "trained rows": ReplacedRows((1,), ones),
    }
    for name, entry in odd.items():
        with pytest.raises(LoraFxError, match=f"'x.weight' is {name}"):
            truncation(Adapter({"x.weight": entry, "a.weight": low}), rank=1)
    good = Adapter({"a.weight": low})
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "no goal is given"),
        ({"rank": 1, "params": 3}, "rank and params are given together"),
        ({"rank": 0}, "positive whole number"),
        ({"params": 2.5}, "positive whole number"),
        ({"energy": 0.0}, "not in"),
        ({"energy": 1.1}, "not in"),
        ({"max_error": -1.0}, "number of 0 or more"),
        ({"max_error": math.nan}, "number of 0 or more"),
        ({"params": 12}, "one rank of 'a.weight' has 13 elements"),
        ({"max_error": 1.0}, "max_error 1 allows every rank to go"),
    ]
    for goal, text in bad:
        with pytest.raises(LoraFxError, match=text):
            truncation(good, **goal)
    for adapter, text in (
        (Adapter({"a.weight": replace(low, b=low.b * np.float32("nan"))}), "'a.weight' has NaN"),
        (Adapter({"a.weight": replace(low, b=low.b * 0)}), "every ΔW"),
        (Adapter({"n.weight": Full(ones)}), "no low-rank update"),
    ):
        with pytest.raises(LoraFxError, match=text):
            truncation(adapter, rank=1)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("rank", "out", "in_"), [(4, 9, 6), (8, 5, 7), (3, 2, 9)])
def test_the_svd_of_a_product(rank: int, out: int, in_: int, batch: tuple[int, ...]) -> None:
    low = update(np.random.default_rng(3), rank, out, in_, *batch)
    product = np.matmul(low.b.astype(float), low.a.astype(float))
    u, s, vt = product_svd(low.a, low.b)
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, product, atol=1e-12 * s.max())
    want = np.linalg.svd(product, compute_uv=False)[..., : s.shape[-1]]
    np.testing.assert_allclose(s[..., : want.shape[-1]], want, atol=1e-12 * s.max())
    a, b = truncated(low.a, low.b, 2)
    gap = float(np.linalg.norm(product - np.matmul(b.astype(float), a.astype(float))))
    assert distance(low.a, low.b, a, b) == pytest.approx(gap, rel=1e-9, abs=1e-12)
