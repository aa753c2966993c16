"""The readers of samples/probe and lora-fx agree on files that export writes, in every mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.onnx.runtime_adapter import read_file, write_file
from tests.probe.readers import EVERY, READERS, Reader
from tests.probe.test_readers import of_lora_fx
from tests.runtimes import models

MODES = ("merged", "switch", "portable", "load", "batch")
Export = Callable[[Path, str], Path]


class Rows(nn.Module):
    """A convolution and two linear layers, and a mask of rows, whose probe has booleans."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(torch.relu(self.conv(x)).mean((2, 3))))
        return torch.where(mask, self.head(hidden), -self.head(hidden))


def export_rows(folder: Path, mode: str) -> Path:
    """Export a small network with the adapters a and b."""
    args = (torch.randn(2, 3, 6, 6), torch.ones(2, 1, dtype=torch.bool))
    adapters = {}
    for seed, name in enumerate("ab"):
        adapted = lora_fx.insert(Rows().eval(), args, rank=2 + seed, seed=seed).eval()
        for parameter, value in adapted.named_parameters():
            if "lora_B" in parameter:
                nn.init.normal_(value, std=0.3)
        adapters[name] = adapted.adapter()
    return exported(folder, mode, Rows().eval(), args, {}, adapters)


def export_subject(subject: Callable[[], models.Subject]) -> Export:
    """Return what exports a model of the table of consumers."""

    def export(folder: Path, mode: str) -> Path:
        found = subject()
        adapters = dict(found.adapters)
        return exported(folder, mode, found.model, found.args, found.kwargs, adapters)

    return export


def exported(
    folder: Path,
    mode: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adapters: dict[str, Adapter],
) -> Path:
    """Export a model in a mode, of which portable is one; merged has the adapter a.

    Mode batch refuses position embeddings, whose input is the same for every row.
    """
    path = folder / "model.onnx"
    is_portable = mode == "portable"
    if mode == "batch":
        adapters = {name: without_positions(adapter) for name, adapter in adapters.items()}
    lora_fx.export(
        model,
        path,
        args,
        kwargs or None,
        adapters=adapters["a"] if mode == "merged" else adapters,
        mode="switch" if is_portable else mode,
        target="portable" if is_portable else "cpu",
        provider="cpu",
    )
    return path


def without_positions(adapter: Adapter) -> Adapter:
    """Return an adapter without its updates of position embeddings."""
    entries = {key: entry for key, entry in adapter.entries.items() if "position" not in key}
    return Adapter(entries)


EXPORTS: dict[str, Export] = {
    "rows": export_rows,
    "text": export_subject(models.text),
    "vision": export_subject(models.vision),
}
Exported = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One of the readers."""
    return READERS[request.param](tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The file of a model in a mode, exported once."""
    paths: dict[tuple[str, str], Path] = {}

    def file(name: str, mode: str) -> Path:
        if (name, mode) not in paths:
            paths[name, mode] = EXPORTS[name](tmp_path_factory.mktemp("export"), mode)
        return paths[name, mode]

    return file


def check(reader: Reader, path: Path, adapter: str, base: str = "right") -> None:
    """Expect a verdict on a, or on a merged file's adapter, from a reader and from lora-fx.

    Args:
        reader: The reader.
        path: The file.
        adapter: The verdict; empty for any that a scale has, which no cubic function may fit.
        base: The verdict on the base, where the file has one.
    """
    answer = reader.check(path)
    assert answer.error == "" and answer.result == of_lora_fx(path)
    found = next(iter(answer.result["adapters"].values()))
    if adapter:
        assert found == adapter
    else:
        assert found == "differs" or found.startswith("scaled by 1.")
    assert answer.result.get("base", base) == base
    assert answer.result.get("ids", "right") == "right"
    assert answer.code == (0 if {adapter, base} == {"right"} else 1)


SMALL = [
    pytest.param("rows"),
    *(pytest.param(n, marks=pytest.mark.slow) for n in EXPORTS if n != "rows"),
]


@pytest.mark.parametrize("reader", EVERY, indirect=True)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", MODES)
def test_an_export_is_right(mode: str, name: str, reader: Reader, files: Exported) -> None:
    if mode in reader.modes:
        check(reader, files(name, mode), "right")


@pytest.mark.parametrize("reader", EVERY, indirect=True)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", ["switch", "portable", "load"])
def test_files_that_are_exchanged(
    mode: str, name: str, reader: Reader, files: Exported, tmp_path: Path
) -> None:
    """The file of b under the name of a; a with twice its B; and a with a B of zeros."""
    if mode not in reader.modes:
        return
    path = copied(files(name, mode), tmp_path)
    of_a, of_b = sorted(tmp_path.glob("[ab].*"))
    for factor, verdict in ((2.0, "scaled by 2"), (0.0, "no effect"), (1.45, "")):
        multiplied(files(name, mode).parent / of_a.name, of_a, factor)
        check(reader, path, verdict)
    shutil.copy(of_b, of_a)
    check(reader, path, "adapter b")


@pytest.mark.parametrize("reader", EVERY, indirect=True)
@pytest.mark.parametrize("mode", ["merged", "batch"])
def test_a_weight_that_changes(mode: str, reader: Reader, files: Exported, tmp_path: Path) -> None:
    path = copied(files("rows", mode), tmp_path)
    model = onnx.load(path)
    [weight] = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [8, 3, 3, 3]]
    weight.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    check(reader, path, "differs", "differs")


def copied(path: Path, folder: Path) -> Path:
    """Copy a file and what lies beside it."""
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    return folder / path.name


def multiplied(source: Path, target: Path, factor: float) -> None:
    """Write an adapter's file with another B."""
    if source.suffix == ".onnx_adapter":
        tensors, versions = read_file(source)
        target.unlink()
        write_file(target, with_b(tensors, factor), versions)
        return
    with safe_open(source, "numpy") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    save_file(with_b(tensors, factor), target, header)


def with_b(tensors: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """Return tensors with another B."""
    return {
        name: (array * np.float32(factor) if name.endswith("lora_B") else array)
        for name, array in tensors.items()
    }
