"""Parts of a trace on tiny graphs: loops over experts, placeholders, marks of blocks, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.fx.capture.block_copies import NotRepeated, write_out
from lora_fx.fx.capture.cleaned_graph import match_places
from lora_fx.fx.capture.expert_forms import EveryTurn, traceable_experts
from lora_fx.fx.capture.finite_numbers import NOTE, FiniteNumbers
from lora_fx.fx.capture.observed import EveryLayer
from lora_fx.fx.capture.repeat import AGAIN, END, START
from lora_fx.fx.capture.unchanged import as_it_was, same_attributes, same_dtypes

MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("unbound", [False, True])
def test_a_loop_over_true_places_runs_over_all(squeezed: bool, unbound: bool) -> None:
    with EveryTurn() as loops:
        places = MASK.nonzero()
        if squeezed:
            places = places.squeeze(1)
        turns = places.unbind(0) if unbound else list(places)
        names = [f"{turn}" for turn in turns if not turn.dim()]
    assert [turn.tolist() for turn in turns] == ([0, 1, 2] if squeezed else [[0], [1], [2]])
    assert names == (["0", "1", "2"] if squeezed else [])
    assert loops.turns == [3]


def test_other_loops_run_as_they_are() -> None:
    with EveryTurn() as loops:
        assert len(torch.ones(4, 2).unbind()) == 4
        assert len(torch.eye(2).nonzero().unbind()) == 2
        assert len(MASK.nonzero().squeeze(0).unbind()) == 2
    assert loops.turns == []


def test_no_layer_is_dropped() -> None:
    notes: list[str] = []
    with EveryLayer(notes):
        assert torch.rand(2).shape == (2,) and not notes
        number: Any = torch.rand([])
        assert number == 1.0 and number.item() == 1.0
    assert notes == ["layer drop is off in train mode: a graph contains every layer"]


class Clamps(nn.Module):
    """A layer whose numbers are clamped where one is not finite, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if not torch.isfinite(y).all() or torch.isinf(y).any() or y.isnan().any():
            y = y.clamp(-1.0, 1.0)
        return y


def test_a_branch_on_finite_numbers_is_captured_for_all_sizes() -> None:
    model = Clamps()
    cap = lora_fx.capture(model, (torch.ones(2, 4),))
    for graph in (cap.train, cap.eval):
        x = 5 * torch.randn(7, 4)
        (y,) = graph(x)
        assert torch.equal(y, model(x))
    assert not cap.pinned and [*cap.notes] == [NOTE]


def test_other_branches_on_values_stay() -> None:
    notes: list[str] = []
    with FiniteNumbers(notes):
        bad = torch.tensor([1.0, torch.inf])
        assert torch.isfinite(bad).any() and not torch.isinf(bad).all()
        assert (bad > 2).any() and not (bad > 2).all()
    assert notes == []


def test_experts_of_other_libraries_stay() -> None:
    experts = nn.Linear(2, 2)
    experts._apply_gate = experts.config = None
    with traceable_experts(nn.Sequential(experts), portable=False) as notes:
        assert notes == ()


def test_each_leaf_has_a_placeholder() -> None:
    graph = fx.Graph()
    x, number, y = (graph.placeholder(name) for name in ("x", "number", "y"))
    x.meta["val"], number.meta["val"], y.meta["val"] = torch.ones(1), 3, torch.ones(2)
    graph.output((graph.call_function(torch.add, (x, number)), y))
    match_places(graph, [None, torch.ones(1), 3, torch.ones(2), "mode"])
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    assert names == ["constant_0", "x", "constant_2", "y", "constant_4"]
    (added,) = graph.find_nodes(op="call_function", target=torch.add)
    assert added.args == (x, 3)
    graph.lint()


class Inner(nn.Module):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.body = fx.GraphModule(nn.Module(), graph)


def marked(case: str) -> fx.GraphModule:
    """A graph with one opaque node that stands for no copy."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    outside = graph.call_function(torch.neg, (x,))
    if case != "no start":
        graph.call_function(START, ([x], 7))
    shared = outside if case == "reads outside" else x
    inside = graph.call_function(torch.add, (x, shared))
    if case not in ("no start", "no end"):
        graph.call_function(END, ([inside], 7))
    again = graph.call_function(AGAIN, ([y], 7))
    graph.output((graph.call_function(torch.ops.aten.relu.default, (again,)), inside))
    root = nn.Module()
    if case == "in a body":
        body = fx.Graph()
        body.call_function(START, ([body.placeholder("x")], 7))
        body.output(())
        root = Inner(body)
        graph = fx.Graph()
        graph.output((graph.call_module("body", (graph.placeholder("x"),)),))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize("case", ["no start", "no end", "reads outside", "in a body"])
def test_marks_without_copies_are_refused(case: str) -> None:
    with pytest.raises(NotRepeated):
        write_out(marked(case))


def test_a_cast_to_the_same_dtype_replaces_nothing() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight
    data = weight.data_ptr()
    with same_dtypes():
        assert layer.float().weight is weight and weight.data_ptr() == data
        assert layer.double().weight.dtype == torch.float64


def test_attributes_are_the_same_things_after_a_trace() -> None:
    shared: Any = [1, {"a": (2, [3])}]
    model: Any = nn.Sequential(nn.ReLU(), nn.ReLU())
    for layer in model:
        layer.shared = shared
    inner = shared[1]["a"][1]
    with same_attributes(model):
        model[0].shared = []
        shared.clear()
        inner.append(4)
    assert model[0].shared is shared and model[1].shared is shared
    assert shared == [1, {"a": (2, [3])}] and shared[1]["a"][1] is inner


def test_a_run_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    norm: Any = model[0]
    mean = norm.running_mean
    norm.frozen = "yes"
    with as_it_was(model, training=True):
        model(torch.ones(3, 2))
        norm.running_mean = torch.ones(2)
        norm.frozen = "no"
        model[1] = nn.Identity()
        assert model.training
    assert norm.running_mean is mean and not mean.any() and norm.frozen == "yes"
    assert isinstance(model[1], nn.Dropout) and model.training
    lazy = nn.LazyLinear(2)
    with as_it_was(lazy, training=None):
        lazy(torch.ones(1, 3))
    assert type(lazy) is nn.Linear and lazy.in_features == 3
