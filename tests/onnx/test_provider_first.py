"""A provider that cannot be used is refused before a model is captured or a file is read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

import lora_fx
from lora_fx import LoraFxError
from lora_fx.onnx import session as sessions
from lora_fx.onnx.bench import bench
from lora_fx.onnx.provider_nodes import CUDA
from lora_fx.onnx.session import check_provider
from lora_fx.passes.verbs.insert_onnx import insert_onnx
from tests.cli.test_cli import run

FACTORY = """
def build():
    raise AssertionError("the model is made")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model that cannot be made and files that cannot be read, and no provider."""
    (tmp_path / "model.py").write_text(FACTORY)
    (tmp_path / "m.onnx").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sessions, "driver_present", lambda: False)

    def no_device() -> None:
        raise LoraFxError("WebGPU was requested, but cannot be used: it finds no GPU", "use cpu")

    monkeypatch.setattr(sessions, "webgpu_devices", no_device)
    return tmp_path


VERBS: dict[str, Callable[[Any], object]] = {
    "export": lambda provider: lora_fx.export("model.py:build", "o.onnx", provider=provider),
    "export of a file": lambda provider: lora_fx.export("m.onnx", "o.onnx", provider=provider),
    "verify": lambda provider: lora_fx.verify("model.py:build", "m.onnx", provider=provider),
    "verify of files": lambda provider: lora_fx.verify("m.onnx", "m.onnx", provider=provider),
    "insert": lambda provider: insert_onnx("m.onnx", "o.onnx", provider=provider),
    "merge": lambda provider: lora_fx.merge("m.onnx", [], "o.onnx", run=True, provider=provider),
    "bench": lambda provider: bench(["m.onnx"], provider=provider),
}  # fmt: skip
COMMANDS = {
    "export": "export model.py:build -o o.onnx",
    "export of a file": "export m.onnx -o o.onnx",
    "verify": "verify model.py:build m.onnx",
    "bench": "bench m.onnx",
}
REFUSALS = {"cuda": "CUDA was requested, but", "webgpu": "WebGPU was requested, but"}


@pytest.mark.parametrize("provider", REFUSALS)
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_before_work(verb: str, provider: str, folder: Path) -> None:
    with pytest.raises(LoraFxError, match=REFUSALS[provider]):
        VERBS[verb](provider)


@pytest.mark.parametrize("provider", REFUSALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_before_work(
    command: str, provider: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *COMMANDS[command].split(), "--provider", provider)
    assert code == 2
    assert f"Error: {REFUSALS[provider]}" in err


@pytest.mark.parametrize("verb", ["export", "export of a file", "verify of files", "bench"])
def test_twin_a_provider_that_can_be_used_goes_on_to_the_model(verb: str, folder: Path) -> None:
    with pytest.raises((LoraFxError, AssertionError), match=r"the model is made|m\.onnx"):
        VERBS[verb]("cpu")


def test_a_merge_that_runs_nothing_has_no_provider_to_check(folder: Path) -> None:
    with pytest.raises(LoraFxError, match="provider"):
        lora_fx.merge("m.onnx", [], "o.onnx", provider="cuda")


def test_libraries_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ort.InferenceSession
    monkeypatch.setattr(sessions, "driver_present", lambda: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, providers: own(model, options)
    )
    with pytest.raises(LoraFxError, match="cannot be used: its libraries did not load"):
        check_provider("cuda")


def test_torch_is_not_imported(folder: Path) -> None:
    """The commands as a user runs them, on a machine with the driver or without."""
    code = f"""
import sys
from lora_fx.onnx import session
session.driver_present = lambda: False
from lora_fx.cli import main
try:
    main({[*COMMANDS["export"].split(), "--provider", "cuda"]!r})
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert result.stdout.splitlines()[-1:] == ["2 False"], result.stderr
