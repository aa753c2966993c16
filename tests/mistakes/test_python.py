"""What people get wrong in Python: what is said of it, and the call that its hint asks for."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession

import lora_fx
from lora_fx.onnx import Session, TrainSession

Row = tuple[str, str, str, str]
"""A line of python.txt, which says what its parts are."""


def rows(text: str) -> list[Row]:
    lines = [line for line in text.splitlines() if " | " in line and line[0] != "#"]
    parts = [line.removesuffix(" |").split(" | ") for line in lines]
    return [(p[0], p[1], p[2], "".join(p[3:])) for p in parts]


TABLE = Path(__file__).with_name("python.txt").read_text(encoding="utf-8")
QUICK, SLOW = map(rows, TABLE.split("# Slow."))

OF_COMMANDS = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
"""An option of the command line."""


@pytest.fixture(scope="module")
def cap(made: Path) -> lora_fx.Captured:
    loaded = lora_fx.load_model(f"{made}/model.py:build")
    return lora_fx.capture(loaded.module, loaded.args)


def begin(callback: Any, model: torch.nn.Module) -> None:
    """Begin the training of a model with a callback of Trainer's."""
    callback.on_train_begin(None, None, None, model=model)


def names_in(row: Row, cap: lora_fx.Captured) -> dict[str, Any]:
    """The names of a row; those that take a while are made only where it has them."""
    net = copy.deepcopy(cap.model)
    x = torch.randn(3, 8)
    names: dict[str, Any] = {
        "lora_fx": lora_fx, "torch": torch, "np": np, "os": os, "Session": Session,
        "TrainSession": TrainSession, "InferenceSession": InferenceSession, "begin": begin,
        "net": net, "x": x, "cap": cap,
    }  # fmt: skip
    words = set(re.findall(r"\w+", f"{row[0]} {row[3]}"))
    if words & {"model", "adapter"}:
        names["model"] = lora_fx.insert(cap, rank=2)
        names["adapter"] = names["model"].adapter()
    if "attached" in words:
        names["attached"] = lora_fx.attach(copy.deepcopy(net), (x,), rank=2)
    if "ExportAtEnd" in words:
        from lora_fx.integrations.trainer import ExportAtEnd

        names["ExportAtEnd"] = ExportAtEnd
    return names


def check(row: Row, cap: lora_fx.Captured) -> None:
    call, message, hint, follows = row
    names = names_in(row, cap)
    with pytest.raises(lora_fx.LoraFxError) as refused:
        eval(call, names)
    said, _, advice = str(refused.value).partition("\nHint: ")
    assert message in said and hint in advice, str(refused.value)
    clauses = [clause for clause in (said, *advice.split("; ")) if "lora-fx " not in clause]
    assert not any(map(OF_COMMANDS.search, clauses)), str(refused.value)
    if follows:
        eval(follows, names)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("row", QUICK, ids=[row[0] for row in QUICK])
def test_a_mistake_is_told_and_its_hint_leads_on(row: Row, cap: lora_fx.Captured) -> None:
    check(row, cap)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("row", SLOW, ids=[row[0] for row in SLOW])
def test_a_mistake_with_trainer_or_torchs_exporter(row: Row, cap: lora_fx.Captured) -> None:
    check(row, cap)
