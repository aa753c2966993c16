"""The folder in which the mistakes are made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_fx
from lora_fx.formats.io import save_adapter
from tests.cli.test_cli import MODEL
from tests.mistakes.files import (
    FACTORIES,
    SHAPES,
    damaged_adapters,
    int8_base,
    onnx_file,
    unusual_data,
    updates,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who works with a model of two layers."""
    here = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    (here / "model.py").write_text(MODEL + FACTORIES)
    base = {k: rng.standard_normal(s).astype("f") for k, s in SHAPES.items()}
    save_file(base, here / "base.safetensors")
    tuned = {k: v + rng.standard_normal((len(v), 1)).astype("f") for k, v in base.items()}
    save_file(tuned, here / "tuned.safetensors")
    odd = here / "odd"
    odd.mkdir()
    save_file({"fc1.weight": tuned["fc1.weight"]}, odd / "part.safetensors")
    wide = {**tuned, "fc2.weight": np.ones((7, 12), "f")}
    save_file(wide, odd / "wide.safetensors")
    int8_base(here / "int8", base)
    save_adapter(updates(rng, SHAPES), here / "start")
    save_adapter(updates(rng, {"fc1.weight": (12, 7)}), here / "narrow")
    save_adapter(updates(rng, {**SHAPES, "fc7.weight": (5, 12)}), here / "longer")
    lora_fx.merge(here / "base.safetensors", [here / "start"], here / "taken.safetensors")
    onnx_file(here / "m.onnx", base)
    onnx_file(odd / "other_output.onnx", base, "scores")
    x = rng.standard_normal((40, 8)).astype("f")
    np.savez(here / "data.npz", x=x, labels=np.arange(40) % 5)
    np.savez(here / "inputs.npz", x=x)
    damaged_adapters(here / "start", odd)
    unusual_data(odd, x, np.arange(40) % 5)
    save_adapter(updates(rng, {"encoder.q.weight": (12, 8)}), odd / "other")
    (odd / "notes.txt").write_text("hello\n")
    (odd / "void").mkdir()
    (here / "misspelt.toml").write_text('[merge]\ndtpe = "fp32"\n')
    (here / "one.toml").write_text('[merge]\ndtype = "fp32"\n')
    save_adapter(updates(rng, SHAPES), here / "tilted")
    lora_fx.export(here / "m.onnx", here / "switch.onnx", mode="switch")
    lora_fx.export(here / "m.onnx", here / "batch.onnx", mode="batch", adapters=[here / "start"])
    return here


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which a row may change, as the current one."""
    here = tmp_path / "home"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    return here
