"""Passes in a user's hand: what they are given, what they leave, and that a model stays its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LowRank
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import is_marked
from lora_fx.fx.sharing_copy import sharing_copy
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.quantise import Quantise
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.reread import RecomputeWeights
from lora_fx.passes.share import Share
from tests.passes.test_rows import captured
from tests.passes.test_variants import started
from tests.table import ROWS, Row


class Net(nn.Module):
    """A table that is tied to the head, a convolution, a norm with statistics, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.body = nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 16))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.table.weight
        self.body[0].bias.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(self.table(ids).mT)).mT
        return self.head(self.body(y))


IDS = torch.arange(8).reshape(2, 4) % 11


def state(model: nn.Module) -> dict[str, Any]:
    """All that a pass could change: names, identities, numbers, flags and classes."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": {n: (id(t), t.requires_grad, t.detach().clone()) for n, t in named},
        "modules": {n: (type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    tensors, others = before["tensors"], after["tensors"]
    return (
        before["modules"] == after["modules"]
        and tensors.keys() == others.keys()
        and all(
            tensors[n][:2] == others[n][:2] and torch.equal(tensors[n][2], others[n][2])
            for n in tensors
        )
    )


def updates(graph: FxGraph) -> dict[str, LowRank]:
    rng = np.random.default_rng(0)
    result = {}
    for target in find(graph).targets:
        a, b = (rng.standard_normal(s).astype("f4") for s in target.layout.factor_shapes(2))
        result[target.key] = LowRank(a, b, 0.5)
    return result


PASSES: dict[str, Callable[[FxGraph], Any]] = {
    "find": find,
    "Insert": lambda graph: Insert(updates(graph))(graph),
    "Insert, weight form": lambda graph: Insert(updates(graph), weight_form=True)(graph),
    "Fold": lambda graph: Fold(updates(graph))(graph),
    "Insert, then Fold": lambda graph: (
        Insert(updates(graph))(graph), Fold(updates(graph))(graph)
    ),
    "Quantise": lambda graph: Quantise({"body.0.weight": "int8"})(graph),
    "Clean": Clean(),
    "Fuse": lambda graph: (Insert(updates(graph))(graph), Fuse()(graph)),
    "Share": lambda graph: (Insert(updates(graph))(graph), Share()(graph)),
    "Recompute": lambda graph: (Insert(updates(graph))(graph), Recompute()(graph)),
    "RecomputeWeights": lambda graph: (
        Insert(updates(graph), weight_form=True)(graph), RecomputeWeights()(graph)
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_leaves_the_users_module_as_it_is(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Net().train(training)
    captured = lora_fx.capture(model, (IDS,))
    graph = captured.fx_graph(training)
    before = state(model)
    PASSES[name](graph)
    graph.lint()
    graph.module()(IDS)[0].sum().backward()
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    # and the next verb sees the model as it was
    lora_fx.insert(model, (IDS,), rank=2)
    assert len(find(captured.fx_graph(training)).targets) == len(find(graph).targets)


class Branching(nn.Module):
    """Reads a constant, and a weight in the branches of a torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        steps = torch.tensor([1.0, 2.0, 3.0])
        return (
            torch.cond(x.sum() > 0, lambda x: self.fc(x) + 1, lambda x: self.fc(x) - 1, (x,))
            * steps
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_graph_runs_with_its_constants_and_bodies(sign: int) -> None:
    torch.manual_seed(0)
    model, x = Branching(), sign * torch.rand(4, 6)
    graph = lora_fx.capture(model, (x,)).fx_graph()
    (got,) = graph.module()(x)
    torch.testing.assert_close(got, model(x))
    assert graph.clone().module()(x)[0].equal(got)


def test_a_graph_over_codes_runs_as_their_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)).eval()
    x, coded = torch.ones(1, 32), sharing_copy(model)
    assert Quantise({"0.weight": "int8"})(
        lora_fx.capture(coded, (x,)).fx_graph(root=coded)
    ).modified
    graph = lora_fx.capture(coded, (x,)).fx_graph()
    before = state(coded)
    (got,) = graph.module()(x)
    assert got.equal(coded(x)) and not got.equal(model(x))
    Insert(updates(graph))(graph)
    assert same(before, state(coded))
    assert not graph.module()(x)[0].equal(got)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_insert_leaves_no_node_that_nothing_reads(row: Row, variant: str) -> None:
    _, _, cap = captured(row)
    updates = started(cap, variant, "gaussian")[1]
    graph = cap.fx_graph()
    assert Insert(updates)(graph).modified == bool(updates)
    assert not [n for n in graph.graph.nodes if is_marked(n) and not n.users]
