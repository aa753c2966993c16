"""merge against W + Σ w·s·BA in fp64, over dtypes, layouts, scales, regions, forms of files."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from lora_fx import merge
from lora_fx.dtypes import numpy_dtype
from lora_fx.errors import NoEffectError
from tests.checkpoint.made import Array, read
from tests.checkpoint.merge_cases import Case, build, cases

NOT_NEAREST = {"bfloat16": 5e-5, "float16": 3e-4}
"""Share of elements that may miss the nearest value: fp32 has 2¹⁶ values between two of bf16 and
2¹³ between two of fp16, where the fp32 sum's own rounding to a tie misses 2⁻¹⁴ of them already."""


def spacing(x: Array, dtype: str) -> Array:
    """The distance of neighbours of `dtype` around x, one ulp."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, int(info.minexp)) - int(info.nmant))


def nearest(new: Array, exact: Array) -> Array:
    """True where no neighbour of `new` in its dtype is nearer to `exact`."""
    gap = np.abs(new.astype(np.float64) - exact)
    high, low = (new.dtype.type(s) for s in (np.inf, -np.inf))
    up = np.nextafter(new, high).astype(np.float64)
    down = np.nextafter(new, low).astype(np.float64)
    return (gap <= np.abs(up - exact)) & (gap <= np.abs(down - exact))


def check(case: Case, folder: Path, counts: Counter[str]) -> None:
    """Merge, and compare every tensor with its exact value."""
    base, adapters, exact = build(case, folder)
    before = read(base)
    out = folder / ("out.safetensors" if case.form == "file" else "out")
    try:
        merge(base, adapters, out, dtype=case.dtype, threads=1, again=True)
    except NoEffectError:
        assert not out.exists()
        for name, want in exact.items():
            old = before[name].astype(np.float64)
            still = np.abs(want - old) <= 0.51 * spacing(want, before[name].dtype.name)
            assert still.all(), f"{name} should have changed"
        counts["no effect"] += 1
        return
    after = read(out)
    assert set(after) == set(before)
    for name, old in before.items():
        new = after[name]
        assert new.shape == old.shape
        if name not in exact:
            assert new.dtype == old.dtype and new.tobytes() == old.tobytes(), name
            continue
        want, dtype = exact[name], case.dtype or old.dtype.name
        assert new.dtype == numpy_dtype(dtype)
        gap = np.abs(new.astype(np.float64) - want)
        # One ulp, of the result or, where W and ΔW cancel, of what fp32 leaves of them.
        fp64 = "float64" in (old.dtype.name, dtype)
        size = np.abs(old.astype(np.float64)) + np.abs(want - old.astype(np.float64)) + 0.01
        allowed = np.maximum(spacing(want, dtype), 32 * (2.0**-52 if fp64 else 2.0**-23) * size)
        assert (gap <= allowed).all(), f"{name}: {np.max(gap / allowed):.3g} times what is allowed"
        counts[dtype] += new.size
        counts[f"{dtype} not nearest"] += int(np.count_nonzero(~nearest(new, want)))
        counts[f"{dtype} beyond 1 ulp"] += int(np.count_nonzero(gap > spacing(want, dtype)))


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_every_case_is_the_exact_sum_rounded_once(examples: int) -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(case, Path(folder), counts)

    run()
    print(dict(counts))
    for dtype, share in NOT_NEAREST.items():
        assert counts[dtype] > 200 * examples
        assert counts[f"{dtype} not nearest"] <= share * counts[dtype]
        assert counts[f"{dtype} beyond 1 ulp"] <= 1e-5 * counts[dtype]
