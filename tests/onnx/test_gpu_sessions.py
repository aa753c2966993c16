"""Sessions on a GPU: adapters, ids out of range, rank 0, batches without rows, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.onnx import Session, TrainSession
from lora_fx.onnx.session import open_session
from tests.onnx.test_batch import adapter
from tests.onnx.token_net import TokenNet
from tests.providers import GPU, ON_GPU
from tests.trust.test_row_ids import CASES, exported, words

pytestmark = ON_GPU
RANKS = {"de": 2, "fr": 3, "it": 5}
TOL = 2 * ORT_TOL  # the CPU and the GPU may each be a gate away from the model
Feeds = dict[str, Any]


@pytest.fixture(scope="module")
def captured() -> Captured:
    return lora_fx.capture(TokenNet().eval(), (torch.randint(0, 11, (2, 5)),))


@pytest.fixture(scope="module")
def adapters(captured: Captured) -> dict[str, Adapter]:
    """Adapters of other ranks; the last one is for one of the layers only."""
    keys = {"de": ["table", "up", "down"], "fr": ["table", "up", "down"], "it": ["down"]}
    return {
        name: adapter(captured, seed, rank, keys[name])
        for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture(scope="module")
def folder(
    captured: Captured, adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files of all modes, proven on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    for mode in ("switch", "load", "batch"):
        path = folder / f"{mode}.onnx"
        lora_fx.export(captured, path, mode=mode, adapters=adapters, provider="cpu", force=True)
    for name, one in adapters.items():
        lora_fx.export(captured, folder / f"{name}.onnx", adapters=one, provider="cpu")
    lora_fx.export(captured, folder / "base.onnx", provider="cpu")
    return folder


def session_of(folder: Path, adapters: dict[str, Adapter], provider: str = GPU) -> Session:
    session = Session(folder / "switch.onnx", provider)
    for name, one in adapters.items():
        session.load(name, one)
    return session


def ids(seed: int = 0, rows: int = 3) -> Feeds:
    return {"ids": np.random.default_rng(seed).integers(0, 11, (rows, 6))}


def output(outputs: Feeds) -> Any:
    (values,) = outputs.values()
    return values


def test_adapters_are_switched_and_the_base_has_no_trace(
    folder: Path, adapters: dict[str, Adapter]
) -> None:
    """Defaults of rank 0: those of the base, and of the targets that "it" leaves out."""
    session = session_of(folder, adapters)
    names = [None, *RANKS, *reversed(RANKS), None]
    for name in names:
        merged = open_session(folder / f"{name or 'base'}.onnx", "cpu").run(ids())
        assert rel(output(session.run(ids(), name)), output(merged)) <= TOL
    plain = open_session(folder / "switch.onnx", GPU)
    base = open_session(folder / "base.onnx", "cpu").run(ids())
    assert rel(output(plain.run(ids())), output(base)) <= TOL


def test_adapters_are_mixed(folder: Path, adapters: dict[str, Adapter]) -> None:
    on_gpu, on_cpu = session_of(folder, adapters), session_of(folder, adapters, "cpu")
    base = output(on_cpu.run(ids()))
    for mix in ({"de": 0.5, "fr": 1.5}, {"it": -1.0}, {"de": 0.0}, {}, dict.fromkeys(RANKS, 0.3)):
        expected = output(on_cpu.run(ids(), mix))
        assert rel(output(on_gpu.run(ids(), mix)), expected) <= TOL
        assert rel(expected, base) > 0.05 or mix in ({}, {"de": 0.0})


def test_an_adapter_stays_on_the_device(folder: Path, adapters: dict[str, Adapter]) -> None:
    """A run copies none of its tensors, bound or not; outputs may stay there too."""
    session = session_of(folder, adapters)
    for name in RANKS:
        values = session.choice(name)
        assert {value.device_name() for value in values.values()} == {GPU}
        session.run(ids(), name)
        again = session.choice(name)
        assert all(again[key] is value for key, value in values.items())
        binding = session.bind(ids(), name)
        session.session.run_with_iobinding(binding)
        assert {value.device_name() for value in binding.get_outputs()} == {GPU}
        np.testing.assert_array_equal(
            binding.copy_outputs_to_cpu()[0], output(session.run(ids(), name))
        )


def test_an_adapter_is_loaded_with_the_file(folder: Path, adapters: dict[str, Adapter]) -> None:
    for name, one in adapters.items():
        found = output(Session(folder / "load.onnx", GPU, adapter=one).run(ids()))
        merged = output(open_session(folder / f"{name}.onnx", "cpu").run(ids()))
        assert rel(found, merged) <= TOL


def test_threads_do_not_mix(folder: Path, adapters: dict[str, Adapter]) -> None:
    session = session_of(folder, adapters)
    choices = [None, *RANKS, {"de": 0.5, "it": 0.5}]
    jobs = [(choice, ids(seed, 1 + seed % 3)) for seed in range(6) for choice in choices]
    alone = [output(session.run(feeds, choice)).copy() for choice, feeds in jobs]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda job: output(session.run(job[1], job[0])), jobs * 4))
    for number, values in enumerate(again):
        assert np.array_equal(values, alone[number % len(jobs)]), jobs[number % len(jobs)][0]


def test_another_adapter_under_a_name(folder: Path, adapters: dict[str, Adapter]) -> None:
    session = session_of(folder, adapters)
    before = output(session.run(ids(), "de"))
    session.load("de", adapters["fr"])
    np.testing.assert_array_equal(
        output(session.run(ids(), "de")), output(session.run(ids(), "fr"))
    )
    assert rel(output(session.run(ids(), "de")), before) > 0.05


@pytest.mark.parametrize("mode", ["base", "switch", "load", "batch"])
def test_a_batch_without_rows(mode: str, folder: Path) -> None:
    """Nothing, or an error in one line; the next run is right."""
    session = open_session(folder / f"{mode}.onnx", GPU)
    for rows in (0, 3):
        feeds = ids(rows=rows)
        if mode == "batch":
            feeds["adapter_ids"] = np.arange(rows)
        try:
            found = output(session.run(feeds))
        except LoraFxError as error:
            assert rows == 0 and "\n" not in error.message
            continue
        assert found.shape == (rows, 5)
        if rows:
            expected = open_session(folder / f"{mode}.onnx", "cpu").run(feeds)
            assert rel(found, output(expected)) <= TOL


VECTORS = 1000
IN_RANGE = 0.6
"""The share of the rows that ask for an adapter which there is."""
EDGES = np.array([-1, 2**31, -(2**31), 2**32, 2**32 + 1, -(2**32), 2**62, 2**63 - 1, -(2**63)])


def id_vectors(count: int) -> list[Any]:
    """Ids of five rows: in range, just outside of it, far outside, and where int32 wraps."""
    rng = np.random.default_rng(0)
    vectors = []
    for _ in range(VECTORS):
        inside = rng.integers(0, count + 1, 5)
        near = rng.choice([-2, -1, count + 1, count + 2, 2 * count + 2], 5)
        outside = np.where(rng.random(5) < 0.5, near, rng.choice(EDGES, 5))
        vectors.append(np.where(rng.random(5) < IN_RANGE, inside, outside))
    return vectors


@pytest.mark.parametrize("name", CASES)
def test_ids_out_of_range_get_nan_and_nobody_elses_values(name: str, tmp_path: Path) -> None:
    """Straight into the runtime, without the check that a session makes first."""
    case = CASES[name]
    path, _ = exported(case, tmp_path)
    session = open_session(path, GPU)
    feeds = words(np.random.default_rng(0), 5)
    if dict(case.options).get("scales"):
        feeds["adapter_scales"] = np.linspace(0.5, 1.5, 5).astype("f")
    alone = [
        session.outputs({**feeds, "adapter_ids": np.full(5, number)})
        for number in range(case.count + 1)
    ]
    refused = 0
    tol = {torch.float16: 2e-3, torch.float64: 1e-12}.get(case.dtype, TOL)
    for vector in id_vectors(case.count):
        outside = (vector < 0) | (vector > case.count)
        try:
            outputs = session.outputs({**feeds, "adapter_ids": vector})
        except Exception:  # the runtime's own; no row got anything
            assert outside.any()
            refused += 1
            continue
        for output_name, values in outputs.items():
            for row, number in enumerate(vector):
                if outside[row]:
                    expected = alone[0][output_name][row]
                    is_nan = values.dtype.kind == "f" and np.isnan(values[row]).all()
                    assert is_nan or (output_name in case.without_nan or output_name == "asked"), (
                        vector,
                        row,
                    )
                    if not is_nan:
                        np.testing.assert_array_equal(values[row], expected)
                    continue
                expected = alone[number][output_name][row]
                if values.dtype.kind == "f":
                    assert rel(values[row], expected) <= tol, (vector, row)
                else:
                    np.testing.assert_array_equal(values[row], expected)
    print(f"{name}: {refused} of {VECTORS} refused by the runtime")


def test_a_step_of_training_starts_again_where_it_was(tmp_path: Path) -> None:
    """Twenty steps on the GPU are those on the CPU; A, B and their states stay on the device."""
    path = tmp_path / "step.onnx"
    cap = lora_fx.capture(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), (torch.randn(2, 6),)
    )
    lora_fx.export(cap, path, mode="train", rank=3, provider=GPU)
    sessions = {provider: TrainSession(path, 1e-2, provider) for provider in (GPU, "cpu")}
    rng = np.random.default_rng(0)
    for rows in [4, 1, 3, 7] * 5:
        batch = {
            "input": rng.standard_normal((rows, 6)).astype("f"),
            "labels": rng.integers(0, 5, rows),
        }
        losses = {provider: session.step(batch) for provider, session in sessions.items()}
        assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-5)
    assert {value.device_name() for value in sessions[GPU]._held.values()} == {GPU}
    for key, update in sessions["cpu"].adapter().lowrank.items():
        found = sessions[GPU].adapter().lowrank[key]
        np.testing.assert_allclose(found.a, update.a, atol=1e-5)
        np.testing.assert_allclose(found.b, update.b, atol=1e-5)
        assert np.abs(update.b).max() > 1e-2
