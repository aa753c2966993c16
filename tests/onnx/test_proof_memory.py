"""What is in memory while a file is proven: its own pages, and neither packed nor folded copies."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.onnx.session import open_session
from lora_fx.passes.verbs import export_merged

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
PREPACKING = "session.disable_prepacking"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 24, dtype=torch.bfloat16)
        self.down = nn.Linear(24, 16, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def exported(path: Path, mode: str, **options: Any) -> Any:
    captured = lora_fx.capture(Net().eval(), (X.to(torch.bfloat16),))
    entries = {}
    for target in lora_fx.find(captured).targets:
        a, b = draw(target.key, target.layout, 2, 1, "probe")
        entries[target.key] = LowRank(a, b, 1.0, target.layout)
    adapter = Adapter(entries)
    adapters: Any = adapter if mode == "merged" else {"first": adapter, "second": adapter}
    given = {"adapters": adapters, "mode": mode, "provider": "cpu", **options}
    return lora_fx.export(captured, path, **given)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the runtime may pack weights, of every session that is made of an output."""
    packs: list[bool] = []
    session = ort.InferenceSession

    def opened(path: str, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        if Path(path).stem in ("m", "q"):
            try:
                packs.append(options.get_session_config_entry(PREPACKING) != "1")
            except RuntimeError:  # it has no such entry
                packs.append(True)
        return session(path, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    return packs


@pytest.mark.parametrize("mode", ["merged", "switch", "batch", "load"])
def test_no_proof_packs_the_weights_of_a_data_file(
    mode: str, tmp_path: Path, packing: list[bool]
) -> None:
    path = tmp_path / "m.onnx"
    exported(path, mode, external_over=100)
    assert packing and not any(packing)
    packing.clear()
    if mode == "merged":
        assert lora_fx.verify(path, path, provider="cpu")
        assert packing and not any(packing)
        packing.clear()
        open_session(path, "cpu")  # a user's own, for many runs
        assert packing == [True]


def test_codes_and_weights_in_the_file_are_packed(tmp_path: Path, packing: list[bool]) -> None:
    """Products over packed codes have another kernel: the one that a user's session runs."""
    exported(tmp_path / "m.onnx", "merged")
    assert packing and all(packing)
    packing.clear()
    exported(tmp_path / "q.onnx", "switch", external_over=100, quantise="int8")
    assert packing and all(packing)


def test_folded_weights_are_gone_before_the_file_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    def opened(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
        alive.append(len({x.data_ptr() for x in tensors if x.shape == (24, 16)} - {0}))
        return open_session(*arguments, **options)

    monkeypatch.setattr(export_merged, "open_session", opened)
    exported(tmp_path / "m.onnx", "merged", external_over=100)
    assert alive == [1], "that of the model, and no folded one"


def test_the_exporter_keeps_no_graph(tmp_path: Path) -> None:
    """onnxscript's rules are global, and refer to the graph that they were last tried on."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, ir.Graph)}
    exported(tmp_path / "m.onnx", "merged")
    gc.collect()
    assert not [
        x for x in gc.get_objects() if isinstance(x, ir.Graph) and id(x) not in before and len(x)
    ]
