"""A merge that wrote something wrong: it says so, and nothing is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.checkpoint import merge_jobs, write
from lora_fx.checkpoint.fold import TensorFold
from lora_fx.checkpoint.merge import merge, plan_merge
from lora_fx.checkpoint.prove import ROWS, _samples
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from tests.checkpoint.made import adapter, checkpoint, factors
from tests.faults import Faults

Q, K = "layers.0.q_proj", "layers.1.k_proj"


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shape = (96, 40)
    weights = {f"{n}.weight": rng.standard_normal(shape).astype(np.float32) for n in (Q, K)}
    weights["layers.1.norm.weight"] = np.ones(77, np.float32)
    checkpoint(tmp_path / "base", weights, 2)
    adapter(tmp_path / "adapter", {Q: factors(rng, *shape, 4)})
    return tmp_path


def _wrong(scene: Path, message: str) -> None:
    with pytest.raises(LoraFxError, match=f"out: not written: {message}"):
        merge(scene / "base", scene / "adapter", scene / "out", threads=2)
    assert sorted(os.listdir(scene)) == ["adapter", "base"]


def test_a_wrong_fold_is_caught(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = TensorFold.block

    def off(self: TensorFold, *args: Any) -> Any:
        result, stats = block(self, *args)
        result *= 1 + 2.0**-16  # far less than anyone would see in what a model says
        return result, stats

    monkeypatch.setattr(TensorFold, "block", off)
    _wrong(scene, f"'{Q}.weight' differs from W \\+ ΔW by")


@pytest.mark.parametrize("at", [0, 1, 5000])
def test_one_wrong_bit_of_a_copy_is_caught(
    at: int, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = merge_jobs.copied

    def flipped(source: int, target: int, start: int, to: int, count: int) -> Any:
        done = copied(source, target, start, to, count)
        place = to + at % count
        os.pwrite(target, bytes([os.pread(target, 1, place)[0] ^ 4]), place)
        return done

    monkeypatch.setattr(write, "copied", flipped)
    _wrong(scene, ".* is not changed by any adapter, but its bytes differ from the base")


def test_rows_of_the_proof(scene: Path) -> None:
    """Distinct, all over the tensor, the same in every run."""
    change = plan_merge(scene / "base", [scene / "adapter"]).changes[f"{Q}.weight"]
    rows = list(_samples(change, ROWS))
    assert rows == list(_samples(change, ROWS)) and len(set(rows)) == ROWS == 4
    assert all(0 <= low < high == low + 1 <= 96 for low, high in rows)
    assert rows[-1][0] > 24, "only its beginning"
    assert [r for low, high in _samples(change, None) for r in range(low, high)] == list(range(96))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing reserves space here")
def test_the_space_of_every_file_is_reserved(scene: Path) -> None:
    with Faults(only={"posix_fallocate"}) as seen:
        merge(scene / "base", scene / "adapter", scene / "out")
    assert len(seen.calls) == len(open_checkpoint(scene / "out").shards) == 2
