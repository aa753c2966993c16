"""The gates of a training step's proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import CEILING, Parity, rel
from lora_fx.dtypes import Array
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.train.objective import loss_function
from lora_fx.fx.train.optimizer_step import Update, slots_in
from lora_fx.fx.train.train_graph import train_graph
from lora_fx.inputs import Named
from lora_fx.passes.proofs.train_step import _TorchStep, prove_step

Made = dict[str, Array]
KEY = "0.weight"


@pytest.fixture(scope="module")
def step() -> tuple[Any, Made]:
    """A step whose first unit is exactly 0 in the first row, and its inputs.

    Its only weight is 1, its bias is −x and B adds 0 to it, so that it is 0 on every processor, in
    every order of summation. Moved weights (see `nearby`) leave it at 0, put it below, or, where
    the bias moves and the weight stays, a unit of the last place above: there the ReLU turns.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    module = lora_fx.insert(model, (torch.randn(2, 8),), rank=2, include="0")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.1)
                p[0] = 0.0
    named = execution_of(module).sample()
    low, x = module.adapter().lowrank[KEY], named["input"]
    assert low.b.shape == (6, 2) and not low.b[0].any() and x[0, 0] > 0.0
    with torch.no_grad():
        model[0].weight[0] = torch.eye(8)[0]
        model[0].bias[0] = -x[0, 0]
    graph = train_graph(module, named, loss_function("ce", "labels", lambda _: False))
    slots = slots_in(module.updates, {KEY: ("A", "B")})
    zeros = {f"{s.name}.{n}": np.zeros(s.shape, np.float32) for s in slots for n in "mv"}
    given = {"input": x.numpy(), "labels": np.array([1, 2]), **zeros}
    given |= {"A": low.a.T.copy(), "B": (low.scale * low.b).T.copy()}
    return _TorchStep(graph, slots, Update()), given


def prove(step: Any, run: Callable[[Mapping[str, Array]], Made]) -> list[Parity]:
    def labelled(named: Named) -> tuple[Named, Array]:
        return named, np.arange(len(named["input"])) % 4

    return prove_step(run, step.graph, step.slots, step.update, labelled, None)


def test_rounding_that_turns_a_relu_is_no_difference(step: Any) -> None:
    """Weights that are moved by half a unit have another gradient, and another place proves."""
    torchs, given = step
    gradient = torchs(given)["B.m.next"]
    turned = [
        seed for seed in range(20)
        if rel(replace(torchs, seed=seed)(given)["B.m.next"], gradient) > CEILING
    ]  # fmt: skip
    assert 0 < len(turned) < 20
    found = prove(torchs, lambda at: replace(torchs, seed=turned[0])(at))
    assert len(found) == 4 and all(p.ok for p in found)


def test_a_wrong_gradient_is_told_from_rounding(step: Any) -> None:
    torchs, _ = step

    def wrong(given: Mapping[str, Array]) -> Made:
        made = torchs(given)
        return made | {"A.m.next": made["A.m.next"] * np.float32(1 + 2e-3)}

    assert not any(p.ok for p in prove(torchs, wrong))


def test_the_loss_of_an_exact_step_is_exact(step: Any) -> None:
    """Though it takes its scores as float32, and the gradients begin there."""
    torchs, given = step
    exact = replace(torchs, wide=True)(given)
    assert {v.dtype for v in exact.values()} == {np.dtype(np.float64)}
    held = {n: t.double() for n, t in torchs.graph.module.state_dict().items()}
    x, a, b = (torch.tensor(given[n]).double() for n in ("input", "A", "B"))
    inner = torch.relu(x @ (held["0.weight"].T + a @ b) + held["0.bias"])
    scores = inner @ held["2.weight"].T + held["2.bias"]
    want = nn.functional.cross_entropy(scores, torch.tensor(given["labels"])).numpy()
    assert rel(exact["loss"], want) < 1e-12 < rel(torchs(given)["loss"], want) < 1e-6


def test_one_step_that_rounds_well_does_not_narrow_the_gate(step: Any) -> None:
    """The largest of several counts, moved weights among them."""
    torchs, given = step
    errors = [dict(e) for e in torchs.rounding(given, replace(torchs, wide=True)(given), {})]
    assert len(errors) == 13 and errors[0]["loss"] == 0.0
    assert 0.0 < errors[-1]["loss"] < 1e-6 and errors[-1]["B.m.next"] > CEILING
