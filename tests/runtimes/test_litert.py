"""LiteRT: programs of fixed sizes, base and two adapters, equal to torch; the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lora_fx
from tests.runtimes import environments, models, switch_files
from tests.runtimes.consumers import agree
from tests.runtimes.programs import Program, Runtime

pytestmark = pytest.mark.slow
RUNTIME = Runtime("LiteRT, CPU", "litert", "litert-torch", ".tflite")
RANK = max(models.RANKS.values())


def of_one_size(name: str, folder: Path) -> Program:
    """Export a model for its first sizes alone, and for one rank."""
    environments.environment("litert")
    subject = models.SUBJECTS[name]()
    sizes = subject.sizes[:1]
    tensors = {key: torch.from_numpy(array) for key, array in sizes[0].items()}
    args = tuple(tensors.values()) if subject.args else ()
    switch_files.write(
        folder, name, subject.model, subject.adapters, sizes, subject.outputs,
        suffix=".pt2", mode=lora_fx.Switch(rank=RANK), args=args,
        kwargs=None if args else tensors, dynamic={},
    )  # fmt: skip
    return Program(replace(subject, sizes=sizes), folder, RUNTIME)


@pytest.mark.parametrize("name", ["text", "vision"])
def test_the_row(name: str, tmp_path: Path) -> None:
    program = of_one_size(name, tmp_path)
    program.run_sample()
    agree(program.row(program.measured(), "0 conversions", dynamic_sizes="refused"))
