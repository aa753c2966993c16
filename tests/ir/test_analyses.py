"""What is computed of a graph is kept until an edit, and shared by clones that hold by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.module.execution import execution_of
from lora_fx.ir.graph import Analysed
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert


def test_an_edit_drops_and_a_share_lasts_until_one() -> None:
    graph, clone = Analysed(), Analysed()
    named: dict[str, object] = {}
    graph.share(named)
    clone.share(named)
    assert graph.kept("a", lambda: 1, by_name=True) == clone.kept("a", lambda: 2, by_name=True) == 1
    assert graph.kept("b", lambda: 1) == graph.kept("b", lambda: 2) == 1
    assert clone.kept("b", lambda: 2) == 2, "what knows nodes is a graph's own"
    graph.changed()
    assert graph.kept("a", lambda: 3, by_name=True) == graph.kept("b", lambda: 3) == 3
    assert clone.kept("a", lambda: 4, by_name=True) == 1, "the clone was not edited"


@pytest.mark.parametrize("step", [Insert, Fold])
def test_a_pass_drops_what_find_saw(step: type[Insert] | type[Fold]) -> None:
    module = lora_fx.insert(nn.Linear(6, 4), (torch.randn(3, 6),), rank=2)
    graph = execution_of(module).captured.fx_graph()
    before = find(graph)
    assert find(graph) is before and find(graph.clone()) is before
    assert step(module.adapter().lowrank)(graph).modified
    assert find(graph) is not before
