"""One node of every kind is decomposed: the program is the one that torch's own way makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

import lora_fx
from lora_fx.fx.capture.trace import quiet
from lora_fx.fx.lowering import decomposition as lowering
from lora_fx.fx.lowering.decomposition import lowered
from lora_fx.fx.lowering.functional_ops import without_writes
from lora_fx.fx.lowering.graph_program import program_of
from lora_fx.fx.onnx_export import to_onnx
from lora_fx.onnx.session import open_session

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch warns about its own parts."""
    with quiet():
        yield


W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Tensor, Tensor], Any]


class Of(nn.Module):
    """A function of x [n, s, 5] and the weight [7, 5] as a model."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.weight = nn.Parameter(W.clone())
        self.of = forward

    def forward(self, x: Tensor) -> Any:
        return self.of(x, self.weight)


def _attention(x: Tensor, w: Tensor) -> Tensor:
    q = F.linear(x, w)[:, None]
    return F.scaled_dot_product_attention(q, q, q * 2, is_causal=True)


def _deep(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.tanh(F.linear(F.layer_norm(F.linear(x, w), (7,)), w.t()))
    return x


CASES: dict[str, Forward] = {
    "linear": lambda x, w: F.linear(x, w),
    "twice": lambda x, w: (F.gelu(x @ w.t()), F.gelu(x.flip(1) @ w.t())),
    "sizes": lambda x, w: F.linear(x, w).reshape(x.shape[0], -1).unflatten(1, (x.shape[1], 7)),
    "a size of a size": lambda x, w: F.linear(x, w)[:, : (x.shape[1] + 1) // 2].flatten(),
    "parts": lambda x, w: [p + 1 for p in F.linear(x, w).chunk(3, -1)],
    "parts that are outputs": lambda x, w: F.linear(x, w).split([2, 5], -1),
    "an input that is an output": lambda x, w: (x.to(x.dtype), F.linear(x, w)),
    "norms": lambda x, w: F.layer_norm(F.linear(x, w), (7,)) + F.normalize(x @ w.t(), dim=-1),
    "attention": _attention,
    "einsum": lambda x, w: torch.einsum("nsi,oi->nos", x, w),
    "dropout": lambda x, w: F.dropout(F.linear(x, w), 0.5, training=False),
    "dtypes": lambda x, w: F.linear(x, w).to(torch.float64).diff(dim=-1).float(),
    "masks": lambda x, w: F.linear(x, w).masked_fill((x.sum(-1, True) > 0) & (x[..., :1] < 1), 0.0),
    "conv": lambda x, w: F.conv1d(x.transpose(1, 2), w[:, :, None], padding="same"),
    "depth": _deep,
}


def exported(forward: Forward, *, dynamic: bool = True) -> ExportedProgram:
    """The program of a function with a free batch and length."""
    shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if dynamic else None
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    return torch.export.export(Of(forward).eval(), (x,), dynamic_shapes=(shape,))


TABLE = torch.export.default_decompositions().materialize()
KEPT = {k: v for k, v in TABLE.items() if k not in (aten.linear.default, aten.layer_norm.default)}


def counts(program: ExportedProgram) -> Counter[str]:
    """How often every operator of tensors stands in a program; checks have no value."""
    checks = {str(c) for c in lowering.CHECKS}
    targets = [str(n.target) for n in program.graph.nodes if isinstance(n.target, OpOverload)]
    return Counter(t for t in targets if t not in checks and "sym_size" not in t)


FEW = ("a size of a size", "parts", "norms")
ROWS = [
    *((case, True, TABLE) for case in CASES),
    *((case, False, TABLE) for case in FEW),
    *((case, True, KEPT) for case in FEW),
]


@pytest.mark.parametrize(("case", "dynamic", "table"), ROWS)
def test_a_program_is_the_one_that_torch_makes(
    case: str, dynamic: bool, table: dict[Any, Any]
) -> None:
    program = exported(CASES[case], dynamic=dynamic)
    want = program.run_decompositions(dict(table))
    got = lowered(program, table)
    assert got is program
    assert counts(got) == counts(want)
    got.graph_module.recompile()
    sizes = [(3, 4), (2, 9), (5, 1)] if dynamic else [(3, 4)]
    for n, s in sizes:
        x = torch.randn(n, s, 5, generator=torch.Generator().manual_seed(n))
        outs = got.graph_module(W, x)
        theirs = want.graph_module(W, x)
        for a, b in zip(outs, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    names = [s.arg.name for s in got.graph_signature.output_specs]
    assert names == [n.name for n in got.graph.output_node().args[0]]


def test_depth_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decomposed has as many nodes for six layers as for two."""
    seen: list[int] = []
    whole = lowering._decompose_all

    def counted(program: ExportedProgram, table: Any) -> ExportedProgram:
        seen.append(len(program.graph.nodes))
        return whole(program, table)

    monkeypatch.setattr(lowering, "_decompose_all", counted)

    def layers(count: int) -> Forward:
        def forward(x: Tensor, w: Tensor) -> Tensor:
            for _ in range(count):
                x = torch.tanh(F.linear(F.gelu(F.linear(x, w)), w.t()))
            return x

        return forward

    for count in (2, 6):
        lowered(exported(layers(count)), TABLE)
    assert seen[0] == seen[1] > 0


