"""Conditions on sizes as they are told: the bound that they come to, at the model's own line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lora_fx
from lora_fx.cli.group import group
from lora_fx.conditions import Condition, without_implied


def of_x(text: str) -> Condition:
    return Condition(text, (("s0", "x", 1),))


TOLD = {
    "s0 == min(512, s0) or s0 < 3": "x[1] <= 512",
    "s0 == min(512, s0)": "x[1] <= 512",
    "s0 + 4 <= 9": "x[1] <= 5",
    "s0 // 2 < 7": "x[1] <= 13",
    "max(s0, 8) == s0": "x[1] >= 8",
    "2 * s0 > 9": "x[1] >= 5",
    "s0 <= 7": "x[1] <= 7",
    "s0 % 2 == 0": "x[1] % 2 == 0",  # no bound: as it is
    "s0 != 3": "x[1] != 3",
    "s0 * s0 <= 81": "x[1] <= 9",
}


@pytest.mark.parametrize("text", TOLD)
def test_a_bound_is_told_as_one(text: str) -> None:
    assert str(of_x(text)) == TOLD[text]


BOTH = (("s0", "x", 1), ("s1", "y", 1))
IMPLIED = {
    "s0 <= 600": True,
    "s0 <= 512": True,  # the same in other words
    "s0 < 512": False,
    "s0 != 513": True,
    "s0 != 3": False,
    "s0 % 2 == 0": False,
    "s0 <= 600 or s1 > 3": True,
    "s0 <= 5 or s1 > 3": False,
    "s1 <= 600": False,
    "s0 + s1 <= 2000": False,
}


@pytest.mark.parametrize("text", IMPLIED)
def test_what_another_implies_is_left_out(text: str) -> None:
    strict = of_x("s0 == min(512, s0)")
    sizes = tuple(row for row in BOTH if row[0] in text)
    other = Condition(text, sizes)
    assert (other not in without_implied([other, strict])) == IMPLIED[text]
    assert strict in without_implied([other, strict]) or text == "s0 < 512"


CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        if x.shape[1] > 7:
            x = x[:, :7]  # another graph
        return self.fc(x)


def build():
    torch.manual_seed(0)
    return Net(), (torch.ones(3, 5, 4),), {}
"""


def test_the_line_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    done = CliRunner().invoke(group, ["targets", "net.py:build"])
    assert done.exception is None, done.exception
    told = [x for x in done.output.splitlines() if x.startswith("captured for: ")]
    assert told and all("net.py, line" in x for x in told), done.output
    assert "click" not in done.output and "x[1] <= 7" in done.output


class Position(torch.nn.Module):
    """A table of 32 positions: the limit of most encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(32, 6)
        self.words = torch.nn.Embedding(50, 6)
        self.fc = torch.nn.Linear(6, 6)
        self.register_buffer("ids", torch.arange(32)[None])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids = self.ids[:, : input_ids.shape[1]]
        return self.fc(self.words(input_ids) + self.table(ids))


def test_a_limit_of_positions_is_told_once() -> None:
    cap = lora_fx.capture(Position(), (torch.zeros(2, 5, dtype=torch.int64),))
    found = lora_fx.find(cap)
    told = [str(c) for c in found.ranges if "input_ids[1]" in str(c)]
    assert len(told) == 1 and told[0].startswith("input_ids[1] <= 32, at most 32 tokens ("), told
    assert "test_conditions_told.py, line" in told[0]
