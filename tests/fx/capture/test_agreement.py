"""A graph beside its model on one call, and a model that does not run at the sizes drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.fx.capture.agreement import Agreement
from lora_fx.fx.capture.capture import Captured

X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        if x.shape[0] == 7:
            raise ValueError("seven rows")
        y = self.layer(x)
        return y, y.sum(1), torch.complex(y, y), y.sqrt()


def agreement() -> Agreement:
    cap: Captured = lora_fx.capture(Net().eval(), (X,), static=["x"])
    return cap._beside(cap.traced(False, cap.named), None)


def edited(graph: fx.Graph, edit: str) -> fx.Graph:
    """A copy of a graph that gives something else."""
    copy = fx.Graph()
    outputs = copy.graph_copy(graph, {})
    assert isinstance(outputs, tuple)
    first, *others = outputs
    match edit:
        case "fewer":
            outputs = (first,)
        case "no tensor":
            outputs = (3, *others)
        case "other shape":
            outputs = (copy.call_function(torch.ops.aten.t.default, (first,)), *others)
        case "fails":
            outputs = (copy.call_function(torch.ops.aten.view.default, (first, [5])), *others)
        case "rounded":
            outputs = (copy.call_function(torch.ops.aten.mul.Tensor, (first, 1 + 1e-7)), *others)
        case "far":
            outputs = (copy.call_function(torch.ops.aten.mul.Tensor, (first, 1.01)), *others)
    copy.output(outputs)
    return copy


@pytest.mark.parametrize("edit", ["fewer", "no tensor", "other shape", "fails", "far"])
def test_another_graph_does_not_agree(edit: str) -> None:
    ours = agreement()
    parity = replace(ours, graph=edited(ours.graph, edit)).at({"x": X})
    assert parity is not None and not parity.ok
    assert (parity.rel == math.inf) == (edit != "far")


@pytest.mark.parametrize("edit", ["none", "rounded"])
def test_a_graph_agrees(edit: str) -> None:
    ours = agreement()
    parity = replace(ours, graph=edited(ours.graph, edit)).at({"x": X})
    assert parity is not None and parity.ok and (parity.rel == 0.0) == (edit == "none")


def test_a_known_digest_spares_the_run() -> None:
    ours = agreement()
    assert ours.at({"x": X}) and len(ours.digests) == 1
    again = replace(ours, graph=edited(ours.graph, "fails"))
    parity = again.at({"x": X})
    assert parity is not None and parity.ok


def test_a_call_that_the_model_refuses_says_nothing() -> None:
    assert agreement().at({"x": torch.ones(7, 4)}) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Few(nn.Module):
    """Blocks that repeat, in a model that no one runs with other rows than three."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and len(x) != 3:
            raise ValueError("three rows")
        y: torch.Tensor = self.blocks(x)
        return y


def test_sizes_at_which_the_model_does_not_run_are_told() -> None:
    cap = lora_fx.capture(Few().eval(), (X,))
    traced = cap.traced(False, cap.named)
    assert traced.copies and traced.modeless
    assert [parity.of for parity in cap.compared] == [
        "copied blocks, eval mode",
        "copied blocks, train mode",
    ]
    rows = list(cap.unproven.values())
    assert [row["sizes"] for row in rows] == [{"x": [12, 4]}, {"x": [4, 4]}]
    for row in rows:
        assert row["reason"] == "copied blocks, train mode: the model does not run at these sizes"
