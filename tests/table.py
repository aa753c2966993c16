"""One tiny model per row of the op table and per way a weight reaches its op; rectangular shapes.

`weights` name the parameters that must become targets, with the keys they must get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import forwards


@dataclass(frozen=True)
class Row:
    """`forward(p, x)` on parameters of these shapes and an input of this shape.

    A tuple of ints as input is float; `ids` makes integers below it.
    """

    name: str
    op: str
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    forward: Callable[[Any, Tensor], Tensor]
    keys: tuple[str, ...] = ("w",)
    ids: int = 0
    dead: tuple[str, ...] = ()
    """Keys that no gradient reaches: behind an argmax, or under no_grad."""
    effective: Callable[[Any], Tensor] | None = None
    """For a computed weight: how the model computes it; forward then reads `p.eff()`."""


class Model(nn.Module):
    """A row as a module."""

    def __init__(self, row: Row, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in row.shapes.items():
            fan = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 1
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g) / fan**0.5))
        self.row = row
        self.change: Tensor | None = None

    def eff(self) -> Tensor:
        """The computed weight, plus the explicit ΔW that a test set."""
        assert self.row.effective is not None
        w = self.row.effective(self)
        return w if self.change is None else w + self.change

    def forward(self, x: Tensor) -> Tensor:
        return self.row.forward(self, x)


def example(row: Row, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if row.ids:
        return torch.randint(0, row.ids, row.x, generator=g)
    return torch.randn(row.x, generator=g)


# fmt: off
ROWS = [
    Row("linear", "linear", {"w": (6, 8), "b": (6,)}, (3, 5, 8),
        lambda p, x: F.linear(x, p.w, p.b)),
    Row("matmul", "matmul", {"w": (8, 6)}, (3, 5, 8), lambda p, x: x @ p.w),
    Row("matmul vector", "matmul", {"w": (8, 6)}, (8,), lambda p, x: x @ p.w),
    Row("matmul left", "matmul", {"w": (6, 8)}, (3, 8, 5), lambda p, x: p.w @ x),
    Row("matmul left vector", "matmul", {"w": (6, 8)}, (8,), lambda p, x: p.w @ x),
    Row("matmul stack", "matmul", {"w": (4, 8, 6)}, (3, 4, 5, 8), lambda p, x: x @ p.w),
    Row("matmul stack left", "matmul", {"w": (4, 6, 8)}, (3, 4, 8, 5), lambda p, x: p.w @ x),
    Row("mm", "mm", {"w": (8, 6)}, (5, 8), lambda p, x: torch.mm(x, p.w)),
    Row("mm left", "mm", {"w": (6, 8)}, (8, 5), lambda p, x: torch.mm(p.w, x)),
    Row("bmm", "bmm", {"w": (4, 8, 6)}, (5, 8), forwards.experts),
    Row("addmm", "addmm", {"w": (8, 6), "b": (6,)}, (5, 8), lambda p, x: torch.addmm(p.b, x, p.w)),
    Row(
        "einsum heads", "einsum", {"w": (8, 2, 3)}, (3, 5, 8),
        lambda p, x: torch.einsum("bsd,dhe->bshe", x, p.w),
    ),
    Row(
        "einsum two in", "einsum", {"w": (2, 3, 6)}, (4, 5, 2, 3),
        lambda p, x: torch.einsum("bshe,hed->bsd", x, p.w),
    ),
    Row(
        "einsum batch", "einsum", {"w": (4, 6, 8)}, (3, 4, 8),
        lambda p, x: torch.einsum("bgi,goi->bgo", x, p.w),
    ),
    Row(
        "einsum ellipsis", "einsum", {"w": (6, 8)}, (3, 5, 8),
        lambda p, x: torch.einsum("...i,oi->...o", x, p.w),
    ),
    Row(
        "einsum swapped", "einsum", {"w": (8, 6)}, (5, 8),
        lambda p, x: torch.einsum("io,bi->ob", p.w, x),
    ),
    Row(
        "conv1d", "conv1d", {"w": (6, 4, 3), "b": (6,)}, (2, 4, 9),
        lambda p, x: F.conv1d(x, p.w, p.b, stride=2, padding=1),
    ),
    Row(
        "conv2d", "conv2d", {"w": (6, 4, 3, 2), "b": (6,)}, (2, 4, 9, 7),
        lambda p, x: F.conv2d(x, p.w, p.b, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    ),
    Row(
        "conv2d same", "conv2d", {"w": (6, 4, 3, 2)}, (2, 4, 9, 7),
        lambda p, x: F.conv2d(x, p.w, padding="same"),
    ),
    Row(
        "conv2d groups", "conv2d", {"w": (6, 2, 3, 3)}, (2, 4, 7, 8),
        lambda p, x: F.conv2d(x, p.w, groups=2, padding=1),
    ),
    Row(
        "conv2d circular", "conv2d", {"w": (6, 4, 3, 3)}, (2, 4, 7, 8),
        lambda p, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), p.w),
    ),
    Row(
        "conv3d", "conv3d", {"w": (5, 3, 2, 3, 2)}, (2, 3, 4, 5, 6),
        lambda p, x: F.conv3d(x, p.w, padding=(0, 1, 1)),
    ),
    Row("inner", "inner", {"w": (6, 8)}, (3, 5, 8), lambda p, x: torch.inner(x, p.w)),
    Row("inner left", "inner", {"w": (6, 8)}, (5, 8), lambda p, x: torch.inner(p.w, x)),
    Row("tensordot", "tensordot", {"w": (2, 8, 3, 5)}, (7, 5, 8),
        lambda p, x: torch.tensordot(x, p.w, dims=([-1, 1], [1, 3]))),
    Row("tensordot left", "tensordot", {"w": (6, 8)}, (3, 8, 5),
        lambda p, x: torch.tensordot(p.w, x, dims=([1], [1]))),
    Row("mv", "mv", {"w": (6, 8)}, (8,), lambda p, x: torch.mv(p.w, x)),
    Row("addmv", "addmv", {"w": (6, 8), "b": (6,)}, (8,),
        lambda p, x: torch.addmv(p.b, p.w, x, beta=0.5, alpha=2.0)),
    Row("addbmm", "addbmm", {"w": (4, 8, 6), "b": (6,)}, (4, 5, 8),
        lambda p, x: torch.addbmm(p.b, x, p.w, beta=0.5, alpha=2.0)),
    Row("addbmm left", "addbmm", {"w": (4, 6, 8), "b": (6, 1)}, (4, 8, 5),
        lambda p, x: torch.addbmm(p.b, p.w, x, beta=0, alpha=1)),
    Row("multi_dot", "matmul", {"v": (3, 8), "w": (5, 6)}, (8, 5),
        lambda p, x: torch.linalg.multi_dot([p.v, x, p.w]), ("v", "w")),
    Row("chain_matmul", "matmul", {"v": (8, 3), "w": (3, 6)}, (5, 8),
        forwards.chain, ("v", "w")),
    Row("einsum of three", "einsum", {"v": (3, 8), "w": (6, 3)}, (2, 5, 8),
        lambda p, x: torch.einsum("...i,hi,oh->...o", x, p.v, p.w), ("v", "w")),
    Row("embedding", "embedding", {"w": (11, 6)}, (3, 5), lambda p, x: F.embedding(x, p.w), ids=11),
    Row(
        "lstm", "lstm", {"w": (20, 8), "u": (20, 5), "b": (20,), "c": (20,)}, (3, 6, 8),
        forwards.lstm, keys=("w", "u"),
    ),
    Row(
        "addmm alpha", "addmm", {"w": (8, 6), "b": (6,)}, (5, 8),
        lambda p, x: torch.addmm(p.b, x, p.w, alpha=0.5),
    ),
    Row(
        "baddbmm", "baddbmm", {"w": (4, 8, 6), "b": (4, 1, 6)}, (5, 8),
        lambda p, x: torch.baddbmm(p.b, x.unsqueeze(0).expand(4, -1, -1), p.w),
    ),
    Row("matmul broadcast", "matmul", {"w": (4, 8, 6)}, (5, 8), lambda p, x: x @ p.w),
    Row(
        "matmul broadcast left", "matmul", {"w": (4, 1, 6, 8)}, (3, 8, 5), lambda p, x: p.w @ x,
    ),
    Row(
        "einsum three", "einsum", {"w": (6, 8)}, (5, 8),
        lambda p, x: torch.einsum("bi,oi,bi->bo", x, p.w, torch.tanh(x)),
    ),
    Row(
        "einsum summed", "einsum", {"w": (6, 8, 3)}, (5, 8),
        lambda p, x: torch.einsum("bi,oik->bo", x, p.w),
    ),
    Row(
        "conv_transpose1d", "conv_transpose1d", {"w": (4, 6, 3), "b": (6,)}, (2, 4, 9),
        lambda p, x: F.conv_transpose1d(x, p.w, p.b, stride=2, padding=1, output_padding=1),
    ),
    Row(
        "conv_transpose2d groups", "conv_transpose2d", {"w": (4, 3, 3, 2)}, (2, 4, 5, 6),
        lambda p, x: F.conv_transpose2d(x, p.w, stride=(2, 1), groups=2, dilation=(1, 2)),
    ),
    Row(
        "conv_transpose3d", "conv_transpose3d", {"w": (4, 3, 2, 3, 2)}, (2, 4, 3, 4, 5),
        lambda p, x: F.conv_transpose3d(x, p.w, padding=(0, 1, 1)),
    ),
    Row("bag sum", "embedding_bag", {"w": (11, 6)}, (3, 5), forwards.bag("sum"), ids=11),
    Row("bag mean", "embedding_bag", {"w": (11, 6)}, (3, 5), forwards.bag("mean"), ids=11),
    Row("bag max", "embedding_bag", {"w": (11, 6)}, (3, 5), forwards.bag("max"), ids=11),
    Row(
        "bilinear", "bilinear", {"w": (6, 8, 3), "v": (3, 8)}, (5, 8),
        lambda p, x: F.bilinear(x, F.linear(x, p.v), p.w), ("w", "v"),
    ),
    Row(
        "gru", "gru", {"w": (15, 8), "u": (15, 5), "b": (15,), "c": (15,)}, (3, 6, 8), forwards.gru,
        keys=("w", "u"),
    ),
    Row(
        "rnn", "rnn_tanh",
        {"w": (5, 8), "u": (5, 5), "b": (5,), "c": (5,), "v": (5, 8), "t": (5, 5)}, (3, 6, 8),
        forwards.rnn, keys=("w", "u", "v", "t"),
    ),
    Row(
        "lstm cell", "lstm_cell", {"w": (20, 8), "u": (20, 5), "b": (20,), "c": (20,)}, (3, 8),
        forwards.lstm_cell, keys=("w", "u"),
    ),
    Row("grouped", "grouped_mm", {"w": (4, 6, 8), "r": (8, 4)}, (9, 8), forwards.grouped,
        ("w", "r"), dead=("r",)),
    Row("gathered", "bmm", {"w": (4, 6, 8), "r": (8, 4)}, (9, 8), forwards.gathered,
        ("w", "r"), dead=("r",)),
    Row("gathered, as many as there are", "bmm", {"w": (5, 6, 8), "r": (8, 5)}, (8, 5),
        lambda p, x: forwards.gathered(p, x.t()), ("w", "r"), dead=("r",)),
    Row("gathered by index_select", "bmm", {"w": (4, 8, 6), "r": (8, 4)}, (9, 8),
        forwards.selected, ("w", "r"), dead=("r",)),
    Row("gathered, turned over", "einsum", {"w": (4, 6, 8), "r": (8, 4)}, (9, 8),
        forwards.turned, ("w", "r"), dead=("r",)),
    Row("cond", "cond", {"w": (6, 8)}, (5, 8), forwards.cond),
    Row("no_grad", "linear", {"w": (6, 8), "v": (5, 6)}, (4, 8), forwards.no_grad, ("w", "v"),
        dead=("w",)),
    Row("autocast off", "linear", {"w": (6, 8)}, (4, 8), forwards.autocast),
    # weights that the model computes
    Row(
        "masked", "linear", {"w": (6, 8)}, (5, 8), lambda p, x: F.linear(x, p.eff()), ("w~",),
        effective=lambda p: torch.tril(p.w),
    ),
    Row(
        "weight_norm", "linear", {"w_v": (6, 8), "w_g": (6, 1)}, (5, 8),
        lambda p, x: F.linear(x, p.eff()), ("w~",),
        effective=lambda p: torch._weight_norm(p.w_v, p.w_g, 0),
    ),
    Row(
        "standardised", "conv2d", {"w": (6, 4, 3, 3), "g": (6, 1, 1, 1)}, (2, 4, 7, 8),
        lambda p, x: F.conv2d(x, p.eff()), ("weight~",), effective=forwards.standardised,
    ),
    Row(
        "orthogonal", "matmul", {"w": (8, 8)}, (5, 8), lambda p, x: x @ p.eff().t(), ("w~",),
        effective=forwards.householder,
    ),
    Row(
        "joined", "linear", {"w": (4, 8), "v": (2, 8)}, (5, 8), lambda p, x: F.linear(x, p.eff()),
        ("weight~",), effective=lambda p: torch.cat([p.w, p.v]),
    ),
    # ways from the stored tensor to the operand
    Row("transposed", "linear", {"w": (8, 6)}, (5, 8), lambda p, x: F.linear(x, p.w.t())),
    Row("permuted", "matmul", {"w": (6, 8)}, (5, 8), lambda p, x: x @ p.w.permute(1, 0)),
    Row("view", "linear", {"w": (2, 3, 8)}, (5, 8), lambda p, x: F.linear(x, p.w.view(6, 8))),
    Row(
        "cast", "linear", {"w": (6, 8)}, (5, 8),
        lambda p, x: F.linear(x.double(), p.w.to(torch.float64)).float(),
    ),
    Row("sliced", "linear", {"w": (10, 8)}, (5, 8),
        lambda p, x: F.linear(x, p.w[2:8]), ("w[2:8]",)),
    Row(
        "sliced in", "linear", {"w": (6, 10)}, (5, 8), lambda p, x: F.linear(x, p.w[:, 1:9]),
        ("w[:, 1:9]",),
    ),
    Row("selected", "linear", {"w": (3, 6, 8)}, (5, 8),
        lambda p, x: F.linear(x, p.w[1]), ("w[1]",)),
    Row("split", "linear", {"w": (10, 8)}, (5, 8), forwards.split, ("w[0:6]", "w[6:10]")),
    Row("chunk", "linear", {"w": (10, 8)}, (5, 8), forwards.chunk, ("w[0:5]", "w[5:10]")),
    Row("unbind", "linear", {"w": (10, 8)}, (5, 8), forwards.unbind, ("w[0:5]", "w[5:10]")),
    Row(
        "overlapping", "linear", {"w": (10, 8)}, (5, 8),
        lambda p, x: F.linear(x, p.w[:6]) + F.linear(x, p.w[4:]),
    ),
    Row(
        "interleaved", "linear", {"w": (6, 8)}, (5, 8),
        lambda p, x: F.linear(x, p.w.view(3, 2, 8)[:, 1]),
    ),
    Row(
        "both ways", "matmul", {"w": (8, 6)}, (5, 8),
        lambda p, x: torch.tanh(x @ p.w) @ p.w.t(),
    ),
    Row(
        "twice", "linear", {"w": (8, 8), "v": (6, 8)}, (5, 8),
        lambda p, x: F.linear(F.linear(torch.tanh(F.linear(x, p.w)), p.w), p.v), ("w", "v"),
    ),
    Row(
        "tied", "matmul", {"w": (11, 6)}, (3, 5),
        lambda p, x: torch.tanh(F.embedding(x, p.w)) @ p.w.t(), ids=11,
    ),
]
