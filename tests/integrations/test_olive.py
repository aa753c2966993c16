"""Olive itself, where it is installed: a workflow with our pass gives the file that export gives.

`pip install olive-ai`; it is in no extra of lora-fx.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.onnx import Session

pytest.importorskip("olive")

SCRIPT = """
import torch
from torch import nn


def load(path):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def example(model):
    return torch.linspace(-1, 1, 12).reshape(2, 6)
"""


def run(*argv: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_workflow_that_inserts_exports_and_runs(tmp_path: Path) -> None:
    """From a PyTorch model and from an ONNX model, in mode switch, with two adapters."""
    (tmp_path / "model.py").write_text(SCRIPT)
    scope: dict[str, object] = {}
    exec(SCRIPT, scope)
    net, x = scope["load"](""), scope["example"](None)
    adapters = {}
    for seed, name in enumerate(("french", "german")):
        model = lora_fx.insert(net, (x,), rank=2, include="*", seed=seed)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.1)
        lora_fx.save_adapter(model.adapter(), tmp_path / name)
        adapters[name] = str(tmp_path / name)
    (tmp_path / "package.json").write_text(run("-m", "lora_fx.integrations.olive", folder=tmp_path))

    torch_model = {
        "type": "PyTorchModel", "model_script": "model.py", "model_loader": "load",
        "dummy_inputs_func": "example",
    }  # fmt: skip
    lora_fx.export(net, tmp_path / "base.onnx", (x,))
    onnx_model = {"type": "ONNXModel", "model_path": "base.onnx"}
    for number, source in enumerate((torch_model, onnx_model)):
        out = f"out{number}"
        workflow = {
            "input_model": source,
            "passes": {"export": {"type": "LoraFxExport", "mode": "switch", "adapters": adapters}},
            "output_dir": out, "cache_dir": f"cache{number}",
        }  # fmt: skip
        (tmp_path / "workflow.json").write_text(json.dumps(workflow))
        run(
            "-m", "olive", "run", "--config", "workflow.json", "--package-config", "package.json",
            folder=tmp_path,
        )  # fmt: skip
        path = tmp_path / f"ours{number}" / "model.onnx"
        path.parent.mkdir()
        if number:
            lora_fx.export(tmp_path / "base.onnx", path, adapters=adapters, mode="switch")
        else:
            lora_fx.export(net, path, (x,), adapters=adapters, mode="switch")
        theirs = next((tmp_path / out).rglob("model.onnx"))
        assert theirs.read_bytes() == path.read_bytes()
        for name in adapters:
            file = f"{name}.onnx_adapter"
            assert (theirs.parent / file).read_bytes() == (path.parent / file).read_bytes()
        session = Session(theirs, provider="cpu")
        for name in adapters:
            session.load(name, theirs.parent / f"{name}.onnx_adapter")
        (source_name,) = (i.name for i in session.session.get_inputs() if "lora" not in i.name)
        outputs = [
            next(iter(session.run({source_name: x.numpy()}, adapter=adapter).values()))
            for adapter in (None, *adapters)
        ]
        assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(outputs))
