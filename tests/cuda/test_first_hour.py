"""The first hour with a GPU: ten checks of what is built on sources and on a stand-in alone.

`pytest -m gpu tests/cuda/test_first_hour.py` on a machine with CUDA; elsewhere every row is
skipped. None has run yet. After a pass, lora_fx/onnx/unverified.py loses the row that it proves.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter
from lora_fx.compare import ORT_TOL, rel
from lora_fx.onnx import Session, TrainSession
from lora_fx.onnx.adapter_buffers import BASE, AdapterBuffers
from lora_fx.onnx.device_values import value_of_plugin
from lora_fx.onnx.graph_runs import GraphRuns, refuse_uncapturable
from lora_fx.onnx.manifest import Manifest
from lora_fx.onnx.plugin_providers import CUDA_PLUGIN, plugin_devices
from lora_fx.onnx.session import open_session
from tests.cuda.cases import Case
from tests.cuda.placed import row_of
from tests.cuda.table import Row, Table
from tests.onnx.test_batch import adapter
from tests.onnx.token_net import TokenNet
from tests.providers import GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU != "cuda", reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*never run on a GPU:RuntimeWarning"),
]
CUDA = "cuda"
RANKS = {"de": 2, "fr": 5}
TOL = {"float32": 2 * ORT_TOL, "float16": 4e-3}
PLACED = [
    Case("tied_head", "merged"),
    Case("tied_head", "switch"),
    Case("tied_head", "batch"),
    Case("tied_head", "switch int4"),
    Case("hf_bert", "merged optimised"),
    Case("hf_bert", "switch"),
    Case("hf_llama", "merged float16 optimised"),
    Case("hf_llama", "cache merged"),
]
Named = Mapping[str, Any]


def example() -> tuple[torch.Tensor]:
    return (torch.randint(0, 11, (2, 5)),)


def ids(seed: int = 0, rows: int = 3) -> dict[str, Any]:
    return {"ids": np.random.default_rng(seed).integers(0, 11, (rows, 6))}


def output(outputs: Named) -> Any:
    (values,) = outputs.values()
    return values


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    captured = lora_fx.capture(TokenNet(64, 96, 32).eval(), example())
    keys = ["table", "up", "down"]
    return {
        name: adapter(captured, seed, rank, keys) for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture(scope="module")
def export(
    adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Export the model for CUDA, proven on the CPU."""

    def exported(mode: str, **options: Any) -> Path:
        path = tmp_path_factory.mktemp(mode) / "m.onnx"
        settings = {"adapters": adapters, "provider": "cpu", "target": "cuda", **options}
        lora_fx.export(TokenNet(64, 96, 32).eval(), path, example(), mode=mode, **settings)
        return path

    return exported


def session_on(path: Path, provider: str, adapters: Mapping[str, Adapter], **o: Any) -> Session:
    session = Session(path, provider, **o)
    for name, one in adapters.items():
        session.load(name, one)
    return session


def test_1_ids_out_of_range_get_nan_or_an_error(export: Callable[..., Path]) -> None:
    session = open_session(export("batch"), CUDA)
    for asked in ([-1, 1, 0], [1, 9, -5], [2**31, 2**32 + 1, 1]):
        alone = [
            output(session.run({**ids(), "adapter_ids": np.full(3, number)})) for number in (0, 1)
        ]
        try:
            found = output(session.outputs({**ids(), "adapter_ids": np.array(asked)}))
        except Exception:  # the runtime's own; no row got anything
            continue
        for row, number in enumerate(asked):
            if number in (0, 1):
                assert rel(found[row], alone[number][row]) <= TOL["float32"]
            else:
                assert np.isnan(found[row]).all()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_2_defaults_of_rank_0_change_nothing(export: Callable[..., Path], precision: str) -> None:
    narrow = export("merged", precision=precision, adapters=None)
    path = narrow.with_name("switch.onnx")
    lora_fx.export(narrow, path, mode="switch", provider="cpu")
    found = output(open_session(path, CUDA).run(ids()))
    assert rel(found, output(open_session(path, "cpu").run(ids()))) <= TOL[precision]


