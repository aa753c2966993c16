"""What an export learnt about sizes, on tiny programs: conditions, fixed sizes, asserts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from lora_fx.conditions import Condition
from lora_fx.fx.capture.guards import BRANCH, LAYOUT, UNKNOWN, Guard, GuardLog
from lora_fx.fx.capture.learnt_sizes import Learnt, learn
from lora_fx.fx.capture.size_nodes import (
    asserted_expression,
    condition_of,
    constants_of,
    drop_layout,
    put_asserts,
)
from lora_fx.fx.graph.nodes import value

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


def exported(forward: Callable[..., Any]) -> tuple[ExportedProgram, fx.Graph, GuardLog]:
    log = GuardLog()
    dims = {0: Dim.AUTO, 1: Dim.AUTO}
    with log.listening():
        program = torch.export.export(
            Net(forward), (torch.ones(3, 4), torch.ones(3, 4)), dynamic_shapes=(dims, dims),
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
    return program, program.module(check_guards=False).graph, log


def learnt_of(forward: Callable[..., Any]) -> tuple[Learnt, fx.Graph]:
    program, graph, log = exported(forward)
    return learn(program, graph, ["x", "y"], log), graph


def below_eight(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[0] < 8 else x - y.sum()


def demanded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[0] >= 3)
    return x * 2 + y.sum()


def apart_sizes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.sum() + y.sum()


@pytest.mark.parametrize(
    ("forward", "texts"),
    [
        (apart_sizes, []),
        (below_eight, [("s0 <= 7", (("s0", "x", 0),), False)]),
        (demanded, [("s0 >= 3", (("s0", "x", 0),), True)]),
        (lambda x, y: x + y,
         [("s0 == s1", (("s0", "x", 1), ("s1", "y", 1)), True),
          ("s0 == s1", (("s0", "x", 0), ("s1", "y", 0)), True),
          ("s0 == s1", (("s0", "y", 0), ("s1", "x", 0)), True),
          ("s0 == s1", (("s0", "y", 1), ("s1", "x", 1)), True)]),
    ],
    ids=["apart", "branch", "demand", "equal"],
)  # fmt: skip
def test_conditions_are_learnt(forward: Callable[..., Any], texts: list[Any]) -> None:
    learnt, graph = learnt_of(forward)
    assert [(c.text, c.sizes, c.demanded) for c in learnt.conditions] == texts
    assert not graph.find_nodes(op="call_function", target=aten._assert_scalar.default)
    for condition in learnt.conditions:
        assert forward.__name__ == "<lambda>" or f"in {forward.__name__}" in condition.line


def test_a_folder_whose_name_begins_as_torchs_is_not_torch() -> None:
    """Code of torchvision asks as a user's code does, and its line is named."""
    path = torch.__file__.replace("/torch/__init__.py", "/torchvision/net.py")
    names: dict[str, Any] = {}
    source = "def short(x, y):\n    return x + 1 if x.shape[0] < 8 else x - y.sum()\n"
    exec(compile(source, path, "exec"), names)
    learnt, _ = learnt_of(names["short"])
    (condition,) = learnt.conditions
    assert condition.line.startswith(f"{path}, line 2, in short") and not condition.demanded


def test_a_size_that_an_equation_leaves_no_choice_is_fixed() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] * 3 == 12 else y

    learnt, _ = learnt_of(forward)
    assert learnt.sizes[0] is not None and learnt.sizes[0][1] == 4
    assert "in forward" in learnt.fixed[0, 1] and learnt.conditions == []


def test_a_squeezed_size_is_not_one() -> None:
    learnt, graph = learnt_of(apart_sizes)
    x, y = graph.find_nodes(op="placeholder")
    trace = 'File "/user/net.py", line 3, in forward\n    return x.squeeze(1)'
    with graph.inserting_after(y):
        graph.call_function(aten.squeeze.default, (y,))
        graph.call_function(aten.squeeze.dims, (x, [0, 1]))
        graph.call_function(aten.squeeze.dim, (x, 1)).meta["stack_trace"] = trace
    learnt.add_squeezed(graph)
    rows = [(c.text, *c.sizes[0][1:], c.line) for c in learnt.conditions]
    assert rows == [
        ("s0 != 1", "x", 1, "/user/net.py, line 3, in forward"),
        ("s0 != 1", "x", 0, UNKNOWN),
        ("s0 != 1", "x", 1, UNKNOWN),
        ("s0 != 1", "y", 0, UNKNOWN),
        ("s0 != 1", "y", 1, UNKNOWN),
    ]