def test_sizes_that_nothing_has_are_not_known() -> None:
    """Such a part has no place, and the program goes the long way."""
    program = exported(CASES["sizes"])
    fixed = exported(CASES["linear"], dynamic=False).graph
    nodes = [n for n in program.graph.nodes if lowering._comes_apart(n, TABLE)]
    parts = lowering._decompositions(nodes, program, TABLE)
    assert all(lowering._sizes_are_available(part, program.graph) for part in parts)
    bare = [replace(part, inputs=()) for part in parts]
    assert all(lowering._sizes_are_available(part, program.graph) for part in bare)
    assert not all(lowering._sizes_are_available(part, fixed) for part in bare)


def _in_place(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    h[:, 0] = 1.0
    return h


def _loop(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    return torch.cond(h.sum() > 0, lambda h: h + 1, lambda h: h - 1, (h,))


def _counted(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)[x[..., 0] > 0]


WHOLES: dict[str, Forward] = {"in place": _in_place, "a body": _loop, "counted": _counted}


@pytest.mark.parametrize("case", WHOLES)
def test_what_no_node_tells_alone_is_decomposed_as_a_whole(case: str) -> None:
    program = exported(WHOLES[case])
    want = program.run_decompositions(dict(TABLE))
    got = lowered(program, TABLE)
    assert got is not program
    assert counts(got) == counts(want)


def _shares(x: Tensor, w: Tensor) -> Tensor:
    """As routers do: the values of a topk are written into, and its places are read later."""
    shares, places = torch.topk((x @ w.t()).softmax(-1), 2)
    shares /= shares.sum(-1, keepdim=True)
    return shares * places


def _into_a_view(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    h.flatten(1).add_(1.0)
    return h


def _read_before(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    return h.sum() + h.mul_(2.0)


def _read_later(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    again = h.transpose(0, 1)
    h.mul_(2.0)
    return again


def _into_the_input(x: Tensor, w: Tensor) -> Tensor:
    x.add_(1.0)
    return F.linear(x, w)


def _rounded(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w).half()
    return h.add_(F.linear(x, w))


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        (lambda x, w: F.relu(F.linear(x, w), inplace=True), 0),
        (lambda x, w: F.relu(F.linear(x, w), inplace=True).add_(1.0).mul_(x.shape[1]), 0),
        (lambda x, w: F.hardswish(x @ w.t(), inplace=True) + x.sum(), 0),
        (lambda x, w: F.dropout(F.linear(x, w), training=False, inplace=True), 0),
        (_read_before, 0),
        (_shares, 0),
        (_into_a_view, 1),
        (_read_later, 1),
        (_into_the_input, 1),
        (_rounded, 1),
    ],
)
def test_a_write_that_nobody_else_sees_gives_a_value(forward: Forward, left: int) -> None:
    module = exported(forward).module(check_guards=False)
    without_writes(module.graph)
    module.recompile()
    schemas = [getattr(n.target, "_schema", None) for n in module.graph.nodes]
    assert sum(s is not None and s.is_mutable for s in schemas) == left
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(x.clone()), forward(x.clone(), W), rtol=0, atol=0)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))


