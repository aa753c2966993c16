"""Branches of one input as one product, and their ends as one op: text, twins, numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.open import capture
from tests.passes.test_golden import dedent, text, updates
from tests.passes.test_recompute import Net, gradients, pair, same


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


def body(graph: FxGraph) -> str:
    """The graph without the reads of the base's tensors before its first op."""
    lines = text(graph).splitlines()
    return "\n".join(lines[next(i for i, x in enumerate(lines) if x.startswith("linear = ")) :])


def test_golden_share(cap: Captured) -> None:
    graph = inserted(cap, "q.weight", "k.weight")
    assert Share()(graph).modified
    assert body(graph) == dedent("""
        linear = linear(named_x, q_weight, q_bias)
        q_lora_b_weight = q.lora_B.weight
        lora_mul = mul(q_lora_b_weight, 2.0)
        lora_type_as_1 = type_as(lora_mul, named_x)
        q_lora_a_weight_1 = q.lora_A.weight
        k_lora_a_weight_1 = k.lora_A.weight
        lora_cat = cat([q_lora_a_weight_1, k_lora_a_weight_1])
        lora_type_as_4 = type_as(lora_cat, named_x)
        lora_permute_4 = permute(lora_type_as_4, [1, 0])
        lora_matmul_4 = matmul(named_x, lora_permute_4)
        lora_split_with_sizes = split_with_sizes(lora_matmul_4, [2, 2], -1)
        lora_getitem = getitem(lora_split_with_sizes, 0)
        lora_getitem_1 = getitem(lora_split_with_sizes, 1)
        lora_permute_1 = permute(lora_type_as_1, [1, 0])
        lora_matmul_1 = matmul(lora_getitem, lora_permute_1)
        lora_add = add(linear, lora_matmul_1)
        linear_1 = linear(lora_add, o_weight, o_bias)
        linear_2 = linear(named_x, k_weight, k_bias)
        k_lora_b_weight = k.lora_B.weight
        lora_mul_1 = mul(k_lora_b_weight, 2.0)
        lora_type_as_3 = type_as(lora_mul_1, named_x)
        lora_permute_3 = permute(lora_type_as_3, [1, 0])
        lora_matmul_3 = matmul(lora_getitem_1, lora_permute_3)
        lora_add_1 = add(linear_2, lora_matmul_3)
        sum_1 = sum(lora_add_1, [-1], True)
        mul = mul(linear_1, sum_1)
    """)
    before = text(graph)
    assert not Share()(graph).modified
    assert text(graph) == before


def test_golden_fuse(cap: Captured) -> None:
    graph = inserted(cap, "q.weight")
    assert Fuse()(graph).modified
    assert body(graph) == dedent("""
        linear = linear(named_x, q_weight, q_bias)
        q_lora_a_weight = q.lora_A.weight
        lora_type_as = type_as(q_lora_a_weight, named_x)
        q_lora_b_weight = q.lora_B.weight
        lora_permute = permute(lora_type_as, [1, 0])
        lora_matmul = matmul(named_x, lora_permute)
        lora_flatten = flatten(linear, 0, -2)
        lora_flatten_1 = flatten(lora_matmul, 0, -2)
        lora_type_as_2 = type_as(q_lora_b_weight, named_x)
        lora_permute_2 = permute(lora_type_as_2, [1, 0])
        lora_addmm = addmm(lora_flatten, lora_flatten_1, lora_permute_2)
        lora_view_as = view_as(lora_addmm, linear)
        linear_1 = linear(lora_view_as, o_weight, o_bias)
        linear_2 = linear(named_x, k_weight, k_bias)
        sum_1 = sum(linear_2, [-1], True)
        mul = mul(linear_1, sum_1)
    """)
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.addmm.default)
    assert dict(node.kwargs) == {"alpha": 2.0}
    before = text(graph)
    assert not Fuse()(graph).modified
    assert text(graph) == before


def test_twins_stay_as_they_are(cap: Captured) -> None:
    for graph in (
        inserted(cap, "q.weight", "o.weight"),  # two inputs
        inserted(cap, "q.weight", "k.weight", dropout=0.1),  # each drops by itself
    ):
        before = text(graph)
        assert not Share()(graph).modified
        assert text(graph) == before
    graph = inserted(cap, "q.weight", "k.weight")
    assert not Share(blocks=("q", "k"))(graph).modified, "two blocks"


def test_no_fuse_of_one_row() -> None:
    net = nn.Linear(6, 4)
    cap = capture(net, (torch.randn(6),), dynamic={}, static=["input"])
    graph = inserted(cap, "weight")
    assert not Fuse()(graph).modified


def test_no_fuse_of_the_weight_form(cap: Captured) -> None:
    graph = cap.fx_graph(training=True)
    Insert(updates(cap, "q.weight"), weight_form=True)(graph)
    assert not Fuse()(graph).modified and not Share()(graph).modified


def test_numbers(cap: Captured) -> None:
    x = torch.randn(3, 7, 6)
    for options in ({}, {"dropout": 0.4}, {"variant": "dora"}, {"init": "pissa"}):
        for make in (Two, Net):
            found = []
            for m in pair(make, x, **options):
                torch.manual_seed(9)
                found.append(gradients(m, x))
            same(found[0], found[1], 1e-5)


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
