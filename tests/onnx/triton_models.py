"""A model and its exports into repositories, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from tests.zoo.shared import captured

IDS = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Outputs of rank 2, 3 and 0, rows independent of one another but in `loss`."""

    def __init__(self, scalar: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scalar = scalar
        self.embed = nn.Embedding(30, 12, dtype=dtype)
        self.fc = nn.Linear(12, 7, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc(torch.tanh(self.embed(ids)))
        rest = {"loss": y.mean()} if self.scalar else {}
        return {"logits": y, "pooled": y.mean(1), **rest}


def adapter(seed: int, rank: int = 3) -> Adapter:
    r = np.random.default_rng(seed)
    a, b = (r.standard_normal(s).astype(np.float32) for s in ((rank, 12), (7, rank)))
    return Adapter({"fc.weight": LowRank(a, b, 0.7)})


def export(path: Path, triton: Path, net: Any = None, **options: Any) -> Any:
    given = {"provider": "cpu", "triton": triton, **options}
    if net is None:
        return lora_fx.export(
            captured("triton net", lambda: (Net().eval(), (IDS,)))[0], path, **given
        )
    return lora_fx.export(net.eval(), path, (IDS,), **given)


def folders(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
