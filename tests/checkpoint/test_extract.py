"""extract: against numpy's full SVD of the difference, and base + b @ a against tuned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_fx
from lora_fx.adapter.svd import above_noise, leading
from lora_fx.checkpoint.extract import extraction
from lora_fx.checkpoint.extract_options import ExtractOptions
from lora_fx.errors import NoEffectError
from lora_fx.inputs import generator

Arrays = dict[str, np.ndarray[Any, Any]]


def spectrum(rng: np.random.Generator, m: int, n: int, noise: float = 0.3) -> Any:
    """Singular values 1/k, and white noise of `noise` times their norm."""
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in (m, n))
    signal = (u / np.arange(1, k + 1)) @ v.T
    white = rng.standard_normal((m, n))
    return signal + white * (noise * np.linalg.norm(signal) / np.linalg.norm(white))


def optimum(delta: Any, rank: int) -> float:
    """The least ‖Δ − X‖/‖Δ‖ over X of a rank (Eckart and Young), by LAPACK's full SVD."""
    s = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False)
    return float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))


def two(folder: Path, base: Arrays, change: Arrays) -> tuple[str, str]:
    """Files of base and of base + change, in the dtypes of base."""
    tuned = {
        k: np.asarray(v.astype(np.float64) + change[k]).astype(v.dtype) if k in change else v
        for k, v in base.items()
    }
    for name, arrays in (("base", base), ("tuned", tuned)):
        save_file(arrays, folder / f"{name}.safetensors")
    return str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


def left(base: str, tuned: str, adapter: lora_fx.Adapter) -> dict[str, float]:
    """‖tuned − base − ΔW‖/‖tuned − base‖ by key, in fp64, from the files."""
    from safetensors.numpy import load_file

    old, new = load_file(base), load_file(tuned)
    result = {}
    for key, delta in adapter.deltas().items():
        wanted = new[key].astype(np.float64) - old[key].astype(np.float64)
        assert delta.shape == wanted.shape
        result[key] = float(np.linalg.norm(wanted - delta) / np.linalg.norm(wanted))
    return result


@pytest.mark.parametrize(("m", "n"), [(700, 900), (900, 640), (513, 2000)])
def test_sampled_svd_is_near_the_optimum(m: int, n: int) -> None:
    delta = spectrum(np.random.default_rng(m), m, n).astype(np.float32)
    for k in (8, 16):
        u, s, vt = leading(delta, k, generator("k", 0))
        error = np.linalg.norm(delta - (u * s) @ vt) / np.linalg.norm(delta)
        best = optimum(delta, k)
        assert best * (1 - 1e-6) <= error <= best * 1.001
        np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-5)
        again = leading(delta, k, generator("k", 0))[0]
        np.testing.assert_array_equal(u, again)


