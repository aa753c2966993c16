"""The free memory of a GPU, and weights that go there; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.fx import device_memory
from lora_fx.fx.device_memory import check_move, free_on
from lora_fx.peak_memory import refusing

GPU = torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)


def test_a_gpu_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps for later is free too."""
    gpu(monkeypatch, 1000)
    assert free_on(GPU) == FreeMemory(1200)
    monkeypatch.setattr(device_memory, "free_memory", lambda: FreeMemory(7))
    assert free_on(torch.device("cpu")) == FreeMemory(7)
    assert free_on(torch.device("meta")) is None


def test_weights_that_do_not_fit_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10)
    gpu(monkeypatch, 240)
    with refusing():
        check_move(model, GPU)  # 440 bytes
        check_move(model, torch.device("cpu"))
        gpu(monkeypatch, 239)
        with pytest.raises(LoraFxError, match=r"the model on cuda:0 needs at least 440 B .* 439 B"):
            check_move(model, GPU)
