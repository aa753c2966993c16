"""ce where a label stands for a token, a pixel or a voxel: which axis of scores has the classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.loss import class_axis, loss_function
from lora_fx.fx.train.settings import Settings

TAKEN = [
    # scores, labels, the axis of the classes
    ((6, 5), (6,), 1),
    ((6, 5), (6, 1), 1),
    ((3, 7, 5), (3, 7), 2),
    ((3, 5, 7), (3, 7), 1),  # as torch has them
    ((3, 7, 7), (3, 7), 2),  # as language models have them
    ((3, 4, 6, 8), (3, 6, 8), 1),
    ((3, 4, 6, 8), (3, 1, 6, 8), 1),
    ((3, 6, 8, 4), (3, 6, 8), 3),
    ((2, 4, 3, 5, 6), (2, 3, 5, 6), 1),
    ((2, 4, 4, 5), (2, 4, 5), 1),
]


@pytest.mark.parametrize(("scores", "labels", "axis"), TAKEN)
def test_the_axis_of_the_classes(
    scores: tuple[int, ...], labels: tuple[int, ...], axis: int
) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(scores, generator=g)
    t = torch.randint(0, scores[axis], labels, generator=g)
    t.view(-1)[0] = -100
    spots = [n for d, n in enumerate(scores) if d != axis]
    want = F.cross_entropy(y.movedim(axis, 1), t.reshape(spots))
    compute, _ = loss_function("ce", "labels", lambda name: False)
    assert compute(y, t) == pytest.approx(float(want), rel=1e-6)


REFUSED = [
    (
        (3, 4, 6, 8),
        (3, 12, 16),
        "the axis of the classes is unknown",
    ),  # scores of a quarter of the pixels
    ((3, 4, 6, 8), (3,), "the axis of the classes is unknown"),
    ((3, 5, 5, 5), (3, 5, 5), "the axis of the classes is unknown"),
    ((6, 5), (7,), "the axis of the classes is unknown"),
    ((3, 7, 5), (3, 8), "the axis of the classes is unknown"),
    ((3, 4, 6, 8), (3, 8, 6), "the axis of the classes is unknown"),
]


@pytest.mark.parametrize(("scores", "labels", "said"), REFUSED)
def test_shapes_that_do_not_fit_are_one_line(
    scores: tuple[int, ...], labels: tuple[int, ...], said: str
) -> None:
    compute, _ = loss_function("ce", "labels", lambda name: False)
    with pytest.raises(LoraFxError, match=said) as found:
        compute(torch.zeros(scores), torch.zeros(labels, dtype=torch.int64))
    assert str(list(scores)) in found.value.message and str(list(labels)) in found.value.message
    assert class_axis(torch.zeros(scores), torch.zeros(labels)) is None


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.full((3, 6, 8), 4), "label 4, but the model scores 4 classes"),
        (torch.full((3, 6, 8), 255), "label 255, but"),
        (torch.zeros(3, 6, 8), "the labels are fractions"),
        (torch.zeros(3, 4, 6, 8), "the labels are fractions"),
    ],
)
def test_labels_that_are_no_class(labels: Tensor, said: str) -> None:
    compute, _ = loss_function("ce", "labels", lambda name: False)
    with pytest.raises(LoraFxError, match=said):
        compute(torch.zeros(3, 4, 6, 8), labels)


class Segments(nn.Module):
    """Scores [rows, classes, height, width], and no loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def images(rows: int = 13) -> Table:
    """Labels of pixels, of which the first rows are ignored, more of some images than of others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 3, 6, 8)).astype(np.float32)
    mask = (np.abs(x).argmax(1) + (x[:, 0] > 1)).astype(np.int64)
    for i in range(rows):
        mask[i, : i % 5] = -100
    return Table({"x": x, "mask": mask}, "mask")


def test_pixels_are_trained_on() -> None:
    model = lora_fx.insert(Segments().eval(), (torch.randn(2, 3, 6, 8),), rank=2, include="*")
    data = images()
    x, mask = (torch.from_numpy(data.columns[n]) for n in ("x", "mask"))
    before = F.cross_entropy(model(x), mask)
    settings = Settings(steps=60, lr=3e-2, batch_size=13, checks=2)
    report = fit(model, data, data, settings=settings)
    assert report.before == pytest.approx(float(before.detach()), abs=1e-5)
    assert report.losses[0] == pytest.approx(report.before, abs=1e-5)
    assert report.losses[-1] < 0.9 * report.losses[0]
    parts = lora_fx.insert(Segments().eval(), (torch.randn(2, 3, 6, 8),), rank=2, include="*")
    cut = fit(parts, data, settings=replace(settings, steps=5, accumulate=4))
    assert cut.losses == pytest.approx(fit_again(data, settings), abs=1e-6)


def fit_again(data: Table, settings: Settings) -> list[float]:
    model = lora_fx.insert(Segments().eval(), (torch.randn(2, 3, 6, 8),), rank=2, include="*")
    return fit(model, data, settings=replace(settings, steps=5)).losses
