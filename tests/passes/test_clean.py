"""What captures spell out becomes the op that it is, and nothing that only looks like it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.fx.graph.graph import FxGraph
from lora_fx.passes.clean import Clean
from lora_fx.passes.verbs.open import capture
from tests.passes.test_golden import text

Mask = Callable[[Tensor], Tensor]
INF = float("inf")


class Attend(nn.Module):
    """Attention of x to itself under a mask that is computed from the length of x."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask(x))


def length(x: Tensor) -> int:
    return x.shape[1]


def arange(x: Tensor) -> Tensor:
    return torch.arange(length(x), device=x.device)


def lower(x: Tensor, diagonal: int = 0) -> Tensor:
    return torch.ones(length(x), length(x), dtype=torch.bool).tril(diagonal)


def additive(x: Tensor) -> Tensor:
    return torch.triu(torch.full((length(x), length(x)), -INF), diagonal=1)


def chosen(x: Tensor) -> Tensor:
    keep = arange(x)[None, :] <= arange(x)[:, None]
    return torch.where(keep, 0.0, torch.finfo(torch.float32).min)


def filled(x: Tensor) -> Tensor:
    later = torch.triu(torch.ones(length(x), length(x)), diagonal=1) != 0
    return torch.zeros(length(x), length(x)).masked_fill(later, -INF)


def packed(x: Tensor) -> Tensor:
    """Of documents that follow each other, where there is only one."""
    at = arange(x)[None].expand(x.shape[0], -1)
    document = (torch.diff(at, prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j, b = arange(x)[None, :, None], arange(x)[None, None, :], torch.arange(x.shape[0])
    row = b[:, None, None]
    return (at[row, j] <= at[row, i]) & (document[row, j] == document[row, i])


def within(x: Tensor) -> Tensor:
    gap = arange(x)[:, None] - arange(x)[None, :]
    return (gap >= 0) & (gap < 3)


def within_a_float(x: Tensor) -> Tensor:
    gap = arange(x)[:, None] - arange(x)[None, :]
    return (gap >= 0) & (gap < 7.5)


def within_a_fill(x: Tensor) -> Tensor:
    gap = arange(x)[:, None] - arange(x)[None, :]
    return (gap >= 0) & (gap < torch.full((length(x),), 7.0, dtype=torch.int64))


def within_a_sum(x: Tensor) -> Tensor:
    """One number that is read four times."""
    two = torch.full((length(x),), 2, dtype=torch.int64)
    four = two + two
    gap = arange(x)[:, None] - arange(x)[None, :]
    return (gap >= 0) & (gap - four < four)


def one_more(x: Tensor) -> Tensor:
    return lower(x, 1)


def transposed(x: Tensor) -> Tensor:
    return lower(x).transpose(0, 1)


def of_data(x: Tensor) -> Tensor:
    return lower(x) & (x[..., 0] > -INF)[:, None, :]


def in_place(x: Tensor) -> Tensor:
    """The first query is let see every key, through a view of the mask."""
    mask = lower(x).clone()
    mask[:1].fill_(True)
    return mask


def penalty(x: Tensor) -> Tensor:
    """Not removed: made less likely."""
    return torch.triu(torch.full((length(x), length(x)), -5.0), diagonal=1)


def from_the_end(x: Tensor) -> Tensor:
    """The first query's index is negative: it counts from the end, and lets every key through."""
    at = arange(x)
    return at[None, :] <= (at + 1)[at - 1][:, None]


def everything(x: Tensor) -> Tensor:
    return (arange(x) >= 0)[:, None].expand(length(x), length(x))


def run(graph: FxGraph, x: Tensor) -> Tensor:
    graph.lint()
    made: Tensor = torch.fx.GraphModule(graph.root, graph.graph)(x)[0]
    return made


def checked(net: nn.Module, step: Clean, x: Tensor, sizes: tuple[int, ...]) -> tuple[bool, str]:
    """(modified, text) of a module's train graph, which must compute what the module does."""
    graph = capture(net, (x,)).fx_graph(training=True)
    before = text(graph)
    modified = step(graph).modified
    assert modified or text(graph) == before
    assert not step(graph).modified
    for n in sizes:
        torch.manual_seed(n)
        given = torch.randn(2, n, *x.shape[2:])
        torch.testing.assert_close(run(graph, given), net(given), rtol=1e-5, atol=1e-5)
    return modified, text(graph)


CAUSAL = [lower, additive, chosen, filled, packed]


@pytest.mark.parametrize("mask", CAUSAL, ids=lambda m: m.__name__)
def test_causal_masks(mask: Mask) -> None:
    modified, after = checked(Attend(mask), Clean(), torch.randn(2, 6, 8), (6, 9, 2))
    assert modified
    assert (
        after
        == "scaled_dot_product_attention = scaled_dot_product_attention(named_x, named_x, named_x)"
    )


OTHERS = [
    within,
    within_a_float,
    within_a_fill,
    within_a_sum,
    one_more,
    transposed,
    of_data,
    in_place,
    penalty,
    from_the_end,
]


@pytest.mark.parametrize("mask", OTHERS, ids=lambda m: m.__name__)
def test_masks_that_only_look_like_it(mask: Mask) -> None:
    _, after = checked(Attend(mask), Clean(), torch.randn(2, 6, 8), (6, 9, 3, 12))
    assert "(named_x, named_x, named_x, " in after


@pytest.mark.parametrize("device", ["meta", "cuda:0"])
def test_masks_of_other_devices(device: str) -> None:
    """A program is cleaned where it is opened: this machine may have no such device."""
    graph = capture(Attend(lower), (torch.randn(2, 6, 8),)).fx_graph(training=True)
    made = [n for n in graph.graph.nodes if "device" in n.kwargs]
    for node in made:
        node.kwargs = {**node.kwargs, "device": torch.device(device)}
    assert made
    Clean()(graph)
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert node.args[3:5] == (None, True) or node.kwargs == {"is_causal": True}


def test_a_mask_that_lets_everything_through() -> None:
    graph = capture(Attend(everything), (torch.randn(2, 6, 8),)).fx_graph(True)
    assert Clean()(graph).modified
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert dict(node.kwargs) == {} and len(node.args) == 3


class Heads(nn.Module):
    """Four query heads, two of keys and values, repeated in some way."""

    def __init__(
        self, repeat: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.repeat, self.other = repeat, other

    def forward(self, x: Tensor) -> Tensor:
        b, s = x.shape[:2]
        q = x.view(b, s, 4, 6).transpose(1, 2)
        k = x[..., :12].view(b, s, 2, 6).transpose(1, 2)
        return F.scaled_dot_product_attention(q, self.repeat(k), self.other(k * 2))


def expanded(k: Tensor) -> Tensor:
    b, h, s, d = k.shape
    return k[:, :, None, :, :].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)


def interleaved(k: Tensor) -> Tensor:
    return k.repeat_interleave(2, 1)


def tiled(k: Tensor) -> Tensor:
    """Heads 0 1 0 1, not 0 0 1 1."""
    b, h, s, d = k.shape
    return k[:, None].expand(b, 2, h, s, d).reshape(b, h * 2, s, d)


@pytest.mark.parametrize(
    ("key", "value", "folded"),
    [
        (expanded, expanded, True),
        (interleaved, expanded, True),
        (tiled, tiled, False),
        (expanded, tiled, False),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_repeated_heads(
    key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], folded: bool
) -> None:
    net = Heads(key, value)
    graph = capture(net, (torch.randn(2, 5, 24),)).fx_graph(True)
    Clean()(graph)
    (node,) = (n for n in graph.graph.nodes if "attention" in n.name)
    assert node.kwargs.get("enable_gqa", False) == folded
    assert ("expand" in text(graph) or "repeat" in text(graph)) == (not folded)
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(run(graph, x), net(x))
    assert not Clean()(graph).modified


def once(k: Tensor) -> Tensor:
    b, h, s, d = k.shape
    return k[:, :, None, :, :].expand(b, h, 1, s, d).reshape(b, h, s, d)


def test_heads_that_are_repeated_once_are_not_shared() -> None:
    """Every query head has a key head of its own: with `enable_gqa`, torch exports no such file."""
    attend = F.scaled_dot_product_attention

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(*x.shape[:2], 4, 6).transpose(1, 2)
            return attend(q, once(q * 2), once(q + 1))

    graph = capture(Net(), (torch.randn(2, 5, 24),)).fx_graph(True)
    Clean()(graph)
    (node,) = (n for n in graph.graph.nodes if "attention" in n.name)
    assert "enable_gqa" not in node.kwargs
    assert "expand" not in text(graph)
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(run(graph, x), Net()(x))


class Pointwise(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x * 2)


ROOT = math.sqrt(2 / math.pi)
GELUS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gpt2": (lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * x.pow(3.0)))), "tanh"),
    "fast": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        "tanh",
    ),
    "halves": (lambda x: x * 0.5 + x * 0.5 * torch.erf(x / math.sqrt(2)), "none"),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476)), "none"),
}
GELUS["after a sum"] = (lambda x: GELUS["erf"][0](x + 2 * x.flip(0)), "none")
LIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "other constant": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.0447 * x.pow(3.0)))),
    "square": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * x.pow(2.0)))),
    "not halved": lambda x: x * (1.0 + torch.erf(x / math.sqrt(2))),
    "two arguments": lambda x: 0.5 * x * (1.0 + torch.erf(x.flip(0) / math.sqrt(2))),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", GELUS)
