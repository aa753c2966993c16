"""The memory of a run: exact at small sizes, and beside the peaks of real steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.fx.train import run_memory
from lora_fx.fx.train.loop import Settings, fit
from lora_fx.fx.train.objective import objective
from lora_fx.fx.train.step_memory import largest_batch, step_memory
from lora_fx.peak_memory import refusing
from lora_fx.progress import telling
from tests.fx.train.saved_bytes import saved_bytes

ROWS = 4


class Net(nn.Module):
    """Blocks of a wide and a narrow layer, which can be recomputed, and a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.layers = nn.ModuleList(nn.Sequential(*make) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        scores: torch.Tensor = self.head(x)
        return scores


def table(rows: int = 8, width: int = 64) -> Table:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, width)).astype(np.float32)
    return Table({"x": x, "y": generator.integers(0, 5, rows)}, "y")


def module_of(width: int = 64) -> Any:
    return lora_fx.insert(Net(width).eval(), (torch.randn(2, width),), rank=2)


def tensors_of(module: nn.Module) -> list[int]:
    """The identity of each tensor, in each place of the module."""
    return [
        id(tensor)
        for part in module.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
    ]


def test_what_is_kept_is_what_autograd_saves() -> None:
    """Beside autograd's own count of the real step."""
    module = module_of()
    run, _ = objective(module, table(), "ce", False, ROWS)
    batch = table().rows(range(ROWS))
    before = tensors_of(module)
    memory = step_memory(run, batch)
    assert tensors_of(module) == before
    module.train()
    saved, _ = saved_bytes(module, lambda: run.loss(batch))
    labels_and_inputs = 4 * ROWS * 64 + 2 * 8 * ROWS
    assert saved - labels_and_inputs <= memory.kept <= saved + labels_and_inputs
    assert memory.peak > memory.kept
    assert all(parameter.grad is None for parameter in module.parameters())


def test_twice_the_rows_keep_twice_as_much() -> None:
    module = module_of()
    run, _ = objective(module, table(), "ce", False, ROWS)
    four = step_memory(run, table().rows(range(4))).kept
    eight = step_memory(run, table().rows(range(8))).kept
    assert 1.9 < eight / four < 2.1


def test_recomputed_blocks_keep_less() -> None:
    module = module_of()
    run, _ = objective(module, table(), "ce", False, ROWS)
    plain = step_memory(run, table()).kept
    module.activation_checkpointing_enable()
    assert step_memory(run, table()).kept < plain / 2


def test_the_longest_rows_are_measured() -> None:
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    ids = np.arange(12).reshape(3, 4)
    rows = Table({"ids": ids, "attention_mask": mask})
    assert largest_batch(rows, 2).columns["ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    buckets = Buckets([rows.rows([0]), rows.rows([1])])
    assert largest_batch(buckets, 1).columns["ids"].tolist() == [[4, 5, 6, 7]]


def run_of(
    free: int, monkeypatch: pytest.MonkeyPatch, *, refuse: bool = True, batch_size: int = 8
) -> list[str]:
    monkeypatch.setattr(run_memory, "free_on", lambda device: FreeMemory(free))
    lines: list[str] = []
    with telling(lines.append), refusing(refuse):
        fit(module_of(), table(), settings=Settings(steps=1, batch_size=batch_size))
    return lines


def test_a_run_that_cannot_fit_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of(10**9, monkeypatch) == []
    with pytest.raises(LoraFxError) as refused:
        run_of(20_000, monkeypatch)
    assert refused.value.exit_code == 2
    message = refused.value.message
    assert message.startswith("training needs at least ") and "20 kB are free" in message
    assert "--no-memory-check" in refused.value.hint
    lines = run_of(20_000, monkeypatch, refuse=False)
    assert lines[0].startswith("memory: training takes about")
    assert lines[1] == "warning: training will run out of memory, and starts all the same"


def test_a_hint_names_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named batch size then runs in the memory that was free."""
    free = 34_000
    with pytest.raises(LoraFxError) as refused:
        run_of(free, monkeypatch)
    found = re.match(r"--batch-size (\d) needs ", refused.value.hint)
    assert found is not None
    assert run_of(free, monkeypatch, batch_size=int(found[1])) == []


def test_a_step_that_needs_values_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no values")

    monkeypatch.setattr(run_memory, "step_memory", fails)
    lines = run_of(1, monkeypatch)
    assert lines == ["memory of a step: not known before it: no values"]


PEAK = """
import sys
import numpy as np
import torch
import lora_fx
from lora_fx.data import Table
from lora_fx.fx.train.objective import objective
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.run_memory import RunMemory
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.step_memory import step_memory
from tests.anonymous_memory import give_back, watched
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

torch.set_num_threads(1)

def llama():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=688, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )
    ids = np.random.default_rng(0).integers(0, 32000, (8, 384))
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    return LlamaForCausalLM(config), columns

def vit():
    config = ViTConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        image_size=224, patch_size=16, num_labels=10,
    )
    x = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
    return ViTForImageClassification(config), {"pixel_values": x, "labels": np.arange(8)}

model, columns = {"llama": llama, "vit": vit}[sys.argv[1]]()
table = Table(columns, "labels")
example = {name: torch.tensor(column[:2]) for name, column in columns.items()}
module = lora_fx.insert(model.eval(), (), example, rank=8)
if sys.argv[2] == "again":
    module.activation_checkpointing_enable()
run, _ = objective(module, table, "ce", False, 8)
with run.alone():
    optimizer = Optimizer(module, Settings(batch_size=8), 2)
    estimate = RunMemory(run, optimizer, table, 8, 1).peak_of(step_memory(run, table))
    module.train()
    run.loss(table.rows(range(2))).backward()
    give_back()
    with watched() as grown:
        run.loss(table).backward()
print(grown.peak / estimate.expected, grown.peak / estimate.least)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["kept", "again"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_measured_beside_estimated(name: str, blocks: str) -> None:
    """Anonymous bytes of a step beyond those of the process, beside the estimate."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK, name, blocks]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected, least = map(float, done.stdout.split())
    print(
        f"\n{name}, blocks {blocks}: measured {expected:.2f} of the estimate, {least:.2f} of least"
    )
    assert 0.6 < expected < 1.2
    assert least >= 0.98
