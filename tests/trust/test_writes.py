"""Passes that move, join or recompute ask what the graph writes to in between.

On 788628f, through the public API: Column trained with wrong numbers and gradients, since share
joined two reads of different values; View, Added and Part ended in autograd's RuntimeError about a
value that was changed in place, which the frozen model never kept; Input was refused by the proof.
Source and the twins were right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.passes.clean import Clean
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.share import Share
from tests.fx.module.test_module import perturb


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class Column(Two):
    def forward(self, x: Tensor) -> Any:
        h = x.mT.clone()
        h[:, 0] = self.a(h)[:, 0]
        return self.b(h)


class View(Two):
    def forward(self, x: Tensor) -> Any:
        h = x.clone()
        rows = h.view(-1, 4)
        first = self.a(rows)
        h.mul_(2)
        return self.b(rows) + first


class Added(Two):
    def forward(self, x: Tensor) -> Any:
        h = F.gelu(x * 2)
        first = self.a(h)
        h.add_(1.0)
        return self.b(h) + first


class Part(Two):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(x + 1).clone()
        first = self.a(h)
        h.chunk(2, 1)[0].zero_()
        return self.b(h) + first


class Source(Two):
    """What an activation is computed of is written to before backward."""

    def forward(self, x: Tensor) -> Any:
        h = x * 1.0
        g = F.silu(h)
        first = self.a(g)
        h.add_(1.0)
        return self.b(g) + first + h


class Input(Two):
    """The model writes over what it was called with."""

    def forward(self, x: Tensor) -> Any:
        h = torch.sigmoid(x * 3)
        first = self.a(h)
        x.add_(1.0)
        return self.b(h) + first


class Twin(Two):
    def forward(self, x: Tensor) -> Any:
        h = F.silu(x * 2)
        return self.a(h) + self.b(h)


class Before(Two):
    """A write before both reads is in nobody's way."""

    def forward(self, x: Tensor) -> Any:
        h = x * 2
        h.relu_()
        return self.a(h) + self.b(h)


WRITTEN = [Column, View, Added, Part, Source, Input]
TWINS = [Twin, Before]


@pytest.mark.parametrize("kind", [*WRITTEN, *TWINS])
def test_training_is_that_of_the_model(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 4, 4)
    module = lora_fx.insert(model, (x,), rank=2, include="*")
    perturb(module)
    out = module.train()(x.clone())
    out.square().sum().backward()
    entries = module.adapter().lowrank
    factors = {k: (torch.tensor(u.a), torch.tensor(u.b), u.scale) for k, u in entries.items()}
    for a, b, _ in factors.values():
        a.requires_grad_(), b.requires_grad_()
    want = by_hand(model, factors, x.clone())
    want.square().sum().backward()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for key, (a, b) in insertion_of(module).slots().items():
        for ours, theirs in ((a, factors[key][0]), (b, factors[key][1])):
            assert ours.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def by_hand(model: Two, factors: Any, x: Tensor) -> Tensor:
    """W + s·BA in eager torch, where every layer reads a copy, as autograd asks for."""
    for name in ("a", "b"):
        layer, (a, b, s) = getattr(model, name), factors[f"{name}.weight"]
        weight = layer.weight.detach() + s * b @ a
        layer.forward = lambda v, w=weight, c=layer.bias: F.linear(v.clone(), w, c.detach())
    result: Tensor = model(x)
    return result


def products(graph: FxGraph) -> int:
    return sum("matmul" in str(n.target) for n in graph.graph.nodes)


@cache
def inserted(kind: type[Two]) -> FxGraph:
    """The train graph with branches as passes get it, and no copies that help them."""
    model, x = kind(), torch.randn(2, 4, 4)
    module = lora_fx.insert(model, (x,), rank=2, include="*", fast=False)
    graph = execution_of(module).captured.fx_graph(training=True, root=module)
    graph.training = False  # so that nothing is copied for backward
    Insert(module.updates)(graph)
    return graph


@pytest.mark.parametrize("kind", [Column, View, Added, Part, Twin, Before])
def test_share_joins_what_reads_one_value_only(kind: type[Two]) -> None:
    graph = inserted(kind).clone()
    before = products(graph)
    Share()(graph)
    assert (products(graph) < before) == (kind in TWINS)


@pytest.mark.parametrize("kind", [*WRITTEN, Before])
@pytest.mark.parametrize("make", [Clean, Share, Recompute, Fuse])
def test_no_pass_changes_what_is_computed(kind: type[Two], make: Any) -> None:
    graph = inserted(kind)
    plain, edited = graph.clone(), graph.clone()
    make()(edited)
    x = torch.randn(2, 4, 4)
    runs = [
        torch.fx.Interpreter(torch.fx.GraphModule(graph.root, g.graph)) for g in (plain, edited)
    ]
    first, second = (r.run(x.clone())[0] for r in runs)
    torch.testing.assert_close(second, first)


def test_a_storage_is_followed_through_views_and_back() -> None:
    graph = inserted(View)
    nodes = {n.name: n for n in graph.graph.nodes}
    writes = Writes(graph.graph)
    view = next(n for name, n in nodes.items() if name.startswith(("view", "reshape")))
    first, last = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert writes.between(view, first, last)
    assert not writes.between(first, first, last)
    assert view in writes.ever()