def test_a_size_of_which_nothing_can_be_said_is_fixed() -> None:
    learnt, _ = learnt_of(apart_sizes)
    learnt.symbols.clear()
    learnt.add_equations()
    assert learnt.sizes == [[3, 4], [3, 4]] and learnt.conditions == []


def test_doubts_are_listed_apart_and_idle_conditions_dropped() -> None:
    learnt = Learnt(["x"], [None], GuardLog())
    sizes = (("s0", "x", 0),)
    for text, kind in (("s0 != 1", BRANCH), ("s0 < 5", LAYOUT), ("s0 > -1", BRANCH)):
        learnt.add_condition(Condition(text, sizes), Guard(None, kind, ""))
    learnt.add_condition(Condition("s0 < 7", sizes), Guard(None, BRANCH, ""))
    assert [c.text for c in learnt.doubtful] == ["s0 != 1", "s0 < 5"]
    assert [c.text for c in learnt.conditions] == ["s0 < 7"]


def test_only_comparisons_of_sizes_are_conditions() -> None:
    _, graph = learnt_of(apart_sizes)
    x, _ = graph.find_nodes(op="placeholder")
    guard = Guard(None, BRANCH, "line")
    with graph.inserting_after(x):
        n = graph.call_function(aten.sym_size.int, (x, 0))
        small = graph.call_function(torch.ops.aten.lt.Scalar, (x, 3))
        both = graph.call_function(
            operator.and_,
            (graph.call_function(operator.lt, (n, 9)),
             graph.call_function(operator.eq, (n, 4))),
        )  # fmt: skip
        neither = graph.call_function(torch.sym_not, (both,))
        largest = graph.call_function(torch.sym_max, (n, 3))
        above = graph.call_function(operator.gt, (largest, 2))
    names = {x: "x"}
    assert condition_of(small, names, guard) is None
    assert condition_of(True, names, guard) is None
    for node, text in ((neither, "(s0 >= 9) or (s0 != 4)"), (above, "max(s0, 3) > 2")):
        condition = condition_of(node, names, guard)
        assert condition is not None and condition.text == text
        assert condition.sizes == (("s0", "x", 0),) and condition.line == "line"
    assert asserted_expression(small) == "" and constants_of(graph) == ()


def test_asserts_are_written_and_those_of_layout_erased() -> None:
    _, graph, _ = exported(apart_sizes)
    x, _ = graph.find_nodes(op="placeholder")
    written_condition = Condition("s0 < 9", (("s0", "x", 0),))
    put_asserts(graph, {"x": x}, [written_condition, Condition("s0 < 8", (("s0", "z", 0),))])
    (written,) = graph.find_nodes(op="call_function", target=aten._assert_scalar.default)
    symbol = value(x).shape[0]
    tests = {"less": symbol < 9, "other": symbol < 11}
    nodes = {}
    for text, test in tests.items():
        with graph.inserting_after(written):
            test_node = graph.call_function(operator.lt, (x, 0))
            test_node.meta["val"] = test
            message = f"Runtime assertion failed for expression {text} on node '{text}'"
        with graph.inserting_after(test_node):
            nodes[text] = graph.call_function(aten._assert_scalar.default, (test_node, message))
    graph.erase_node(written)
    log = GuardLog()
    log.guards = {text: Guard(None, LAYOUT, "") for text in tests}
    assert [asserted_expression(node) for node in nodes.values()] == list(tests)
    drop_layout(
        graph,
        log,
        {"x": value(x).shape},
        [written_condition, Condition("s0 < 11", (("s0", "z", 0),))],
    )
    assert graph.find_nodes(op="call_function", target=aten._assert_scalar.default) == [
        nodes["less"]
    ]


def test_without_torchs_log_lines_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.fx.symbolic_sizes import ShapeEnv

    log = GuardLog()
    with monkeypatch.context() as patches:
        patches.delattr(ShapeEnv, "_log_guard")
        with log.listening():
            pass
    assert log.guards == {} and log.of("x").line == UNKNOWN


def test_numbers_beside_sizes_are_found() -> None:
    _, graph, _ = exported(lambda x, y: x[:, :2] + y[5:, -3:].sum() + x.shape[0] // 7)
    assert constants_of(graph) == (2, 3, 5, 7)
