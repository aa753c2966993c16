"""What the passes write, as text: each with a twin that must not change."""

from __future__ import annotations

import textwrap

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.norm_statistics import freeze_norms
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.open import capture


class Net(nn.Module):
    """A linear with a bias, and a `@`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) @ self.w


def captured() -> Captured:
    return capture(Net().eval(), (torch.randn(3, 8),))


def updates(cap: Captured, *keys: str) -> dict[str, LowRank]:
    found = find(cap.fx_graph())
    return {k: LowRank(*draw(k, found[k].layout, 2, 0), 4.0, found[k].layout) for k in keys}


def text(graph: FxGraph) -> str:
    """One line a node: name = op(args)."""
    lines = []
    for n in graph.graph.nodes:
        if n.op == "get_attr":
            lines.append(f"{n.name} = {n.target}")
        elif n.op == "call_function":
            op = getattr(n.target, "_opname", getattr(n.target, "__name__", n.target))
            lines.append(f"{n.name} = {op}({', '.join(map(str, n.args))})")
    return "\n".join(lines)


def dedent(block: str) -> str:
    return textwrap.dedent(block).strip()


BASE = dedent("""
    w = w
    fc_weight = fc.weight
    fc_bias = fc.bias
    linear = linear(named_x, fc_weight, fc_bias)
    relu = relu(linear)
    matmul = matmul(relu, w)
""")


def test_insert_with_dropout_in_training_only() -> None:
    cap = captured()
    for training, count in ((True, 1), (False, 0)):
        graph = cap.fx_graph(training)
        Insert(updates(cap, "fc.weight"), dropout=0.1, training=training)(graph)
        assert text(graph).count("dropout(named_x, 0.1, True)") == count
        assert ("matmul(lora_dropout, lora_permute)" in text(graph)) == training


def test_insert_nothing_changes_nothing() -> None:
    graph = captured().fx_graph()
    assert not Insert({})(graph).modified
    assert text(graph) == BASE


class Tied(nn.Module):
    """A table that is looked up and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.emb(ids), self.emb.weight)


def test_fold_of_one_use_gives_it_a_constant_of_its_own() -> None:
    cap = capture(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    change = updates(cap, "emb.weight")["emb.weight"]
    graph = cap.fx_graph(root=Tied())
    Fold({"emb.weight": LowRank(change.a, change.b, 1.0, change.layout, use="op:linear")})(graph)
    assert text(graph) == dedent("""
        emb_weight = emb.weight
        embedding = embedding(emb_weight, named_ids)
        emb_weight_folded = emb.weight_folded
        linear = linear(embedding, emb_weight_folded)
    """)
    twin = cap.fx_graph(root=Tied())
    Fold({"emb.weight": LowRank(change.a, change.b, 1.0, change.layout)})(twin)
    assert text(twin) == dedent("""
        emb_weight = emb.weight
        embedding = embedding(emb_weight, named_ids)
        linear = linear(embedding, emb_weight)
    """)


def test_frozen_norms() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    graph = capture(model, (torch.randn(3, 4),)).fx_graph(training=True)
    assert text(graph).count("add_(") == 1
    assert freeze_norms(graph.graph)
    lines = [line for line in text(graph).splitlines() if "batch_norm(" in line]
    assert ", False, 0.1, 1e-05" in lines[0]
    assert ", True, 0.1, 1e-05" in lines[1], "it has no statistics to use"
    assert "add_(" not in text(graph)
    assert not freeze_norms(graph.graph)
