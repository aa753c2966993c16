"""Where files and their data get their names, and options that a mode would ignore."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files import atomic
from lora_fx.onnx import output_file
from lora_fx.onnx.session import open_session

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 24, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def exported(path: Path, **options: Any) -> Any:
    return lora_fx.export(Net().eval(), path, (X,), provider="cpu", **options)


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("merged", {"include": "fc"}),
        ("merged", {"scales": True}),
        ("switch", {"optimise": True}),
        ("switch", {"scales": True}),
        ("batch", {"exclude": "fc"}),
        ("batch", {"optimise": True}),
    ],
)
def test_an_option_that_the_mode_ignores_is_refused(
    mode: str, option: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(LoraFxError, match=f"mode {mode} would ignore"):
        exported(tmp_path / "m.onnx", mode=mode, **option)
    assert not list(tmp_path.iterdir())


def test_data_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    """With --force too: a run that is killed between the two names must not mix two models."""
    path = tmp_path / "m.onnx"
    exported(path, external_over=100)
    first = (tmp_path / "m.onnx.data").read_bytes()
    report = exported(path, external_over=100, force=True)
    assert [Path(f).name for f in report.outputs] == ["m.onnx", "m.onnx.1.data"]
    assert (tmp_path / "m.onnx.data").read_bytes() == first
    stored = onnx.load(path, load_external_data=False).graph.initializer
    tensor = next(t for t in stored if len(t.dims) == 2)
    assert {e.key: e.value for e in tensor.external_data}["location"] == "m.onnx.1.data"
    open_session(path, "cpu").run({"x": X.numpy()})


def test_optimise_leaves_the_data_of_a_renamed_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "out.onnx", external_over=100)
    shutil.move(tmp_path / "out.onnx", tmp_path / "in.onnx")  # its data is out.onnx.data
    before = (tmp_path / "out.onnx.data").read_bytes()
    wanted = open_session(tmp_path / "in.onnx", "cpu").run({"x": X.numpy()})
    monkeypatch.setattr(output_file.Output.save, "__defaults__", (100, ()))
    report = lora_fx.export(
        tmp_path / "in.onnx", tmp_path / "out.onnx", optimise=True, provider="cpu", force=True
    )
    assert [Path(f).name for f in report.outputs] == ["out.onnx", "out.onnx.1.data"]
    assert (tmp_path / "out.onnx.data").read_bytes() == before
    for name in ("in", "out"):
        got = open_session(tmp_path / f"{name}.onnx", "cpu").run({"x": X.numpy()})
        assert all(np.array_equal(got[k], v) for k, v in wanted.items())


def test_a_failure_after_the_data_leaves_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = []
    swap = atomic._swap

    def failing(new: Path, target: Path, old: Path) -> None:
        if target.name == "m.onnx":
            raise OSError(28, "No space left on device")
        placed.append(target.name)
        swap(new, target, old)

    monkeypatch.setattr(atomic, "_swap", failing)
    with pytest.raises(LoraFxError):
        exported(tmp_path / "m.onnx", external_over=100)
    assert placed == ["m.onnx.data"]
    assert not list(tmp_path.iterdir())


def test_an_update_that_rounding_swallows_is_no_merge(tmp_path: Path) -> None:
    model = Net(torch.float16).eval()
    lora_fx.export(model, tmp_path / "base.onnx", (X.half(),), provider="cpu")
    a, b = np.full((1, 16), 1e-5, np.float32), np.full((24, 1), 1e-5, np.float32)
    tiny = Adapter({"fc.weight": LowRank(a, b, 1.0)})
    with pytest.raises(NoEffectError, match="no element of 1 tensor would change"):
        lora_fx.merge(tmp_path / "base.onnx", tiny, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["base.onnx"]
