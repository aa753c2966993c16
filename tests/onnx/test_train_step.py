"""Mode train: twenty steps in ONNX Runtime are those of torch.optim on the adapted module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.objective import scores_of
from lora_fx.fx.train.step import dropped
from lora_fx.onnx import Session, TrainSession
from lora_fx.passes.proofs.parity import arrays_of
from tests.zoo.models import ZOO

LR, STEPS, CLIP = 2e-3, 20, 0.1


class Mlp(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop = nn.Linear(8, 12), nn.LayerNorm(12), nn.Dropout(p)
        self.b = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


class Convolutions(nn.Module):
    """Strides that leave a rest, groups, dilation, a transposed one, a batch norm, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, (3, 2), groups=2, padding=1, dilation=(1, 2))
        self.c = nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.norm(self.a(x))), 2)
        return self.head(F.silu(self.c(self.b(h))).mean((2, 3)))


class Raw(nn.Module):
    """Bare products, an einsum, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.w = nn.Parameter(torch.randn(8, 6) * 0.4)
        self.u = nn.Parameter(torch.randn(6, 2, 5) * 0.4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.einsum("bsd,dhe->bshe", torch.tanh(self.table(ids) @ self.w), self.u)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        for name, held in vars(m).items():
            if isinstance(held, float) and (
                "drop" in name or (name == "p" and "Drop" in type(m).__name__)
            ):
                setattr(m, name, 0.0)
    return model


def zoo(name: str) -> Callable[[], tuple[Any, ...]]:
    def build() -> tuple[Any, ...]:
        model, args, kwargs = ZOO[name].build()
        return without_dropout(model), args, kwargs

    return build


MODELS: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "mlp": (lambda: (Mlp(), (torch.randn(3, 5, 8),)), {}),
    "products": (lambda: (Raw(), (torch.randint(0, 20, (3, 5)),)), {"include": "*"}),
    "convolutions": (lambda: (Convolutions(), (torch.randn(3, 3, 17, 20),)), {"include": "*"}),
    "lstm": (lambda: (Recurrent(), (torch.randn(3, 4, 6),)), {"static": ["x:1"]}),
    **{
        n: (zoo(n), {}) for n in ("hf_bert", "hf_gpt2", "hf_llama", "hf_t5", "hf_whisper", "hf_vit")
    },
}
FAST = ("mlp",)


def rows() -> list[Any]:
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=n) for n in MODELS]


def batches(module: Any, own: bool) -> Iterator[dict[str, Any]]:
    """Arguments with labels, at two batch sizes in turn."""
    sizes = [module.sample(size) for size in ((2, 5), (4, 7))]
    module.eval()
    for i in range(STEPS):
        named = sizes[i % 2]
        with torch.no_grad():
            scores = scores_of(module(**named))
        g = torch.Generator().manual_seed(i)
        labels = torch.randint(0, scores.shape[-1], scores.shape[:-1], generator=g)
        yield {**named, "labels": labels}


def loss_in_torch(module: Any, batch: dict[str, Any], own: bool) -> Tensor:
    if own:
        found: Tensor = module(**batch).loss
        return found
    batch = dict(batch)
    labels = batch.pop("labels")
    return F.cross_entropy(scores_of(module(**batch)).flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("name", rows())
def test_steps_equal_those_of_torch(tmp_path: Path, name: str) -> None:
    build, options = MODELS[name]
    model, args, kwargs = (*build(), {})[:3]
    cap = lora_fx.capture(model, args, kwargs, static=options.get("static", ()))
    module = lora_fx.insert(cap, rank=3, alpha=4.5, include=options.get("include"))
    own = "labels" in cap.signature.keywords
    path = tmp_path / "step.onnx"
    report = lora_fx.export(module, path, mode="train", provider="cpu", clip=CLIP)
    assert {p.of for p in report.parity} == {"base", "random", "step"}
    session = TrainSession(path, LR, "cpu")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    for batch in batches(module, own):
        got = session.step(arrays_of(batch))
        module.train()
        loss = loss_in_torch(module, batch, own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        module.eval()
        assert got == pytest.approx(float(loss.detach()), rel=1e-5)
    ours, theirs = session.adapter(), module.adapter()
    for key, u in theirs.lowrank.items():
        np.testing.assert_allclose(ours.lowrank[key].a, u.a, atol=1e-4)
        np.testing.assert_allclose(ours.lowrank[key].b, u.b, atol=1e-4)
        assert np.abs(u.b).max() > 5e-3
    inputs = module.sample((2, 5))
    forward = Session(tmp_path / "step.switch.onnx", "cpu")
    forward.load("trained", ours)
    expected = module.flat(inputs)
    for name, value in forward.run(arrays_of(inputs), adapter="trained").items():
        np.testing.assert_allclose(value, expected[name], atol=1e-3 * np.abs(expected[name]).max())
    base = sum(p.nbytes for p in {id(p): p for p in cap.model.parameters()}.values())
    base += sum(b.nbytes for b in cap.model.buffers())
    assert (tmp_path / "step.onnx.data").stat().st_size <= 1.02 * base + 4096
    graph = onnx_ir.load(tmp_path / "step.onnx").graph
    assert [n for n, v in graph.initializers.items() if not v.uses()] == []


def test_numbers_of_a_step_by_hand(tmp_path: Path) -> None:
    """SGD on y = x·(W + s·b·a)ᵀ with mse: gradients in fp64, by their formulas."""
    torch.manual_seed(1)
    model = nn.Linear(5, 3, bias=False)
    path = tmp_path / "s.onnx"
    module = lora_fx.insert(model, (torch.randn(4, 5),), rank=2, alpha=5.0)
    lora_fx.export(
        module, path, mode="train", provider="cpu", loss="mse", optimizer="sgd", weight_decay=0.1,
        clip=0,
    )  # fmt: skip
    start = module.adapter()
    (key,) = start
    low = start.lowrank[key]
    b = np.random.default_rng(0).standard_normal(low.b.shape).astype(np.float32)
    session = TrainSession(path, 0.3, "cpu", adapter=Adapter({key: replace(low, b=b)}))
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    labels = np.random.default_rng(2).standard_normal((7, 3)).astype(np.float32)
    a64, b64, x64 = (v.astype(np.float64) for v in (low.a, b, x))
    y = x64 @ (model.weight.detach().double().numpy() + 2.5 * b64 @ a64).T
    error = 2 * (y - labels) / y.size
    loss = session.step({"input": x, "labels": labels})
    assert loss == pytest.approx(((y - labels) ** 2).mean(), rel=1e-6)
    wanted = 2.5 * error.T @ x64
    got = session.adapter().lowrank[key]
    np.testing.assert_allclose(got.a, a64 - 0.3 * (b64.T @ wanted + 0.1 * a64), atol=2e-6)
    np.testing.assert_allclose(got.b, b64 - 0.3 * (wanted @ a64.T + 0.1 * b64), atol=2e-6)


def test_dropout_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """A share p is dropped, other places for other seeds, and the mean stays."""
    x = torch.ones(50, 40, 30)
    one, again, other = (dropped(x, 0.3, torch.tensor(s), 2) for s in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)
    for made in (one, other, dropped(x, 0.3, torch.tensor(5), 3)):
        assert sorted(made.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
        for axes in ((1, 2), (0, 2), (0, 1)):
            kept = (made > 0).double().mean(axes)
            assert float((kept - 0.7).abs().max()) < 5 * (0.21 / (x.numel() / len(kept))) ** 0.5
    both = ((one > 0) & (other > 0)).double().mean()
    assert float(both) == pytest.approx(0.49, abs=0.02)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "half": (lambda: Mlp().bfloat16(), {}, "'a.weight' is bfloat16; a step is made of float32"),
    "codes": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, quantise="int8"), {},
        "'a.weight' is quantised: a step computes gradients in float32 alone",
    ),
    "whole": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, also_train="b.bias"), {},
        "'b.bias' is trained whole; a step trains low-rank updates",
    ),
    "dora": (
        lambda: lora_fx.insert(Mlp(), (torch.randn(3, 5, 8),), rank=2, variant="dora"), {},
        "'a.weight' is DoRA",
    ),
    "length": (
        lambda: lora_fx.capture(Recurrent(), (torch.randn(3, 4, 6),)), {},
        "'x': dimension 1 is free, and aten.lstm.input has a step for one size only",
    ),
    "loss": (Mlp, {"loss": "huber"}, "no loss 'huber'"),
    "optimizer": (Mlp, {"optimizer": "lion"}, "no optimizer 'lion'"),
    "clip": (Mlp, {"clip": -1.0}, "clip -1.0 is not 0 or more"),
    "mode": (Mlp, {"mode": "switch", "clip": 2.0}, "mode switch would ignore what is for mode tr"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "length")) for n in REFUSED]
)
def test_what_has_no_step_is_refused_by_name(tmp_path: Path, name: str) -> None:
    build, options, words = REFUSED[name]
    model = build()
    dtype = torch.bfloat16 if name == "half" else torch.float32
    args = (torch.randn(3, 5, 8, dtype=dtype),) if isinstance(model, Mlp) else ()
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(
            model, tmp_path / "s.onnx", args, provider="cpu", **{"mode": "train", **options}
        )
    assert words in caught.value.message and caught.value.hint
    assert list(tmp_path.iterdir()) == []
