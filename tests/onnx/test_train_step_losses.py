"""Mode train with losses that hold tensors: weights of classes, pos_weight, tables of costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.onnx import TrainSession
from tests.zoo.shared import captured

WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0])
COSTS = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
KEPT = torch.tensor([True, True, True, False])
CLASSES, FRACTIONS = torch.tensor([0, 3, 1, 2, 3]), torch.linspace(0, 1, 20).reshape(5, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Focal:
    """Weights of classes and an exponent, in an object."""

    def __init__(self) -> None:
        self.weight, self.gamma = WEIGHT, torch.tensor(2.0)

    def __call__(self, out: Tensor, labels: Tensor) -> Tensor:
        likely = F.log_softmax(out, -1).gather(1, labels[:, None])[:, 0]
        return -(self.weight[labels] * (1 - likely.exp()) ** self.gamma * likely).mean()


def made_inside(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out, labels, torch.tensor([1.0, 2.0, 0.5, 3.0]))


LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, bool]] = {
    "weights of classes": (lambda y, t: F.cross_entropy(y, t, WEIGHT), CLASSES, True),
    "a module": (nn.CrossEntropyLoss(WEIGHT), CLASSES, True),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), FRACTIONS, True),
    "weight and pos_weight": (
        nn.BCEWithLogitsLoss(weight=WEIGHT / 3, pos_weight=WEIGHT), FRACTIONS, True,
    ),
    "focal": (Focal(), CLASSES, True),
    "made inside": (made_inside, CLASSES, True),
    "costs": (lambda y, t: (y.softmax(-1) * COSTS[t]).sum(-1).mean(), CLASSES, True),
    "wide": (lambda y, t: F.cross_entropy(y.double(), t, WEIGHT.double()).float(), CLASSES, True),
    "truths": (lambda y, t: F.cross_entropy(y.where(KEPT, -9.0), t.clamp(max=2)), CLASSES, True),
    "of the mean": (lambda y, t: F.mse_loss(y * WEIGHT, t * WEIGHT), FRACTIONS, True),
    "no tensor": (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1), CLASSES, False),
    "no tensor, fractions": (lambda y, t: F.huber_loss(y, t), FRACTIONS, False),
}  # fmt: skip
FAST = ("weights of classes", "pos_weight", "focal", "made inside", "no tensor, fractions")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LOSSES]
)
def test_a_step_is_that_of_torch(name: str, tmp_path: Path) -> None:
    loss, labels, holds = LOSSES[name]
    cap, *_ = captured("step losses", lambda: (Net().eval(), (torch.randn(3, 6),)))
    module = lora_fx.insert(cap, rank=2)
    path = tmp_path / "step.onnx"
    lora_fx.export(module, path, mode="train", loss=loss, provider="cpu", clip=0, optimizer="sgd")
    session = TrainSession(path, 0.5, "cpu")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, weight_decay=0.01)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    seen = []
    for _ in range(3):
        value: Any = loss(module(x), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(session.step({"x": x.numpy(), "labels": labels.numpy()}))
        assert seen[-1] == pytest.approx(float(value.detach()), rel=1e-5)
    assert abs(seen[0] - seen[-1]) > 1e-3
    ours = session.adapter().lowrank
    for key, u in module.adapter().lowrank.items():
        np.testing.assert_allclose(ours[key].b, u.b, atol=1e-5)
    # what the loss holds is in the file once, and what a loss without tensors has there is nothing
    names = [n for n in onnx_ir.load(path).graph.initializers if n.startswith("loss.constant")]
    assert bool(names) == holds or name == "wide"
