"""Parts along a free dimension, in a file: as torch's, at sizes that the example has not.

On 1358f462 the exporter refused those whose size is computed: "'NoneType' object has no attribute
'ndim'", from the value of a size that it does not know (ProphetNet's streams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.session import open_session

Cut = Callable[[Tensor, Tensor], Sequence[Tensor]]


class Streams(nn.Module):
    """Joins three streams along the steps, and takes them apart again."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut
        self.into = nn.Linear(6, 5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.into(x)
        joined = torch.cat([hidden, hidden * 2, hidden.flip(1) * 3], 1)
        return [self.out(part) for part in self.cut(joined, x)]


CUTS: dict[str, Cut] = {
    "chunk": lambda y, x: y.chunk(3, 1),
    "chunk from the end": lambda y, x: y.chunk(3, -2),
    "chunks of which the last is short": lambda y, x: y[:, 1:].chunk(2, 1),
    "split by a size": lambda y, x: y.split(x.shape[1], 1),
    "split by two sizes": lambda y, x: y.split(2 * x.shape[1], 1),
    "split by sizes": lambda y, x: y.split([x.shape[1], 2 * x.shape[1]], 1),
    "rows": lambda y, x: torch.cat([y, y]).chunk(2),
    "the twin: a fixed dimension": lambda y, x: [p.sum(1) for p in y.chunk(1, 2)],
}


@pytest.mark.parametrize("name", CUTS)
def test_parts_are_torchs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Streams(CUTS[name]).eval()
    assert lora_fx.export(model, tmp_path / "model.onnx", (torch.randn(2, 6, 6),))
    session = open_session(tmp_path / "model.onnx", "cpu")
    for rows, steps in ((2, 6), (3, 4), (1, 15)):
        x = torch.randn(rows, steps, 6)
        for got, want in zip(session.run({"x": x.numpy()}).values(), model(x), strict=True):
            assert rel(got, want.detach().numpy()) < 2e-6