CHOICES = ("de", "fr", None, "fr", "de", {"de": 0.5, "fr": 0.25}, "de")


def test_3_a_replay_computes_the_adapter_that_was_chosen_last(
    export: Callable[..., Path], adapters: dict[str, Adapter]
) -> None:
    path = export("switch")
    on_cpu = session_on(path, "cpu", adapters)
    captured = session_on(path, CUDA, adapters, cuda_graph=True, rank=sum(RANKS.values()))
    for seed, choice in enumerate(CHOICES * 3):
        feeds = ids(seed, rows=(3, 1)[seed % 2])
        expected = output(on_cpu.run(feeds, choice))
        assert rel(output(captured.run(feeds, choice)), expected) <= TOL["float32"], seed


def test_3_each_thread_captures_graphs_of_its_own(
    export: Callable[..., Path], adapters: dict[str, Adapter]
) -> None:
    path = export("switch")
    captured = session_on(path, CUDA, adapters, cuda_graph=True)
    jobs = [(ids(seed), choice) for seed in range(8) for choice in ("de", "fr", None)]
    on_cpu = session_on(path, "cpu", adapters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: output(captured.run(*job)), jobs))
    for job, values in zip(jobs, found, strict=True):
        assert rel(values, output(on_cpu.run(*job))) <= TOL["float32"]


def bytes_to_device(run: Callable[[], object], trace: Path) -> int:
    """The bytes that a call copies from host to device, by CUPTI's trace of the process."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    return sum(int(copy["args"]["bytes"]) for copy in copies if "HtoD" in copy["name"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch without CUDA traces no copies")
def test_4_a_session_copies_no_adapter_in_a_run_and_the_runtimes_own_does(
    export: Callable[..., Path], adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    path = export("switch")
    session = session_on(path, CUDA, adapters)
    tensors = session.manifest.tensors(adapters["fr"])
    size = sum(array.nbytes for array in tensors.values())
    feeds = ids()
    session.run(feeds, "fr")
    of_session = bytes_to_device(lambda: session.run(feeds, "fr"), tmp_path / "session.json")
    assert of_session < size

    loaded = ort.LoraAdapter()
    loaded.Load(str(path.with_name("fr.onnx_adapter")))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    plain = ort.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    plain.run(None, feeds, options)
    of_adapter = bytes_to_device(lambda: plain.run(None, feeds, options), tmp_path / "adapter.json")
    assert of_adapter >= size


def compared(case: Case, files: Path, fields: tuple[str, ...]) -> tuple[Row, Row]:
    """Fields of the row that the stand-in gave, and of the one that this device gives."""
    stored = Table().row(case)
    assert stored is not None
    found = row_of(str(case.export(files)))
    return {name: stored[name] for name in fields}, {name: found[name] for name in fields}


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_5_nodes_are_placed_as_on_the_stand_in(case: Case, files: Path) -> None:
    expected, found = compared(case, files, ("on_device", "on_cpu", "copies", "uncapturable"))
    assert found == expected


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_6_operators_are_fused_as_on_the_stand_in(case: Case, files: Path) -> None:
    expected, found = compared(case, files, ("fused",))
    assert found == expected


@pytest.mark.parametrize("zero_points", [False, True])
def test_7_int4_products_with_and_without_zero_points(zero_points: bool, tmp_path: Path) -> None:
    """In the form of the fast kernel: float16, blocks of 32, N a multiple of 64."""
    inner, outer, block = 128, 64, 32
    rng = np.random.default_rng(0)
    constants = {
        "codes": rng.integers(0, 256, (outer, inner // block, block // 2), dtype=np.uint8),
        "scales": rng.uniform(0.01, 0.02, outer * inner // block).astype(np.float16),
    }
    if zero_points:
        constants["zeros"] = rng.integers(0, 256, outer * inner // block // 2, dtype=np.uint8)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=inner, N=outer, bits=4, block_size=block,
    )  # fmt: skip
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        [node],
        "products",
        [onnx.helper.make_tensor_value_info("x", half, ["rows", inner])],
        [onnx.helper.make_tensor_value_info("y", half, ["rows", outer])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10), path)
    for rows in (1, 5, 64):
        feeds = {"x": rng.standard_normal((rows, inner)).astype(np.float16)}
        expected = output(open_session(path, "cpu").run(feeds)).astype(np.float32)
        found = output(open_session(path, CUDA).run(feeds)).astype(np.float32)
        assert rel(found, expected) <= TOL["float16"]


@pytest.fixture
def runtime_without_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A runtime whose CUDA is the plugin's."""
    if importlib.util.find_spec(CUDA_PLUGIN.module) is None:
        pytest.skip(f"{' or '.join(CUDA_PLUGIN.packages)} is not installed")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    yield


