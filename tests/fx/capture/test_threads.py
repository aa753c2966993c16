"""Threads of one process: torch.export, its exporter and the streams serve one at a time."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import lora_fx
from lora_fx.errors import silenced


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 6, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.cell(x)
        return self.out(states)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(8, 6, 3), nn.MaxPool1d(2))
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x.mT).mT)


def test_models_are_captured_and_exported_in_threads(tmp_path: Path) -> None:
    """All are as they are alone: every length is free, and each file is proven."""
    together = threading.Barrier(3)

    def run(kind: Callable[[], nn.Module], file: Path) -> str:
        together.wait(60)
        captured = lora_fx.capture(kind().eval(), (torch.randn(2, 9, 8),))
        module = lora_fx.insert(captured, rank=2)
        lora_fx.export(module, file, mode="switch", provider="cpu")
        return repr(captured)

    kinds = (Recurrent, Pooled, Recurrent)
    folders = [tmp_path / str(number) for number in range(len(kinds))]
    for folder in folders:
        folder.mkdir()
    files = [folder / "model.onnx" for folder in folders]
    with ThreadPoolExecutor(len(kinds)) as pool:
        captures = list(pool.map(run, kinds, files))
    assert all(file.exists() for file in files)
    for kind, text in zip(kinds, captures, strict=True):
        alone = lora_fx.capture(kind().eval(), (torch.randn(2, 9, 8),))
        lora_fx.insert(alone, rank=2)
        assert text == repr(alone)


def test_what_a_thread_silences_comes_back() -> None:
    """Also where a second thread begins before the first one ends, and ends after it."""
    before = (sys.stderr, list(warnings.filters), logging.getLogger("some").level)
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def block(is_in: threading.Event, other: threading.Event) -> None:
        with silenced(contextlib.redirect_stderr, {"some": logging.CRITICAL}):
            is_in.set()
            other.wait(0.2)  # the second one comes in vain, or too early

    second = threading.Thread(target=block, args=(second_is_in, threading.Event()))
    first = threading.Thread(target=block, args=(first_is_in, second_is_in))
    first.start()
    assert first_is_in.wait(60)
    second.start()
    first.join()
    second.join()
    assert (sys.stderr, list(warnings.filters), logging.getLogger("some").level) == before
