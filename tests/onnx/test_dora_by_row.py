"""Mode batch with DoRA: every form of a use, row by row, against m/‖V‖·V by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import rel
from lora_fx.onnx.adapter_buffers import AdapterBuffers
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import Manifest, SwitchSlot
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.targets.target import Target
from tests.onnx.test_batch_forms import (
    REFUSE_AN_EMPTY_BATCH,
    STACKS,
    Attention,
    W,
    left,
)
from tests.passes.test_variants import by_hand
from tests.table import ROWS


class Flattened(nn.Linear):
    """A layer over rows that are flattened to [batch · length, in]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[1]))


class Looked(nn.Embedding):
    """A lookup of a table that is made of the input."""

    def __init__(self) -> None:
        super().__init__(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.abs().mul(4).long().clamp(0, 8))


FORMS = {
    **STACKS,
    "a layer of one position": (lambda: nn.Linear(6, 4), (3, 6)),
    "flattened rows": (lambda: Flattened(6, 4), (2, 7, 6)),
    "a lookup": (Looked, (2, 7)),
}
TRANSPOSED = [name for name in FORMS if name.startswith(("a transposed", "strides"))]


def dora(target: Target, stored: np.ndarray, seed: int, rank: int) -> LowRank:
    """A random update, with lengths of rows that are not those of W."""
    a, b = draw(target.key, target.layout, rank, seed, "probe")
    rng = np.random.default_rng(seed)
    shape = (*target.layout.batch_shape, target.layout.out_size)
    sizes = rng.uniform(0.7, 1.5, shape).astype(np.float32)
    sizes *= np.sqrt(np.mean(np.square(stored)) * target.layout.in_size)
    return LowRank(a, 0.5 * b, 2.0, target.layout, magnitude=sizes)


def adapted(model: nn.Module, cap: Any) -> tuple[list[Adapter], list[np.ndarray]]:
    """DoRA, plain LoRA, and the weights with them in fp64."""
    stored = model.weight.detach().numpy()
    target = lora_fx.find(cap)["weight"]
    first = dora(target, stored, 1, 2)
    plain = replace(dora(target, stored, 2, 3), magnitude=None)
    adapters = [Adapter({"weight": first}), Adapter({"weight": plain})]
    return adapters, [by_hand(ROWS[0], target, low, stored) for low in (first, plain)]


@pytest.mark.parametrize(("target", "scales"), [("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("name", [name for name in FORMS if name not in TRANSPOSED])
def test_rows_of_dora(name: str, target: Any, scales: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = FORMS[name]
    model = make().eval()
    cap = lora_fx.capture(model, (torch.randn(shape),))
    adapters, new = adapted(model, cap)
    path = tmp_path / "b.onnx"
    lora_fx.export(
        cap, path, adapters=adapters, mode="batch", scales=scales, target=target, provider="cpu"
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)

    session = open_session(path, "cpu")
    x = torch.randn(4, *shape[1:])
    ids = np.array([1, 0, 2, 1])
    weights = np.array([0.5, 1.0, 1.5, 1.0], np.float32)
    feeds: dict[str, Any] = {session.input_names[0]: x.numpy(), "adapter_ids": ids}
    if scales:
        feeds["adapter_scales"] = weights
    (y,) = session.run(feeds).values()
    stored = model.weight.detach().double().numpy().copy()
    for row, number in enumerate(ids):
        weight = stored
        if number:
            strength = float(weights[row]) if scales else 1.0
            weight = stored + strength * (new[number - 1] - stored)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weight))
            expected = model(x[row : row + 1])
        assert rel(y[row], expected[0].numpy()) < 2e-6, row

    if name not in REFUSE_AN_EMPTY_BATCH:
        (nothing,) = session.run({name: value[:0] for name, value in feeds.items()}).values()
        assert nothing.shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_is_refused(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = FORMS[name]
    model = make().eval()
    cap = lora_fx.capture(model, (torch.randn(shape),))
    adapters, _ = adapted(model, cap)
    with pytest.raises(LoraFxError, match="adds up what several rows of its weight give"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=adapters, mode="batch")
    for mode in ("switch", "load"):
        (tmp_path / mode).mkdir()
        assert lora_fx.export(cap, tmp_path / mode / "m.onnx", adapters=adapters, mode=mode)


def test_a_weight_on_the_left(tmp_path: Path) -> None:
    path = left(tmp_path)
    (target,) = find(OnnxGraph(load(path))).targets
    low = dora(target, W, 1, 2)
    out = tmp_path / "b.onnx"
    lora_fx.export(path, out, adapters=[Adapter({"w": low})], mode="batch", provider="cpu")
    x = np.random.default_rng(1).standard_normal((3, 6, 4)).astype(np.float32)
    y = open_session(out, "cpu").run({"x": x, "adapter_ids": np.array([1, 0, 1])})["y"]
    new = by_hand(ROWS[0], target, low, W)
    for row, weight in enumerate((new, W, new)):
        assert rel(y[row], weight @ x[row]) < 1e-6


@pytest.mark.parametrize("mode", ["batch", "switch"])
def test_rows_that_are_innermost(mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_fx.capture(Attention().eval(), (torch.randn(3, 5, 8),))
    lows = {}
    for target in lora_fx.find(model).targets:
        stored = model.model.get_parameter(target.parameter.name).detach().numpy()
        lows[target.key] = dora(target, stored, 1, 2)
    assert "attention.out_proj.weight" in lows
    assert lora_fx.export(model, tmp_path / "b.onnx", adapters={"a": Adapter(lows)}, mode=mode)


def test_buffers_of_cuda_graphs_hold_factors_of_rows() -> None:
    slot = SwitchSlot("w.lora_A", "w.lora_B", 4, 3, rank=1, d="w.lora_D", weight="0")
    buffers = AdapterBuffers(Manifest({"w": slot}), 2, "cpu")
    d = np.array([0.5, 0.0, -0.25], np.float32)
    tensors = {
        "w.lora_A": np.ones((4, 1), np.float32), "w.lora_B": np.ones((1, 3), np.float32),
        "w.lora_D": d,
    }  # fmt: skip
    buffers.write(tensors)
    assert np.array_equal(buffers.values["w.lora_D"].numpy(), d)
    assert buffers.values["w.lora_A"].numpy().shape == (4, 2)
    buffers.write({name: tensors[name] for name in ("w.lora_A", "w.lora_B")})
    assert not buffers.values["w.lora_D"].numpy().any()
