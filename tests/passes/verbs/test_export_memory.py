"""The memory of an export, beside the file that it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


class Language(nn.Module):
    """A table, blocks without attention, and the table again as the head; in bfloat16."""

    def __init__(self, width: int, rows: int, blocks: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(blocks))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(x)))
        logits: torch.Tensor = x @ self.table.weight.T
        return logits


PEAK = """
import sys, torch
import lora_fx
from tests.anonymous_memory import watched
from tests.passes.verbs.test_export_memory import Language

def export(name, *sizes):
    torch.manual_seed(0)
    model = Language(*sizes).to(torch.bfloat16).eval()
    ids = torch.randint(0, sizes[1], (2, 5))
    module = lora_fx.insert(model, (ids,), rank=2)
    adapter = module.adapter()
    for update in adapter.lowrank.values():
        update.b[:] = .05
    del module
    path = f"{sys.argv[1]}/{name}.onnx"
    with watched() as grown:
        report = lora_fx.export(model, path, (ids,), adapters=adapter, external_over=0)
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    return (weights + grown.peak) / sum(report.details["files"].values())

export("small", 8, 16, 1)  # imports
print(export("large", 1024, 4000, 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_export_holds_no_second_model(tmp_path: Path) -> None:
    """Anonymous bytes, the model's own among them, beside the bytes of the float32 file.

    The model takes half of them in bfloat16 and the folded weights nearly as much; what the file
    has in float32 is in memory one tensor at a time, and ONNX Runtime reads the file's own pages.
    """
    run = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path)]
    share = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert share < 1.5
