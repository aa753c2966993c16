"""CUDA graphs of sessions, on the stand-in: accepted, captured once a shape, at constant addresses.

No kernel runs there, so these tests read addresses, copies and counts, and no output.
tests/onnx/test_graph_runs.py has the numbers, on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.onnx.manifest import manifest_of
from tests.cuda import stand_in

GRAPHS = Path(__file__).with_name("graphs.py")
SHAPES = {"0.weight": (9, 6), "2.weight": (5, 9)}
ADAPTERS = {"a": (2, ["0.weight", "2.weight"]), "b": (3, ["0.weight"])}
"""Rank and targets."""
RUNS = 6 * 3
"""Those of graphs.py."""


def adapters() -> Mapping[str, Adapter]:
    rng = np.random.default_rng(0)
    found = {}
    for name, (rank, keys) in ADAPTERS.items():
        updates = {}
        for key in keys:
            out, inside = SHAPES[key]
            a, b = rng.standard_normal((rank, inside)), rng.standard_normal((out, rank))
            updates[key] = LowRank(a.astype("f"), b.astype("f"), 0.5)
        found[name] = Adapter(updates)
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with switch.onnx, and its adapters."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "adapters").mkdir()
    for name, one in adapters().items():
        save_adapter(one, folder / "adapters" / f"{name}.safetensors")
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).eval()
    path = folder / "switch.onnx"
    lora_fx.export(
        net, path, (torch.ones(2, 6),), mode="switch", adapters=adapters(), provider="cpu"
    )
    return folder


@pytest.fixture(scope="module")
def answer(exported: Path, stand_in_folder: Path) -> Mapping[str, Any]:
    child = stand_in.run_with(
        stand_in_folder, GRAPHS, exported / "switch.onnx", exported / "adapters"
    )
    assert child.returncode == 0, child.stderr
    printed: Mapping[str, Any] = json.loads(child.stdout)
    return printed


def test_a_session_is_accepted_and_says_that_it_never_ran(answer: Mapping[str, Any]) -> None:
    assert answer["provider"] == "cuda"
    assert "never run on a GPU" in answer["note"]


def test_addresses_stay_while_adapters_and_inputs_change(answer: Mapping[str, Any]) -> None:
    """Four buffers of two targets; the input and the output of each of two shapes."""
    seen = answer["addresses"]
    assert len(seen) == RUNS
    assert {len(one) for one in seen} == {4 + 2, 4 + 2 * 2}
    last = seen[-1]
    assert len(set(last)) == len(last)
    assert all(one == last[: len(one)] for one in seen)


def test_each_shape_is_captured_once_and_replayed(answer: Mapping[str, Any]) -> None:
    assert answer["shapes"] == answer["captures"] == 2
    assert answer["launches"] == RUNS


def test_no_thread_may_use_cuda_while_another_one_captures(answer: Mapping[str, Any]) -> None:
    """docs/serving.md says so: the runtime captures in CUDA's mode "global", which is 0."""
    assert answer["capture mode"] == 0


def test_tf32_is_on_in_plain_sessions_and_off_in_ours(answer: Mapping[str, Any]) -> None:
    assert answer["use_tf32"] == {"cuda_graph": "0", "exact": "0", "not exact": "1", "plain": "1"}


def test_the_buffers_hold_the_adapter_padded_with_zeros(
    answer: Mapping[str, Any], exported: Path
) -> None:
    manifest = manifest_of(exported / "switch.onnx")
    largest = max(rank for rank, _ in ADAPTERS.values())
    for name, one in adapters().items():
        tensors = manifest.tensors(one)
        held = answer["held"][f"{name}.safetensors"]
        for key, slot in manifest.slots.items():
            a, b = np.array(held[slot.a]), np.array(held[slot.b])
            assert a.shape[-1] == b.shape[-2] == largest
            if key not in ADAPTERS[name][1]:
                assert not a.any() and not b.any()
                continue
            rank = ADAPTERS[name][0]
            np.testing.assert_array_equal(a[..., :rank], tensors[slot.a])
            np.testing.assert_array_equal(b[..., :rank, :], tensors[slot.b])
            assert not a[..., rank:].any() and not b[..., rank:, :].any()
