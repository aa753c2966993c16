"""Batch mode of uses that few models have: a weight on the left, and names that are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find

W = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


def left(folder: Path, name: str = "x") -> Path:
    """A file y = W @ x, x [batch, 6, n]."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[batch, 6, n] {name}) => (float[batch, 5, n] y) <float[5, 6] w> {{
        y = MatMul(w, {name})
    }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def adapters(path: Path) -> list[Adapter]:
    """Two adapters of the file's one weight, of different ranks."""
    (target,) = find(OnnxGraph(load(path))).targets
    result = []
    for seed, rank in ((1, 2), (2, 3)):
        a, b = draw(target.key, target.layout, rank, seed, "probe")
        result.append(Adapter({target.key: lora_fx.LowRank(a, b, 2.0, target.layout)}))
    return result


def test_a_weight_on_the_left(tmp_path: Path) -> None:
    path = left(tmp_path)
    one, two = adapters(path)
    out = tmp_path / "b.onnx"
    lora_fx.export(path, out, adapters=[one, two], mode="batch", provider="cpu")
    x = np.random.default_rng(1).standard_normal((3, 6, 4)).astype(np.float32)
    feeds: dict[str, Any] = {"x": x, "adapter_ids": np.array([2, 0, 1])}
    y = open_session(out, "cpu").run(feeds)["y"]
    for row, adapter in enumerate((two, None, one)):
        weight = W.astype(float)
        if adapter is not None:
            weight = weight + adapter.deltas()["w"]
        assert rel(y[row], weight @ x[row]) < 1e-6


def test_an_input_that_has_the_name_of_ours(tmp_path: Path) -> None:
    path = left(tmp_path, "adapter_ids")
    with pytest.raises(LoraFxError, match="the model has an input 'adapter_ids' already"):
        lora_fx.export(path, tmp_path / "b.onnx", adapters=adapters(path), mode="batch")


class Attention(nn.Module):
    """Attention whose rows are innermost, [length · batch, in], before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


def test_rows_that_are_innermost_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_fx.capture(Attention().half().eval(), (torch.randn(3, 5, 8).half(),))
    lows = {}
    for target in lora_fx.find(model).targets:
        a, b = draw(target.key, target.layout, 2, 1, "probe")
        lows[target.key] = lora_fx.LowRank(a, b, 2.0, target.layout)
    assert "attention.out_proj.weight" in lows
    out = tmp_path / "b.onnx"
    assert lora_fx.export(model, out, adapters=[Adapter(lows)], mode="batch", provider="cpu")


class Experts(nn.Module):
    """Experts that all see every token, whose rows are flattened into one axis, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1).expand(3, -1, -1)
        return torch.bmm(tokens, self.weight).mean(0).view(x.shape[0], x.shape[1], 5)


class HeadExperts(nn.Module):
    """A matrix for each head, [batch, head, length, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (3, 2)).transpose(1, 2)
        return torch.tanh(heads @ self.weight)


class AfterGroupNorm(nn.Conv2d):
    """A convolution after a norm that is exported as Reshapes to its groups and back."""

    def __init__(self) -> None:
        super().__init__(6, 4, 3)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(input))


STACKS = {
    "a convolution after a group norm": (AfterGroupNorm, (2, 6, 7, 5)),
    "experts that see all tokens": (Experts, (2, 4, 6)),
    "a matrix for each head": (HeadExperts, (2, 4, 6)),
    "a transposed convolution": (lambda: nn.ConvTranspose1d(6, 5, 3), (2, 6, 7)),
    "strides, pads and dilations": (
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=2, padding=1, output_padding=1,
                                   dilation=(1, 2)),
        (2, 4, 5, 6),
    ),
    "a transposed one of one place": (lambda: nn.ConvTranspose1d(6, 5, 1), (2, 6, 7)),
    "a transposed one with groups": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (2, 6, 4, 5),
    ),
    "a convolution with groups": (
        lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 7, 5),
    ),
    "groups of one place": (lambda: nn.Conv1d(6, 4, 1, groups=2), (2, 6, 7)),
    "a convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 7, 5)),
    "a layer": (lambda: nn.Linear(6, 4, bias=False), (2, 7, 6)),
}  # fmt: skip
REFUSE_AN_EMPTY_BATCH = ("a convolution after a group norm", "a matrix for each head")
"""Those whose export without adapters refuses one too."""


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_and_transposed_convolutions(
    name: str, target: Any, scales: bool, tmp_path: Path
) -> None:
    """Against the module with W + s·BA written into it, row by row."""
    torch.manual_seed(0)
    make, shape = STACKS[name]
    model = make().eval()
    cap = lora_fx.capture(model, (torch.randn(shape),))
    adapters = []
    for seed, rank in ((1, 2), (2, 3)):
        lows = {}
        for found in lora_fx.find(cap).targets:
            a, b = draw(found.key, found.layout, rank, seed, "probe")
            lows[found.key] = lora_fx.LowRank(a, b, 2.0, found.layout)
        adapters.append(Adapter(lows))
    path = tmp_path / "b.onnx"
    lora_fx.export(
        cap, path, adapters=adapters, mode="batch", scales=scales, target=target, provider="cpu"
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)

    session = open_session(path, "cpu")
    x = torch.randn(4, *shape[1:])
    ids = np.array([2, 0, 1, 2])
    weights = np.array([0.5, 1.0, 1.5, 1.0], np.float32)
    feeds: dict[str, Any] = {session.input_names[0]: x.numpy(), "adapter_ids": ids}
    if scales:
        feeds["adapter_scales"] = weights
    (y,) = session.run(feeds).values()
    stored = model.weight.detach().clone()
    for row, number in enumerate(ids):
        weight = stored.double()
        if number:
            (delta,) = adapters[number - 1].deltas().values()
            weight = weight + torch.from_numpy(delta) * float(weights[row] if scales else 1)
        with torch.no_grad():
            model.weight.copy_(weight)
            expected = model(x[row : row + 1])
        assert rel(y[row], expected[0].numpy()) < 2e-6, row

    if name not in REFUSE_AN_EMPTY_BATCH:
        (nothing,) = session.run({name: value[:0] for name, value in feeds.items()}).values()
        assert nothing.shape == (0, *y.shape[1:])
