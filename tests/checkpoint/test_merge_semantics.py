"""What merge means: ties, new heads, dtypes, links, weights, reports, exit codes, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_fx import merge
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.checkpoint.merge import read_adapters
from lora_fx.cli import main
from lora_fx.errors import NoEffectError
from tests.checkpoint.made import Array, adapter, checkpoint, factors, header, read, tree

ROOT = Path(__file__).resolve().parents[2]
BF16 = np.dtype(ml_dtypes.bfloat16)
Q, DOWN = "layers.0.q_proj", "layers.0.down_proj"


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def weights(dtype: Any = np.float32) -> dict[str, Array]:
    r = rng()
    sides = {Q: (24, 16), DOWN: (16, 40), "layers.0.still": (5, 3)}
    return {f"{n}.weight": (0.1 * r.standard_normal(s)).astype(dtype) for n, s in sides.items()}


def pairs(rank: int = 4, size: float = 0.3) -> dict[str, tuple[Array, Array]]:
    return {Q: factors(rng(), 24, 16, rank, size), DOWN: factors(rng(), 16, 40, rank, size)}


def cli(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "base", weights(BF16), 3, config={"dtype": "bfloat16"})
    adapter(tmp_path / "adapter", pairs(), lora_alpha=6)
    return tmp_path


def exact(name: str, scale: float) -> Array:
    a, b = pairs()[name]
    old = weights(BF16)[f"{name}.weight"].astype(np.float64)
    return old + scale * (b.astype(np.float64) @ a.astype(np.float64))


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, -1.0, 3.0])
def test_a_weight_after_a_colon(weight: float, scene: Path) -> None:
    assert cli("merge", scene / "base", f"{scene / 'adapter'}:{weight}", "-o", scene / "out") == 0
    out = read(scene / "out")
    for name in (Q, DOWN):
        want = exact(name, 1.5 * weight)
        gap = np.abs(out[f"{name}.weight"].astype(np.float64) - want)
        assert (gap <= 2.0**-8 * np.abs(want) + 1e-7).all()


def test_dry_run_prints_scales_and_writes_nothing(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(scene)
    args = ("merge", scene / "base", f"{scene / 'adapter'}:0.5", "-o", scene / "out", "--dry-run")
    assert cli(*args) == 0
    text = capsys.readouterr().out
    assert text.count("lora rank 4 scale 0.75") == 2
    assert "2 of 3 tensors change" in text and "disk needed" in text
    assert cli(*args, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [t["key"] for t in said["tensors"]] == [f"{Q}.weight", f"{DOWN}.weight"]
    touched = 2 * (24 * 16 + 16 * 40)
    assert (said["touched_bytes"], said["command"], said["ok"]) == (touched, "merge", True)
    assert tree(scene) == before


def test_dtype_is_of_touched_tensors_and_the_index_adds_up(scene: Path) -> None:
    report = merge(scene / "base", scene / "adapter", scene / "out", dtype="float32")
    out, old = read(scene / "out"), read(scene / "base")
    assert out[f"{Q}.weight"].dtype == np.float32
    assert out["layers.0.still.weight"].tobytes() == old["layers.0.still.weight"].tobytes()
    assert np.abs(out[f"{Q}.weight"] - exact(Q, 1.5)).max() < 1e-6
    index = json.loads((scene / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())
    assert any("config.json still has dtype bfloat16" in w for w in report.warnings)


def test_link_shares_only_what_is_untouched(scene: Path) -> None:
    before = tree(scene / "base")
    merge(scene / "base", scene / "adapter", scene / "out", link=True)
    shared = {
        name
        for name in os.listdir(scene / "base")
        if os.path.samefile(scene / "base" / name, scene / "out" / name)
    }
    assert shared == {"model-00003-of-00003.safetensors"}
    assert tree(scene / "base") == before


def test_a_new_head_is_added(scene: Path) -> None:
    head = rng().standard_normal((3, 16)).astype(np.float32)
    adapter(scene / "new", pairs(), whole={"score.weight": head}, modules_to_save=["score"])
    assert cli("merge", scene / "base", scene / "new", "-o", scene / "no") == 2
    assert cli("merge", scene / "base", scene / "new", "-o", scene / "out", "--add") == 0
    out = read(scene / "out")
    assert np.array_equal(out["score.weight"], head.astype(BF16))
    index = json.loads((scene / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())


def test_a_module_saved_whole_replaces_the_base(scene: Path) -> None:
    still = rng().standard_normal((5, 3)).astype(np.float32)
    name = "layers.0.still"
    adapter(scene / "w", pairs(), whole={f"{name}.weight": still}, modules_to_save=[name])
    report = merge(scene / "base", scene / "w", scene / "out")
    assert np.array_equal(read(scene / "out")[f"{name}.weight"], still.astype(BF16))
    [row] = [t for t in report.details["tensors"] if t["key"] == f"{name}.weight"]
    assert row["updates"] == ["replaced whole"] and row["gain"] is None


def test_metadata_that_transformers_needs(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", pairs())
    for metadata, want in ((None, {"format": "pt"}), ({"a": "b"}, {"a": "b"})):
        base = tmp_path / f"{metadata is None}.safetensors"
        checkpoint(base, weights(), metadata=metadata)
        merge(base, tmp_path / "adapter", tmp_path / f"out-{base.name}")
        found = header(tmp_path / f"out-{base.name}")["__metadata__"]
        found.pop("lora_fx.merge")
        assert found == want


# --- what is said --------------------------------------------------------------------------------


def test_the_report(scene: Path) -> None:
    report = merge(scene / "base", scene / "adapter", scene / "out")
    said = json.loads((scene / "out" / "report.json").read_text())
    assert said == {"ok": True, "warnings": list(report.warnings), **report.details}
    old, new = read(scene / "base"), read(scene / "out")
    assert [t["key"] for t in said["tensors"]] == [f"{Q}.weight", f"{DOWN}.weight"]
    for row in said["tensors"]:
        w, m = (x[row["key"]].astype(np.float64) for x in (old, new))
        delta = exact(row["key"].removesuffix(".weight"), 1.5) - w
        assert row["ratio"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w), rel=1e-4)
        assert row["gain"] == pytest.approx(np.sum((m - w) * delta) / np.sum(delta**2), rel=1e-4)
        assert row["lost"] == pytest.approx(np.mean(m == w))
        assert row["dtype"] == "bfloat16" and row["updates"] == ["lora rank 4 scale 1.5"]
    assert any("base is not verified" in w for w in said["warnings"])


def test_a_weak_adapter_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "base", weights(BF16))
    adapter(tmp_path / "adapter", pairs(size=1e-4))
    assert cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 0
    [line] = [s for s in capsys.readouterr().err.splitlines() if "kept less than 95%" in s]
    assert "2 of 2 tensors" in line and "--dtype" in line
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    assert not any("kept less" in w for w in report.warnings)
    assert min(t["gain"] for t in report.details["tensors"]) > 0.999


@pytest.mark.parametrize("zero", ["B", "weight"])
def test_nothing_changed_is_exit_1(
    zero: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = weights(BF16)
    base[f"{Q}.weight"][:2] = -0.0  # plus a zero update, these become +0
    checkpoint(tmp_path / "base", base)
    made = pairs(size=0.0) if zero == "B" else pairs()
    path = adapter(tmp_path / "adapter", made)
    before = tree(tmp_path)
    given = path if zero == "B" else f"{path}:0"
    assert cli("merge", tmp_path / "base", given, "-o", tmp_path / "out") == 1
    assert "no element of 2 tensors would change" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_tensor_of_zeros_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "base", {n: np.zeros_like(w) for n, w in weights().items()})
    adapter(tmp_path / "adapter", pairs())
    args = ("merge", tmp_path / "base", tmp_path / "adapter", "-o")
    assert cli(*args, tmp_path / "out", "--json") == 0

    def never(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    said = json.loads(capsys.readouterr().out, parse_constant=never)
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=never)
    assert [t["ratio"] for t in said["tensors"]] == [None, None]
    assert cli(*args, tmp_path / "out2") == 0
    assert "∞" in capsys.readouterr().out


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """Whatever the number of threads; large enough for several jobs a tensor."""
    r = rng()
    checkpoint(tmp_path / "base", {f"{Q}.weight": r.standard_normal((20011, 600)).astype(BF16)}, 1)
    adapter(tmp_path / "adapter", {Q: factors(r, 20011, 600, 8)})
    for out, workers in (("1", 1), ("2", 2), ("5", 5)):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / out, threads=workers)
    first, *others = (
        {k[len(str(tmp_path)) + 2 :]: v for k, v in tree(tmp_path / o).items()} for o in "125"
    )
    assert first == others[0] == others[1]


def test_an_adapter_in_memory_and_no_effect(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors", weights())
    a, b = pairs()[Q]
    held = Adapter({f"{Q}.weight": LowRank(a, b, 4.0)})
    merge(tmp_path / "base.safetensors", [(held, 2.0)], tmp_path / "out.safetensors")
    new = read(tmp_path / "out.safetensors")[f"{Q}.weight"]
    assert np.allclose(new, weights()[f"{Q}.weight"] + 2 * (b @ a), atol=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "out.safetensors"]
    with pytest.raises(NoEffectError):
        merge(tmp_path / "base.safetensors", [(held, 0.0)], tmp_path / "no.safetensors")


# --- memory --------------------------------------------------------------------------------------

PEAK = """
import sys
from lora_fx.checkpoint.merge import merge
merge(sys.argv[1], sys.argv[2], sys.argv[3], threads=2)
# Not ru_maxrss, which begins with what the process had before exec: that of the tests.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(folder: Path, rows: int) -> int:
    """KiB at most, of a process that merges 5 tensors of rows × 1024 in bf16, 4 of them touched."""
    folder.mkdir()
    names = [f"m.{i}.weight" for i in range(5)]
    size = rows * 1024 * 2
    entries = {
        n: {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [i * size, (i + 1) * size]}
        for i, n in enumerate(names)
    }
    text = json.dumps(entries).encode()
    with open(folder / "base.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + 5 * size)  # zeros that take no disk
    adapter(folder / "adapter", {n[:-7]: factors(rng(), rows, 1024, 2) for n in names[1:]})
    paths = [str(folder / n) for n in ("base.safetensors", "adapter", "o")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    small, large = peak(tmp_path / "40 MB", 4000), peak(tmp_path / "400 MB", 40000)
    print(f"{small / 1024:.0f} and {large / 1024:.0f} MiB")
    assert large - small < 30 << 10
    assert large < 200 << 10


def test_adapters_may_be_the_values_of_a_dict() -> None:
    low = LowRank(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 1.0)
    mine = Adapter({"w": low})
    (weighted,) = read_adapters({"mine": (mine, 0.5)}.values())
    assert weighted.weight == 0.5 and [*weighted.adapter.entries] == ["w"]