def test_gelus(name: str) -> None:
    f, approximate = GELUS[name]
    modified, after = checked(Pointwise(f), Clean(), torch.randn(2, 6, 8), (6, 3))
    assert modified
    last = after.splitlines()[-1]
    assert "= gelu(" in last and "tanh" not in after and "erf" not in after
    graph = capture(Pointwise(f), (torch.randn(2, 6),)).fx_graph(True)
    Clean()(graph)
    assert [n.kwargs for n in graph.graph.nodes if "gelu" in n.name] == [
        {"approximate": approximate}
    ]


@pytest.mark.parametrize("name", LIKE)
def test_what_is_no_gelu(name: str) -> None:
    modified, _ = checked(Pointwise(LIKE[name]), Clean(), torch.randn(2, 6, 8), (6, 3))
    assert not modified


def test_a_gelu_in_two_dtypes_or_changed_in_place_stays() -> None:
    def mixed(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x.double() / math.sqrt(2)))

    def written(x: Tensor) -> Tensor:
        inner = torch.erf(x / math.sqrt(2))
        half = 0.5 * x * (1.0 + inner)
        inner.zero_()
        return half + inner

    for f in (mixed, written):
        modified, _ = checked(Pointwise(f), Clean(), torch.randn(2, 6), (2,))
        assert not modified


def test_steps_that_do_nothing() -> None:
    def f(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.0, True), 0.7, False)[:, :]

    modified, after = checked(Pointwise(f), Clean(), torch.randn(2, 6), (2,))
    assert modified and after == "mul = mul(named_x, 2)"
    graph = capture(
        Pointwise(lambda x: F.dropout(x, 0.1).narrow(1, 1, 3)), (torch.randn(2, 6),)
    ).fx_graph(True)
    assert not Clean()(graph).modified
    assert "dropout(mul, 0.1, True)" in text(graph)