def test_8_the_plugin_computes_what_the_cpu_does(
    runtime_without_cuda: None, export: Callable[..., Path], adapters: dict[str, Adapter]
) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = value_of_plugin(array, plugin_devices(CUDA_PLUGIN)[0])
    np.testing.assert_array_equal(value.numpy(), array)
    path = export("switch")
    on_cpu = session_on(path, "cpu", adapters)
    for options in ({}, {"cuda_graph": True, "rank": sum(RANKS.values())}):
        on_plugin = session_on(path, CUDA, adapters, **options)
        for choice in CHOICES:
            expected = output(on_cpu.run(ids(), choice))
            assert rel(output(on_plugin.run(ids(), choice)), expected) <= TOL["float32"]


def test_9_twenty_steps_of_training_are_those_of_the_cpu(tmp_path: Path) -> None:
    """TF32 is off, as in every session that is exact."""
    path = tmp_path / "step.onnx"
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    lora_fx.export(net, path, (torch.randn(2, 64),), mode="train", rank=3, provider="cpu")
    sessions = [TrainSession(path, 1e-2, provider) for provider in (CUDA, "cpu")]
    rng = np.random.default_rng(0)
    for rows in [4, 1, 3, 7] * 5:
        batch = {
            "input": rng.standard_normal((rows, 64)).astype("f"),
            "labels": rng.integers(0, 32, rows),
        }
        on_cuda, on_cpu = (session.step(batch) for session in sessions)
        assert on_cuda == pytest.approx(on_cpu, rel=1e-5)
    update_on_cuda, update_on_cpu = (session.adapter().lowrank for session in sessions)
    for key, update in update_on_cpu.items():
        np.testing.assert_allclose(update_on_cuda[key].b, update.b, atol=1e-5)
        assert np.abs(update.b).max() > 1e-2


@pytest.mark.parametrize("mode", ["merged", "batch"])
def test_10_a_replay_after_another_shape(
    mode: str, export: Callable[..., Path], adapters: dict[str, Adapter]
) -> None:
    """Concat, Split and batched products once read a buffer that a run of another shape had
    reused (microsoft/onnxruntime#32121)."""
    path = export(mode, adapters=adapters["de"] if mode == "merged" else adapters)
    refuse_uncapturable(path)
    captured = open_session(path, CUDA, cuda_graph=True)
    runs = GraphRuns(captured.session, AdapterBuffers(Manifest({}, mode), 1, CUDA), CUDA)
    on_cpu = open_session(path, "cpu")
    for seed in range(12):
        rows = (3, 5, 1)[seed % 3]
        feeds = ids(seed, rows)
        if mode == "batch":
            feeds["adapter_ids"] = np.random.default_rng(seed).integers(0, 3, rows)
        found = output(runs.run(feeds, BASE))
        assert rel(found, output(on_cpu.run(feeds))) <= TOL["float32"], seed