def test_a_size_of_another_part() -> None:
    """What flatten joins is made of the sides that the convolution reads."""
    shape = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    given = (torch.randn(2, 3, 16, 12),)
    program = torch.export.export(Patches().eval(), given, dynamic_shapes=(shape,))
    want = program.run_decompositions(dict(TABLE))
    got = lowered(program, TABLE)
    assert got is program
    assert counts(got) == counts(want)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sum() / x.numel()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state1, self.state0 = (nn.Parameter(torch.randn(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.state1).tanh() + self.state0


@pytest.mark.parametrize(
    ("model", "shape", "free"),
    [(Patches(), (2, 3, 16, 12), {2: "h", 3: "w"}), (Mean(), (2, 5, 8), {1: "s"}),
     (Named(), (2, 5, 8), {1: "s"})],
    ids=["sizes of another part", "numel", "names of placeholders"],
)  # fmt: skip
def test_an_export_of_sizes_and_names(
    model: nn.Module, shape: tuple[int, ...], free: dict[int, str], tmp_path: Path
) -> None:
    x = torch.randn(shape)
    model.eval()
    lora_fx.export(model, tmp_path / "m.onnx", (x,), provider="cpu", dynamic={"x": free})
    session = open_session(tmp_path / "m.onnx", "cpu")
    other = torch.randn([n + 4 * (d in free) for d, n in enumerate(shape)])
    for given in (x, other):
        got = next(iter(session.run({"x": given.numpy()}).values()))
        np.testing.assert_allclose(got, model(given).detach(), rtol=1e-5, atol=1e-5)


def test_dimensions_that_have_to_be_equal_keep_their_names(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 6)

        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            if q.shape[1] != k.shape[1]:
                raise ValueError("no")
            return self.fc(q), self.fc(k)

    args = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    dynamic = {"q": {1: "ql"}, "k": {1: "kl"}}
    lora_fx.export(Pair().eval(), tmp_path / "m.onnx", args, provider="cpu", dynamic=dynamic)
    session = open_session(tmp_path / "m.onnx", "cpu")
    shapes = {i.name: i.shape[1] for i in session.session.get_inputs()}
    assert shapes == {"q": "ql", "k": "kl"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 5, bias=False)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + self.shift


def test_an_export_traces_a_model_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(to_onnx, "export_program", never)
    assert lora_fx.export(Net().eval(), tmp_path / "m.onnx", (torch.randn(3, 5),), provider="cpu")


def flat(change: Callable[[fx.Graph], None] = lambda g: None) -> fx.GraphModule:
    """The graph of a net with a free batch, its tensors read by name."""
    module = torch.export.export(
        Net().eval(), (torch.randn(3, 5),), dynamic_shapes=({0: Dim.DYNAMIC},)
    ).module(check_guards=False)
    module.graph.set_codegen(fx.graph.CodeGen())
    change(module.graph)
    module.recompile()
    return module


def _no_value(graph: fx.Graph) -> None:
    next(n for n in graph.nodes if n.target is aten.tanh.default).meta.pop("val")


def _our_own(graph: fx.Graph) -> None:
    next(n for n in graph.nodes if n.target is aten.tanh.default).target = torch.tanh


@pytest.mark.parametrize(
    ("change", "x", "free", "made"),
    [
        (lambda g: None, torch.randn(3, 5), {0}, True),
        (lambda g: None, torch.randn(4, 5), {0}, True),
        (lambda g: None, torch.randn(3, 5), (), False),  # the batch was to be fixed
        (lambda g: None, torch.randn(3, 6), {0}, False),
        (lambda g: None, torch.randn(3, 5).double(), {0}, False),  # cast since
        (_no_value, torch.randn(3, 5), {0}, False),
        (_our_own, torch.randn(3, 5), {0}, False),
    ],
    ids=["as captured", "another size", "fixed", "another width", "cast", "no value", "our own"],
)
def test_a_program_is_made_by_hand_where_the_values_are_known(
    change: Callable[[fx.Graph], None], x: Tensor, free: Any, made: bool
) -> None:
    module = flat(change)
    program = program_of(module, [x], [free])
    assert (program is not None) is made
    if program is not None:
        assert program.graph_signature.parameters == ("a.weight", "a.bias", "b.weight")
        assert program.graph_signature.buffers == ("shift",)
        torch.testing.assert_close(program.module(check_guards=False)(x), module(x))


def test_a_cast_weight_has_no_program_by_hand() -> None:
    module = flat()
    module.b.weight = nn.Parameter(module.b.weight.double())
    assert program_of(module, [torch.randn(3, 5)], [{0}]) is None


class Promoted(nn.Module):
    """Floats times integers, and integers by a number: types that ONNX needs casts for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * n + n.sum(-1, keepdim=True) / 3


def test_operands_of_two_types_are_cast(tmp_path: Path) -> None:
    args = torch.randn(3, 4), torch.arange(18).reshape(3, 6)
    lora_fx.export(Promoted().eval(), tmp_path / "m.onnx", args, provider="cpu")
    casts = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Cast"]
    assert len(casts) == 2