@pytest.mark.parametrize(("m", "n"), [(48, 300), (300, 48), (20, 20), (5, 2)])
def test_small_matrices_are_exact(m: int, n: int) -> None:
    delta = spectrum(np.random.default_rng(m), m, n).astype(np.float32)
    for k in (1, 4, 64):
        u, s, vt = leading(delta, k, generator("k", 0))
        assert s.shape == (min(k, m, n),)
        np.testing.assert_allclose(s, np.linalg.svd(delta.astype(float))[1][:k], rtol=1e-9)
        error = np.linalg.norm(delta - (u * s) @ vt) / np.linalg.norm(delta)
        assert abs(error - optimum(delta, k)) < 1e-7


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_layout_comes_back(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    shapes = {
        "fc.weight": (600, 520),
        "up.weight": (24, 56),
        "conv.weight": (8, 6, 3, 2),
        "mlp.experts.down_proj": (3, 20, 28),
        "model.embed_tokens.weight": (1100, 12),
        "same.weight": (4, 6),
    }
    base: Arrays = {k: rng.standard_normal(s).astype(kind) for k, s in shapes.items()}
    change: Arrays = {}
    for key, shape in shapes.items():
        if key != "same.weight":
            batch, rest = (shape[0], shape[1:]) if "experts" in key else (1, shape)
            parts = [spectrum(rng, rest[0], int(np.prod(rest[1:]))) for _ in range(batch)]
            change[key] = np.stack(parts).reshape(shape)
    files = two(tmp_path, base, change)
    result = extraction(*files, ExtractOptions(rank=6))
    measured = left(*files, result.adapter)
    assert set(measured) == set(change) and result.unchanged == ("same.weight",)
    for row in result.rows:
        assert row.rank == 6
        assert abs(row.relative - measured[row.key]) < 1e-6
        assert 0.02 < row.relative < 0.9
        assert row.stable_rank >= 1.0
    from safetensors.numpy import load_file

    old, new = load_file(files[0]), load_file(files[1])
    delta = new["fc.weight"].astype(np.float64) - old["fc.weight"]
    assert measured["fc.weight"] < optimum(delta, 6) * 1.01
    lookup = result.adapter.lowrank["model.embed_tokens.weight"]
    assert lookup.origin.op == "embedding" and lookup.a.shape == (6, 1100)
    stack = result.adapter.lowrank["mlp.experts.down_proj"]
    assert stack.a.shape == (3, 6, 28) and stack.b.shape == (3, 20, 6)


def test_a_merged_adapter_is_recovered(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base: Arrays = {"fc.weight": rng.standard_normal((640, 530))}
    change = {"fc.weight": rng.standard_normal((640, 4)) @ rng.standard_normal((4, 530))}
    files = two(tmp_path, base, change)
    result = extraction(*files, ExtractOptions(rank=4))
    assert result.relative < 2e-7 and left(*files, result.adapter)["fc.weight"] < 2e-7
    result = extraction(*files, ExtractOptions(energy=0.999))
    assert result.rows[0].rank == 4 and result.rows[0].enough


def test_dtypes_may_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal((30, 20)).astype(ml_dtypes.bfloat16)
    tuned = base.astype(np.float32) + rng.standard_normal((30, 20)).astype(np.float32)
    same = rng.standard_normal((30, 20)).astype(ml_dtypes.bfloat16)
    save_file({"w.weight": base, "s.weight": same}, tmp_path / "a.safetensors")
    save_file({"w.weight": tuned, "s.weight": same.astype(float)}, tmp_path / "b.safetensors")
    result = extraction(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", ExtractOptions(rank=20)
    )
    assert result.unchanged == ("s.weight",) and result.rows[0].relative < 1e-6
    got = result.adapter.deltas()["w.weight"]
    np.testing.assert_allclose(got, tuned.astype(float) - base.astype(float), atol=1e-5)


def test_energy_chooses_the_rank(tmp_path: Path) -> None:
    """The least rank that holds the share, found by doubling the subspace."""
    rng = np.random.default_rng(3)
    base: Arrays = {
        "big.weight": np.zeros((700, 600), np.float32),
        "small.weight": np.zeros((60, 90), np.float32),
        "mlp.experts.up_proj": np.zeros((2, 50, 40), np.float32),
    }
    two_d = {k: v.shape for k, v in base.items() if v.ndim == 2}
    change: Arrays = {k: spectrum(rng, m, n, noise=0.1) for k, (m, n) in two_d.items()}
    change["mlp.experts.up_proj"] = np.stack([spectrum(rng, 50, 40, noise=0.1) for _ in range(2)])
    files = two(tmp_path, base, change)
    result = extraction(*files, ExtractOptions(energy=0.97))
    for row in result.rows:
        delta = change[row.key].astype(np.float32).astype(np.float64)
        s = np.linalg.svd(delta, compute_uv=False).reshape(-1, min(row.shape[-2:])) ** 2
        kept = np.cumsum(s.sum(0)) / s.sum()
        least = int(np.argmax(kept >= 0.97)) + 1
        assert least <= row.rank <= least + (1 if row.key == "big.weight" else 0), row.key
        assert 1 - row.relative**2 >= 0.97 - 1e-6 and row.enough and row.change is None
    assert max(r.rank for r in result.rows) > 16
    capped = extraction(*files, ExtractOptions(energy=0.97, max_rank=5))
    assert {r.rank for r in capped.rows} == {5}
    assert len([n for n in capped.adapter.metadata["notes"] if "rank 5 is the maximum" in n]) == 3


def test_vectors(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    base: Arrays = {
        "fc.weight": rng.standard_normal((6, 5)).astype(np.float16),
        "norm.weight": rng.standard_normal(6).astype(np.float16),
        "token": rng.standard_normal((1, 1, 6)).astype(np.float16),
        "mlp.experts.up_bias": rng.standard_normal((3, 6)).astype(np.float16),
        "kept.bias": rng.standard_normal(6).astype(np.float16),
        "scale": np.array(2.0, np.float16),
    }
    change = {k: np.ones(v.shape) for k, v in base.items() if k != "kept.bias"}
    files = two(tmp_path, base, change)
    result = extraction(*files, ExtractOptions())
    names = {"norm.weight", "token", "mlp.experts.up_bias", "scale"}
    assert set(result.left_out) == names and set(result.adapter.entries) == {"fc.weight"}
    assert all(n in result.adapter.metadata["notes"][-1] for n in names)
    full = lora_fx.extract(*files, also_full=True).full
    assert set(full) == names
    for name in names:
        wanted = (base[name].astype(float) + 1).astype(np.float16)
        np.testing.assert_array_equal(full[name].value, wanted)
        assert full[name].value.shape == base[name].shape
    files = two(tmp_path, base, {"norm.weight": np.ones(6)})
    with pytest.raises(NoEffectError, match="no weight differs") as caught:
        extraction(*files, ExtractOptions())
    assert "norm.weight" in caught.value.hint
    with pytest.raises(NoEffectError, match="no weight differs"):
        extraction(files[0], files[0], ExtractOptions())


@pytest.mark.parametrize("seed", range(8))
def test_above_noise(seed: int) -> None:
    """White noise has nothing above its edge; a planted signal is counted."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal((400, 300))
    s = np.linalg.svd(white, compute_uv=False)
    assert above_noise(s[:40], float((s**2).sum()), (400, 300)) == 0
    planted = white + 2 * rng.standard_normal((400, 3)) @ rng.standard_normal((3, 300)) / 3
    s = np.linalg.svd(planted, compute_uv=False)
    assert above_noise(s[:40], float((s**2).sum()), (400, 300)) == 3


MEASURE = """
import sys
from lora_fx.checkpoint.extract import ExtractOptions, extraction
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
extraction(sys.argv[1], sys.argv[2], ExtractOptions(rank=8))
print(peak() - before)
"""


def grown(folder: Path, base: Arrays) -> float:
    """By how much an extraction raises the peak of memory, in matrices of 1200 × 880 in fp32."""
    rng = np.random.default_rng(6)
    change: Arrays = {
        k: np.asarray(rng.standard_normal(v.shape, np.float32)) for k, v in base.items()
    }
    files = two(folder, base, change)
    run = [sys.executable, "-c", MEASURE, *files]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return int(done.stdout) / (1200 * 880 * 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")
def test_peak_memory_is_that_of_one_matrix(tmp_path: Path) -> None:
    """6 or 16 tensors of 4 MB, or one stack of 16: the same peak, a few matrices high."""
    one = np.ones((1200, 880), np.float32)
    few = grown(tmp_path, {f"l.{i}.weight": one for i in range(6)})
    many = grown(tmp_path, {f"l.{i}.weight": one for i in range(16)})
    stack = grown(tmp_path, {"experts.up": np.stack([one] * 16)})
    assert many < 7 and many - few < 2 and stack - few < 4, (few, many, stack)


def test_needs_no_torch() -> None:
    code = (
        "import sys, lora_fx.checkpoint.extract, lora_fx.adapter.truncate, lora_fx.formats.io\n"
        "print({'torch', 'onnx'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_head_that_was_trained_whole(tmp_path: Path) -> None:
    """Of full rank: rank 4 keeps little of it, which is said; --whole takes it as it is."""
    rng = np.random.default_rng(9)
    base = {
        "layers.0.q.weight": rng.standard_normal((40, 30)).astype(np.float32),
        "score.weight": rng.standard_normal((36, 30)).astype(np.float32),
    }
    low = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30))
    change = {"layers.0.q.weight": low, "score.weight": rng.standard_normal((36, 30))}
    files = two(tmp_path, base, change)
    kept = 1 - optimum(change["score.weight"], 4) ** 2
    assert kept < 0.5
    (note,) = lora_fx.extract(*files, rank=4).metadata["notes"]
    assert note.startswith(f"score.weight: rank 4 keeps only {kept:.0%} of ‖Δ‖²")
    assert "--whole score.weight" in note
    made = lora_fx.extract(*files, rank=4, whole=["score.weight"])
    assert made.metadata["notes"] == [] and list(made.lowrank) == ["layers.0.q.weight"]
    tuned = base["score.weight"].astype(np.float64) + change["score.weight"]
    np.testing.assert_array_equal(made.full["score.weight"].value, tuned.astype(np.float32))
    with pytest.raises(lora_fx.LoraFxError, match="whole 'nope' matches no"):
        lora_fx.extract(*files, whole="nope")
