"""Changing members of a .pt2 file, and what every command says of the result."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from lora_fx.cli import main

JSON = "models/model.json"
SAMPLE = "data/sample_inputs/model.pt"
CONFIG = "data/weights/model_weights_config.json"
Edit = Callable[[bytes], bytes | None]


def write_clean(path: Path) -> Path:
    """A small model by torch.export.save, with a free batch dimension."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, str(path))
    return path


def edited(clean: Path, path: Path, edits: dict[str, Edit]) -> Path:
    """A copy with members changed; an edit that gives None drops its member."""
    left = dict(edits)
    with zipfile.ZipFile(clean) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            member = name.partition("/")[2]
            data: bytes | None = old.read(name)
            if member in left:
                data = left.pop(member)(old.read(name))
            if data is not None:
                new.writestr(name, data)
    assert not left, f"no such member: {left}"
    return path


def in_json(change: Callable[[dict[str, Any]], None]) -> Edit:
    def edit(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return edit


def refused(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one Error line of every command on this file; exit code 2."""
    said = set()
    for command in (["targets", str(path)], ["export", str(path), "-o", str(path) + ".onnx"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*command, *options])
        errors = capsys.readouterr().err
        assert stop.value.code == 2, errors
        assert len([x for x in errors.splitlines() if x.startswith("Error:")]) == 1
        assert "report this with the output of -v" not in errors, errors
        said.add(errors)
    assert not Path(str(path) + ".onnx").exists()
    return said.pop()
