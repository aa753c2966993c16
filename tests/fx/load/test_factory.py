"""Factories: a user's function that builds the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_fx.fx.load.models import load_model
from tests.fx.load.loading import found, net, refused

FACTORIES = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 4)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, *, scale=1.0):
        return self.drop(self.fc(x)) * scale

def make():
    return Net(), (torch.randn(2, WIDTH),), {"scale": 2.0}
def pair():
    return Net(), (torch.randn(2, WIDTH),)
def tensor():
    return Net(), torch.randn(2, WIDTH)
def bare():
    return Net()
def no_model():
    return "model", (1,)
def bad_kwargs():
    return Net(), (), [1]
def fails():
    return Net(), (torch.randn(2, 3) @ torch.randn(2, 3),)
def quits():
    raise SystemExit(3)
net = Net()
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path / "nets.py"


@pytest.mark.parametrize("where", ["nets", "nets.py"])
@pytest.mark.parametrize("name", ["make", "pair", "tensor"])
def test_factory(where: str, name: str, code: Path) -> None:
    path = list(sys.path)
    loaded = load_model(f"{where}:{name}")
    assert sys.path == path and loaded.notes == () and not loaded.module.training
    assert loaded.kwargs == ({"scale": 2.0} if name == "make" else {})
    assert [t.key for t in found(loaded).targets] == ["fc.weight"]
    again = load_model(f"{code}:{name}")
    assert torch.equal(net(again).fc.weight, net(loaded).fc.weight)
    assert torch.equal(again.args[0], loaded.args[0])


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("nets.py:bare", ["returned no example inputs", "(model, (torch.randn(2, 3),), {})"]),
        ("nets.py:no_model", ["returned (str, tuple)"]),
        ("nets.py:bad_kwargs", ["returned (Net, tuple, list)"]),
        ("nets.py:net", ["is a Net, not a factory"]),
        ("nets.py:WIDTH", ["is an int, not a factory"]),
        ("nets.py:mkae", ["nets.py has no 'mkae'", "make"]),
        ("nets.py:fails", ["nets.py:fails failed at", "nets.py:27: RuntimeError"]),
        ("nets.py:quits", ["nets.py:29: SystemExit: 3"]),
        ("nets.py", ["the name of a factory is missing", "pass nets.py:FACTORY"]),
        ("gone.py:make", ["gone.py: no such file"]),
        ("nowhere.nets:make", ["nowhere.nets failed", "No module named 'nowhere'", "run from"]),
        ("bad name:make", ["is not the name of a factory"]),
        ("nets:", ["is not the name of a factory"]),
    ],
)
def test_factories_that_fail(spec: str, texts: list[str], code: Path) -> None:
    refused(spec, *texts)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("import torch\ndef f(:\n", "broken.py:2: SyntaxError"),
        ("\n\nimport not_installed_here\n", "broken.py:3: ModuleNotFoundError"),
        ("import json\njson.loads('{')\n", "broken.py:2: JSONDecodeError"),
    ],
)
def test_file_that_cannot_be_imported(text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    refused(f"{tmp_path}/broken.py:make", where)
    assert "lora_fx_user_broken" not in sys.modules
