"""The maths against numpy's own definitions: layouts, views, scales, comparison, inputs."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.adapter.lowrank import LowRank, draw, scale_of
from lora_fx.compare import compare, rel
from lora_fx.errors import LoraFxError
from lora_fx.inputs import SIZES, Input, Inputs, default_dynamic, merge_dynamic
from lora_fx.ir.layout import Layout, layout_of
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.view import Cast, Opaque, Permute, Reshape, Slice, View, track
from lora_fx.passes.fold import fold_value
from lora_fx.targets.keys import make_key, split_key
from lora_fx.targets.plan import default_alpha
from lora_fx.targets.target import Target

E = NumpyEmitter()


@st.composite
def layouts(draw_: Any) -> Layout:
    """Any split of up to four stored axes into batch, out and in."""
    shape = tuple(draw_(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    parts = draw_(st.lists(st.sampled_from("bio"), min_size=len(shape), max_size=len(shape)))
    order = draw_(st.permutations(range(len(shape))))
    pick = {p: tuple(i for i in order if parts[i] == p) for p in "bio"}
    return Layout(shape, pick["b"], pick["o"], pick["i"], shape)


@given(layouts(), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_delta_lies_where_the_layout_says(layout: Layout, rank: int, seed: int) -> None:
    a, b = draw("k", layout, rank, seed, "probe")
    low = LowRank(a, b, 3.0, layout)
    stored = layout.to_stored(E, low.matrix())
    assert stored.shape == layout.stored
    for index in np.ndindex(layout.stored):
        pos = [tuple(index[i] for i in part) for part in (layout.batch, layout.out, layout.in_)]
        o = np.ravel_multi_index(pos[1], [layout.shape[i] for i in layout.out]) if pos[1] else 0
        i = np.ravel_multi_index(pos[2], [layout.shape[i] for i in layout.in_]) if pos[2] else 0
        want = (
            3.0
            / rank
            * sum(float(b[(*pos[0], o, r)]) * float(a[(*pos[0], r, i)]) for r in range(rank))
        )
        assert stored[index] == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert Layout.from_json(layout.to_json()) == layout


@st.composite
def views(draw_: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """A stored shape and a chain of permutes, merges, splits and slices."""
    shape = tuple(draw_(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=3)))
    current, steps = list(shape), []
    for _ in range(draw_(st.integers(0, 4))):
        what = draw_(st.sampled_from(["permute", "merge", "split", "slice"]))
        if what == "permute":
            order = draw_(st.permutations(range(len(current))))
            steps.append(Permute(tuple(order)))
            current = [current[i] for i in order]
        elif what == "merge" and len(current) > 1:
            i = draw_(st.integers(0, len(current) - 2))
            current[i : i + 2] = [current[i] * current[i + 1]]
            steps.append(Reshape(tuple(current)))
        elif what == "split":
            i = draw_(st.integers(0, len(current) - 1))
            for k in (2, 3):
                if current[i] % k == 0:
                    current[i : i + 1] = [k, current[i] // k]
                    steps.append(Reshape(tuple(current)))
                    break
        elif what == "slice":
            i = draw_(st.integers(0, len(current) - 1))
            lo = draw_(st.integers(0, current[i] - 1))
            hi = draw_(st.integers(lo + 1, current[i]))
            steps.append(Slice(i, lo, hi))
            current[i] = hi - lo
    return shape, tuple(steps)


@given(views())
@settings(max_examples=300, deadline=None)
def test_tracking_agrees_with_replaying(case: tuple[tuple[int, ...], tuple[Any, ...]]) -> None:
    """Replay on an array of flat indices: the region and the axes must name the same elements."""
    shape, steps = case
    index = np.arange(math.prod(shape)).reshape(shape)
    operand = View(steps).replay(E, index)
    try:
        found = track(shape, steps)
    except Opaque:
        return
    region = index[tuple(slice(lo, hi) for lo, hi in found.region)]
    assert sorted(region.ravel()) == sorted(operand.ravel())
    axes = tuple(range(operand.ndim))
    layout = layout_of(found, (), axes[:1], axes[1:])
    rebuilt = layout.to_stored(E, operand.reshape(layout.out_size, layout.in_size))
    np.testing.assert_array_equal(rebuilt, region)


def test_opaque_views_are_refused() -> None:
    for shape, steps in [
        ((6, 8), (Reshape((4, 12)),)),
        ((6, 8), (Reshape((48,)), Slice(0, 3, 20))),
        ((6, 8), (Reshape((3, 2, 8)), Slice(1, 1, 2))),
    ]:
        with pytest.raises(Opaque):
            track(shape, steps)
    assert track((6, 8), (Cast("float32"), Permute((1, 0)))).axes == [[1], [0]]


@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.data())
def test_keys_of_regions_come_back(shape: list[int], data: Any) -> None:
    region = []
    for n in shape:
        lo = data.draw(st.integers(0, n - 1))
        region.append((lo, data.draw(st.integers(lo + 1, n))))
    key = make_key("a.b", tuple(region), tuple(shape))
    assert split_key(key, tuple(shape)) == ("a.b", tuple(region))


def test_scales() -> None:
    assert scale_of(16, 8) == 2.0
    assert scale_of(16, 4, "rslora") == 8.0
    assert default_alpha(8) == 16.0


def test_initial_values() -> None:
    layout = Layout((50, 40), (), (0,), (1,), (50, 40))
    a, b = draw("k", layout, 8, 0)
    assert a.dtype == np.float32 and not b.any()
    assert np.abs(a).max() <= 1 / math.sqrt(40)
    assert np.abs(a).mean() == pytest.approx(0.5 / math.sqrt(40), rel=0.1)
    np.testing.assert_array_equal(a, draw("k", layout, 8, 0)[0])
    assert not np.array_equal(a, draw("k", layout, 8, 1)[0])
    assert not np.array_equal(a, draw("other", layout, 8, 0)[0])


@given(
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 8),
    st.integers(0, 99),
    st.floats(-3, 3),
)
@settings(max_examples=60, deadline=None)
def test_fold_rounds_once(dtype: str, rank: int, seed: int, alpha: float) -> None:
    """Within one unit in the last place of the fp64 sum, in the stored dtype."""
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    layout = Layout((9, 7), (), (0,), (1,), (9, 7))
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((9, 7)).astype(kind)
    low = LowRank(*draw("k", layout, rank, seed, "probe"), alpha, layout)
    from lora_fx.ir.graph import Parameter

    target = Target("k", Parameter("k", (9, 7), dtype), ((0, 9), (0, 7)), layout, "linear", ())
    value, _ = fold_value(base, [(target, low)])
    assert value.dtype == kind
    exact = base.astype(np.float64) + low.matrix(np.float64)
    if dtype == "float32":
        np.testing.assert_allclose(value, exact, rtol=3e-6, atol=3e-6)
        return
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    gap = np.abs(value.astype(np.float64) - exact)
    assert (gap <= 0.5 * eps * np.maximum(np.abs(exact), 2.0**-14) * (1 + 1e-3) + 1e-6).all()


def test_rel_fails_loudly() -> None:
    one = np.ones(3, np.float32)
    assert rel(one, one) == 0.0
    assert rel(one * 1.5, one) == 0.5
    nan, inf = np.array([1, 1, np.nan], np.float32), np.array([1, 1, np.inf], np.float32)
    assert rel(nan, one) == rel(one, nan) == rel(nan, nan) == math.inf
    assert rel(inf, one) == rel(one, inf) == math.inf
    assert rel(inf, inf) == 0.0
    assert rel(-inf, inf) == math.inf
    assert rel(np.zeros(3, np.float32), np.zeros(3, np.float32)) == math.inf
    assert rel(np.zeros(3, np.int64), np.zeros(3, np.int64)) == 0.0
    assert rel(one, np.ones(4)) == math.inf
    assert not compare({}, {"y": one}, {}, 1e-6).ok
    assert compare({"y": one}, {"y": one}, {}, 1e-6).ok
    assert compare({"y": nan}, {"y": one}, {}, 1e-6).to_json()["rel"] is None


def test_inputs() -> None:
    ids = Input("ids", "int64", (2, 5), high=7)
    mask = Input("attention_mask", "int64", (2, 5), high=2)
    x = Input("x", "float32", (2, 3, 8, 9))
    feature = Input("f", "float32", (2, 5, 4))
    inputs = Inputs((ids, mask, x, feature))
    dims = default_dynamic(inputs)
    assert dims == {
        "ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "length"},
        "x": {0: "batch"},
        "f": {0: "batch", 1: "length"},
    }
    inputs = inputs.with_dims(dims)
    for size in SIZES:
        drawn = inputs.sample(size)
        assert drawn["ids"].shape == size and drawn["ids"].max() < 7 and drawn["ids"].min() >= 0
        assert (drawn["attention_mask"] == 1).all()
        assert drawn["x"].shape == (size[0], 3, 8, 9) and drawn["x"].dtype == np.float32
    np.testing.assert_array_equal(inputs.sample(SIZES[0])["x"], inputs.sample(SIZES[0])["x"])
    more = merge_dynamic(inputs, dims, {"x": {2: "h"}}, ["f:1", "attention_mask"])
    assert more["x"] == {0: "batch", 2: "h"} and more["f"] == {0: "batch"}
    assert "attention_mask" not in more
    with pytest.raises(LoraFxError, match="no dimension 7"):
        merge_dynamic(inputs, dims, {"x": {7: "h"}})
    with pytest.raises(LoraFxError, match="no input is named 'z'"):
        merge_dynamic(inputs, dims, None, ["z"])
