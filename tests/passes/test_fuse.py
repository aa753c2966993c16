"""Branches of one input as one product, and their ends as one op: text, twins, numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.target_union import TargetUnion
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.passes.fuse import Fuse, ending
from lora_fx.passes.insert import Insert
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.open import capture
from tests.passes.test_golden import text, updates
from tests.passes.test_recompute import Net, gradients, pair, same

aten = torch.ops.aten


class Two(nn.Module):
    """Two layers of one input; a third of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 3)
        self.o = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x)) * self.k(x).sum(-1, keepdim=True)


def inserted(cap: Captured, *keys: str, dropout: float = 0.0) -> FxGraph:
    graph = cap.fx_graph(training=True)
    Insert(updates(cap, *keys), dropout=dropout, training=True)(graph)
    return graph


@pytest.fixture(scope="module")
def cap() -> Captured:
    return capture(Two().eval(), (torch.randn(3, 7, 6),))


def test_two_blocks_share_nothing(cap: Captured) -> None:
    graph = inserted(cap, "q.weight", "k.weight")
    assert not Share(blocks=("q", "k"))(graph).modified


def test_no_fuse_of_one_row() -> None:
    net = nn.Linear(6, 4)
    cap = capture(net, (torch.randn(6),), dynamic={}, static=["input"])
    graph = inserted(cap, "weight")
    assert not Fuse()(graph).modified


def test_numbers(cap: Captured) -> None:
    x = torch.randn(3, 7, 6)
    for options in ({}, {"dropout": 0.4}, {"variant": "dora"}, {"init": "pissa"}):
        for make in (Two, Net):
            found = []
            for m in pair(make, x, **options):
                torch.manual_seed(9)
                found.append(gradients(m, x))
            same(found[0], found[1], 1e-5)


def test_a_sum_that_is_written_to() -> None:
    """What follows may write to the sum, which lies where the layer's result lay."""

    class Into(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.o(torch.relu_(self.q(x))) * self.k(x).sum(-1, keepdim=True)
            return made

    x = torch.randn(3, 7, 6)
    fast, plain = pair(Into, x)
    want = gradients(plain, x)
    for _ in range(2):
        same(gradients(fast, x), want, 1e-5)


@pytest.mark.parametrize("read", [False, True])
def test_a_result_that_something_else_reads_is_not_written_over(cap: Captured, read: bool) -> None:
    graph = inserted(cap, "o.weight")
    (total,) = (n for n in graph.graph.nodes if n.target is aten.add.Tensor)
    if read:
        with graph.graph.inserting_after(total):
            other = graph.graph.call_function(aten.neg.default, (total.args[0],))
        end = graph.graph.output_node()
        end.args = ((*end.all_input_nodes, other),)
    assert Fuse(into=True)(graph).modified
    found = {n.target for n in graph.graph.nodes} & {ending, aten.addmm.default}
    assert found == {aten.addmm.default if read else ending}


def test_a_scale_that_is_a_tensor(cap: Captured) -> None:
    """As a module has it that is compiled for many adapters: it is multiplied into b before."""
    number = cap.fx_graph(training=True)
    low = updates(cap, "q.weight")
    Insert(low, training=True)(number)
    tensor = cap.fx_graph(training=True)
    Insert(TargetUnion().extended(low).installed(low), training=True)(tensor)
    assert Fuse(into=True)(number).modified and Fuse(into=True)(tensor).modified
    (call,) = (node for node in tensor.graph.nodes if node.target is ending)
    assert call.args[3] == 1.0 and call.args[2].target is aten.mul.Tensor
    (call,) = (node for node in number.graph.nodes if node.target is ending)
    assert call.args[3] == 2.0


def test_start_is_an_exact_zero(cap: Captured) -> None:
    x = torch.randn(3, 7, 6)
    m = lora_fx.insert(cap, rank=2).train()
    with m.base():
        want = m(x)
    assert torch.equal(m(x), want)


def test_share_then_recompute() -> None:
    cap = capture(Net().eval(), (torch.randn(3, 7, 6),))
    graph = inserted(cap, "out.weight", "also.weight")
    for step in (Share(), Recompute()):
        assert step(graph).modified
    (line,) = (x for x in text(graph).splitlines() if "recomputed(" in x)
    assert line.startswith(
        "lora_recomputed = recomputed([(out_lora_a_weight_2, also_lora_a_weight_2)]"
    )
    assert not Recompute()(graph).modified
