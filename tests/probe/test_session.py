"""A session that checks its base when it is made, and each adapter when it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import NoEffectError
from lora_fx.onnx import Session
from tests.probe.model import adapter, adapters, encoder, poisoned, scaled
from tests.probe.test_failures import change_weights, drawn


@pytest.fixture(scope="module", params=["switch", "load"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model, ids = encoder()
    path = folder / "m.onnx"
    lora_fx.export(model, path, (ids,), adapters=adapters(), mode=request.param)
    return path


def load(path: Path, name: str, given: Adapter | Path) -> None:
    """Load an adapter in the way of the file's mode, in a session that checks."""
    if Session(path).manifest.mode == "load":
        Session(path, adapter=given, check=True)
    else:
        Session(path, check=True).load(name, given)


def test_what_is_right_is_taken(file: Path) -> None:
    Session(file, check=True)
    load(file, "de", file.with_name("de.onnx_adapter"))


def test_another_base_is_refused(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "m.onnx", "layers.1.up_proj", drawn)
    Session(tmp_path / "m.onnx")
    with pytest.raises(NoEffectError, match="base: not the base that the file was made from"):
        Session(tmp_path / "m.onnx", check=True)


def test_another_adapter_under_a_name_is_refused(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    shutil.copy(file.with_name("fr.onnx_adapter"), tmp_path / "de.onnx_adapter")
    with pytest.raises(NoEffectError, match="de: the outputs are those of the adapter fr"):
        load(tmp_path / "m.onnx", "de", tmp_path / "de.onnx_adapter")


def test_a_later_adapter_has_to_take_effect(file: Path) -> None:
    load(file, "later", adapter(7))
    with pytest.raises(NoEffectError, match="no effect: the outputs are those of the base"):
        load(file, "later", scaled(0)(adapter(7)))
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(NoEffectError, match="outputs are not finite"),
    ):
        load(file, "later", poisoned(np.nan, "0.q_proj")(adapter(7)))


def test_a_file_without_a_probe_is_refused(tmp_path: Path) -> None:
    model, ids = encoder()
    lora_fx.export(model, tmp_path / "m.onnx", (ids,), mode="switch", probe="none")
    with pytest.raises(lora_fx.LoraFxError, match="it has no probe"):
        Session(tmp_path / "m.onnx", check=True)
