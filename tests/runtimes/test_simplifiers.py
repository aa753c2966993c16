"""onnxsim and onnxslim: a portable switch file stays one; what they take from others is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

import lora_fx
from lora_fx.compare import ORT_TOL
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter
from lora_fx.onnx import Session
from lora_fx.onnx.manifest import manifest_of
from tests.runtimes import environments, models, switch_files

pytestmark = pytest.mark.slow
TOOLS = ("onnxsim", "onnxslim")
SIMPLIFY = Path(__file__).parent / "in_simplifiers.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Portable files of a text and a vision model and one for the CPU, each simplified twice."""
    environments.environment("simplifiers")
    folder = tmp_path_factory.mktemp("files")
    for name in ("text", "vision"):
        subject = models.SUBJECTS[name]()
        switch_files.write(
            folder, name, subject.model, subject.adapters, subject.sizes, subject.outputs,
            args=subject.args, kwargs=subject.kwargs or None,
        )  # fmt: skip
    subject = models.text()
    lora_fx.export(
        subject.model, folder / "cpu.onnx", subject.args, subject.kwargs, mode="switch",
        provider="cpu",
    )  # fmt: skip
    paths = [folder / f"{name}.onnx" for name in ("text", "vision", "cpu")]
    nodes = json.loads(environments.run_in("simplifiers", SIMPLIFY, *paths))
    for tool in TOOLS:
        assert f"{tool}=={nodes[tool]}" in environments.requirements_of("simplifiers")
    assert all(after < before for before, after in (nodes[f"text.onnx.{tool}"] for tool in TOOLS))
    return folder


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", ["text", "vision"])
def test_a_portable_file_is_whole(folder: Path, name: str, tool: str) -> None:
    """Base, A and B are what they were, in a session of ours and by the file's own inputs."""
    path = folder / f"{name}.onnx.{tool}"
    before, after = manifest_of(folder / f"{name}.onnx"), manifest_of(path)
    assert before == after and after.required
    session = Session(path, "cpu")
    for which in switch_files.ADAPTERS:
        session.load(which, load_adapter(folder / f"{name}.{which}.safetensors"))
    for arrays in switch_files.stored(folder, name):
        for kind, adapter in {"base": None, "a": "a", "b": "b"}.items():
            outputs = session.run(arrays["in"], adapter)
            assert switch_files.worst(outputs, arrays[kind]) <= 2 * ORT_TOL


@pytest.mark.parametrize("tool", TOOLS)
def test_what_they_take_from_a_file_with_defaults_is_found(folder: Path, tool: str) -> None:
    for opened in (Session, manifest_of):
        with pytest.raises(LoraFxError, match=r"the graph has no '.*\.lora_A'") as error:
            opened(folder / f"cpu.onnx.{tool}")
        assert "another program has changed this one" in str(error.value.hint)


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a file, changed in the protobuf."""
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target
