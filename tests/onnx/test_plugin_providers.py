"""Providers that are packages beside ONNX Runtime, found and chosen by name.

WebGPU's is real where it is installed (tests marked gpu). CUDA's is on no index: a package, devices
and a session stand in for it at the seam with the runtime, and the numbers are those of the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx import session as sessions
from lora_fx.onnx.device_values import value_of_plugin
from lora_fx.onnx.plugin_providers import CUDA_PLUGIN, plugin_devices, registered_name
from lora_fx.onnx.session import driver_present, open_session, providers
from lora_fx.onnx.unverified import never_run
from lora_fx.onnx.webgpu import webgpu_devices
from tests.providers import GPU

X = {"input": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    lora_fx.export(torch.nn.Sequential(torch.nn.Linear(4, 3)), path, (torch.ones(2, 4),))
    return path


class Options(ort.SessionOptions):  # type: ignore[misc]
    """Options that keep what a session would run on, in the place of the runtime's own devices."""

    chosen: Any = None

    def add_provider_for_devices(self, devices: Any, options: Any) -> None:
        self.chosen = (devices, options)


class OnPlugin(ort.InferenceSession):  # type: ignore[misc]
    """A session on the CPU that says that it runs on the plugin's device."""

    def __init__(self, path: str, options: Options, providers: Any) -> None:
        assert options.chosen is not None and providers is None
        devices, self.options_of_provider = options.chosen
        self.name = devices[0].ep_name
        assert devices == [DEVICES[1]]
        super().__init__(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [self.name, "CPUExecutionProvider"]


DEVICES = [
    SimpleNamespace(ep_name="CPUExecutionProvider"),
    SimpleNamespace(ep_name="CudaPluginExecutionProvider"),
    SimpleNamespace(ep_name="CudaPluginExecutionProvider"),
]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """A runtime without CUDA beside a package that has it; what is registered."""
    calls: list[tuple[str, str]] = []
    package = ModuleType("onnxruntime_ep_cuda")
    package.get_ep_name = lambda: "CudaPluginExecutionProvider"  # type: ignore[attr-defined]
    package.get_library_path = lambda: "cuda.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *call: calls.append(call)
    )
    monkeypatch.setattr(ort, "get_ep_devices", lambda: DEVICES)
    monkeypatch.setattr(sessions, "driver_present", lambda: True)
    monkeypatch.setattr(sessions, "quiet_options", Options)
    monkeypatch.setattr(ort, "InferenceSession", OnPlugin)
    registered_name.cache_clear()
    yield calls
    registered_name.cache_clear()


@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_cuda_is_the_plugin_where_the_runtime_has_none(
    provider: str, file: Path, registered: list[tuple[str, str]]
) -> None:
    session = open_session(file, provider)
    assert session.provider == "cuda"
    assert session.note == never_run("onnxruntime-ep-cuda12 and -cuda13")
    assert session.session.options_of_provider == {"use_tf32": "0"}
    assert session.run(X).keys() == {"output"}
    open_session(file, provider, exact=False)
    assert providers()[0] == "cuda"
    assert registered == [("CudaPluginExecutionProvider", "cuda.so")]


def test_a_runtime_with_cuda_takes_no_plugin(
    file: Path, registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert "cuda" in providers()
    assert registered == []


def test_a_plugin_without_a_device_says_so_every_time(
    file: Path, registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_ep_devices", lambda: DEVICES[:1])
    for _ in range(2):
        with pytest.raises(LoraFxError, match=r"CUDA was requested, .*: it finds no GPU"):
            open_session(file, "cuda")
    assert "cuda" not in providers()
    assert len(registered) == 1


def test_a_plugin_that_the_runtime_refuses(
    file: Path, registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, library: str) -> None:
        raise RuntimeError("built for\nanother runtime")

    monkeypatch.setattr(ort, "register_execution_provider_library", refuse)
    with pytest.raises(LoraFxError) as caught:
        open_session(file, "cuda")
    assert ort.__version__ in caught.value.message and "\n" not in caught.value.message
    assert "cuda" not in providers()


def test_no_cuda_in_the_runtime_and_no_plugin(
    file: Path, registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_cuda", None)
    with pytest.raises(LoraFxError, match=r"onnxruntime-ep-cuda12 or .* cannot be imported") as e:
        open_session(file, "cuda")
    assert e.value.hint == CUDA_PLUGIN.install
    assert "cuda" not in providers()


@pytest.mark.skipif(driver_present(), reason="a machine with NVIDIA's driver")
def test_a_plain_session_falls_back_without_an_error_and_ours_does_not(file: Path) -> None:
    """docs/serving.md says so."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    plain = ort.InferenceSession(str(file), options, providers=wanted)
    assert plain.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(LoraFxError, match="CUDA was requested, but cannot be used"):
        open_session(file, "cuda")


def test_devices_are_those_of_the_plugin(registered: list[tuple[str, str]]) -> None:
    assert plugin_devices(CUDA_PLUGIN) == tuple(DEVICES[1:])


@pytest.mark.gpu
@pytest.mark.skipif(GPU != "webgpu", reason="no WebGPU plugin")
def test_a_value_in_the_memory_of_a_real_plugin() -> None:
    """CUDA's plugin needs this way: by the name of a device, its runtime makes no values."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = value_of_plugin(array, webgpu_devices()[0])
    assert value.device_name() == "webgpu"
    np.testing.assert_array_equal(value.numpy(), array)
    value.update_inplace(array + 1)
    np.testing.assert_array_equal(value.numpy(), array + 1)
