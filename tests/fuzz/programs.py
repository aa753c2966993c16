"""A small model as source text, drawn from a seed, so that a failure can be read and replayed.

A program takes x [batch, steps, width] or ids [batch, steps] and goes through a few blocks: every
way to multiply by a weight, ties, other readers of a weight, writes in place, cuts to constants,
branches on sizes, loops, masks and casts.
"""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass, field

import torch
from torch import nn

WIDTHS = (4, 6)


@dataclass
class Draft:
    """A program while it is drawn."""

    rng: random.Random
    width: int
    made: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    square: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0

    def name(self, kind: str) -> str:
        """A new attribute of the module."""
        self.count += 1
        return f"{kind}{self.count}"

    def add(self, name: str, made: str) -> None:
        """An attribute, and what it is."""
        self.made.append(f"self.{name} = {made}")

    def say(self, *lines: str) -> None:
        """Lines of forward."""
        self.body += lines

    def out(self) -> int:
        """Another width, or the same."""
        return self.rng.choice((self.width, *WIDTHS))


def _linear(d: Draft) -> None:
    name, out = d.name("lin"), d.out()
    d.add(name, f"nn.Linear({d.width}, {out}, bias={d.rng.random() < 0.7})")
    if out == d.width:
        d.square.append((f"{name}.weight", out))
    d.say(f"h = self.{name}(h)")
    d.width = out


def _parameter(d: Draft, *shape: int) -> str:
    name = d.name("w")
    d.add(name, f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * 0.4)")
    return name


def _product(d: Draft) -> None:
    out = d.out()
    way = d.rng.randrange(6)
    w = _parameter(d, *((out, d.width) if way in (1, 2) else (d.width, out)))
    d.say(
        (
            f"h = h @ self.{w}",
            f"h = F.linear(h, self.{w})",
            f"h = (self.{w} @ h.mT).mT",
            f"h = torch.einsum('bti,io->bto', h, self.{w})",
            f"h = torch.bmm(h, self.{w}.expand(h.shape[0], -1, -1))",
            f"h = torch.mm(h.reshape(-1, {d.width}), self.{w}).view(h.shape[0], -1, {out})",
        )[way]
    )
    d.width = out


def _chain(d: Draft) -> None:
    middle, out = d.out(), d.out()
    v, w = _parameter(d, d.width, middle), _parameter(d, middle, out)
    flat = f"h.reshape(-1, {d.width})"
    rows = f".view(h.shape[0], -1, {out})"
    d.say(
        d.rng.choice(
            (
                f"h = torch.inner(h, self.{v}.mT) @ self.{w}",
                f"h = torch.tensordot(h, self.{v}, 1) @ self.{w}",
                f"h = torch.einsum('bti,ij,jk->btk', h, self.{v}, self.{w})",
                f"h = torch.einsum('jk,ij,bti->btk', self.{w}, self.{v}, h)",
                f"h = torch.linalg.multi_dot([{flat}, self.{v}, self.{w}]){rows}",
            )
        )
    )
    d.width = out


def _masked(d: Draft) -> None:
    name = d.name("q")
    d.add(name, f"nn.Linear({d.width}, {d.width})")
    d.say(
        f"q = self.{name}(h)",
        "keep = h.abs().mean(-1) > 0.3",
        d.rng.choice(
            (
                "h = h + F.scaled_dot_product_attention(q, h, h, attn_mask=keep[:, None, :])",
                "h = h + ((q @ h.mT) / 3).masked_fill(~keep[:, None], -1e9).softmax(-1) @ h",
                "h = h + torch.einsum('bts,bsd->btd', (h @ q.mT).softmax(-2).mT, h)",
            )
        ),
    )


def _part(d: Draft) -> None:
    w = _parameter(d, 2 * d.width, d.width)
    d.say(
        f"h = F.linear(h, self.{w}[:{d.width}]) * torch.sigmoid(F.linear(h, self.{w}[{d.width}:]))"
    )


def _convolution(d: Draft) -> None:
    name, out = d.name("conv"), d.out()
    groups = 2 if d.rng.random() < 0.3 else 1
    d.add(name, f"nn.Conv1d({d.width}, {out}, 3, padding=1, groups={groups})")
    d.say(f"h = self.{name}(h.mT).mT")
    d.width = out


def _recurrent(d: Draft) -> None:
    name, kind = d.name("rnn"), d.rng.choice(("LSTM", "GRU"))
    d.add(name, f"nn.{kind}({d.width}, {d.width}, batch_first=True)")
    d.say(f"h = self.{name}(h)[0]")


def _attention(d: Draft) -> None:
    name = d.name("mha")
    d.add(name, f"nn.MultiheadAttention({d.width}, 2, batch_first=True)")
    d.say(f"h = h + self.{name}(h, h, h, need_weights=False)[0]")


def _tie(d: Draft) -> None:
    usable = [n for n, width in d.square if width == d.width]
    if usable:
        turned = d.rng.choice(("", ".t()"))
        d.say(f"h = torch.tanh(F.linear(h, self.{d.rng.choice(usable)}{turned}))")


def _reader(d: Draft) -> None:
    if d.square:
        d.say(f"h = h + 0.1 * self.read(self.{d.rng.choice(d.square)[0]})")


WRITES = ("h.mul_(0.5)", "h[:, 0] = h[:, 0] * 2", "h.relu_()", "h[..., :2].add_(1.0)")


def _write(d: Draft) -> None:
    d.say("h = h.clone()", d.rng.choice(WRITES))


def _cut(d: Draft) -> None:
    n = d.rng.choice((3, 8, 16, 90))
    cuts = (f":{n}", f"-{n}:", "::2")
    shorter = "h = h[:, 1:] if h.shape[1] > 1 else h"
    d.say(d.rng.choice((*(f"h = h[:, {c}]" for c in cuts), shorter)))


def _branch(d: Draft) -> None:
    test = d.rng.choice(
        ("h.shape[1] < 8", "h.shape[1] > 16", "h.shape[0] == 1", "h.shape[1] % 2 == 0",
         "h.shape[0] * h.shape[1] > 30", "h.shape[1] > 90", "h.shape[0] * h.shape[1] < 700",
         "h.shape[1] > h.shape[0]", "h.shape[1] != 6")
    )  # fmt: skip
    name = d.name("lin")
    d.add(name, f"nn.Linear({d.width}, {d.width})")
    d.say(f"h = self.{name}(h) if {test} else 2 * h" if d.rng.random() < 0.5 else
          f"h = self.{name}(h) * (2.0 if {test} else 1.0)")  # fmt: skip


def _loop(d: Draft) -> None:
    name = d.name("lin")
    d.add(name, f"nn.Linear({d.width}, {d.width})")
    d.say("for _ in range(2):", f"    h = torch.tanh(self.{name}(h))")


PLAIN = (
    "h = F.gelu(h)",
    "h = torch.tanh(h)",
    "h = F.silu(h)",
    "h = h + h.mean(1, keepdim=True)",
    "h = h.masked_fill(h < -1, 0.0)",
    "h = h.to(torch.float)",
    "h = h / (h.shape[1] + 1)",
    "h = F.dropout(h, 0.1, self.training)",
    "h = h.flip(1)",
    "h = h.transpose(0, 1).transpose(0, 1)",
    "h = h + torch.arange(h.shape[1], device=h.device)[:, None] * 0.01",
)


def _plain(d: Draft) -> None:
    d.say(d.rng.choice(PLAIN))


def _norm(d: Draft) -> None:
    name = d.name("norm")
    d.add(name, f"nn.LayerNorm({d.width})")
    d.say(f"h = self.{name}(h)")


BLOCKS = (
    *([_linear] * 3 + [_product] * 3 + [_plain] * 3 + [_write] * 2 + [_branch] * 2),
    *(_chain, _masked),
    *(_norm, _part, _convolution, _recurrent, _attention, _tie, _reader, _cut, _loop),
)


@dataclass(frozen=True)
class Program:
    """A drawn model.

    Attributes:
        seed: It is drawn from.
        source: A class `Program(nn.Module)`.
        ids: It takes ids, not floats.
        width: Of x.
    """

    seed: int
    source: str
    ids: bool
    width: int

    def build(self) -> nn.Module:
        """The model, in eval mode, its weights drawn from the seed."""
        name = f"<program {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        names: dict[str, object] = {"__name__": "fuzzed"}
        exec(compile(self.source, name, "exec"), names)
        torch.manual_seed(self.seed)
        kind = names["Program"]
        assert isinstance(kind, type)
        model = kind()
        assert isinstance(model, nn.Module)
        return model.eval()

    def example(self, rows: int, steps: int) -> torch.Tensor:
        """An input of one size."""
        generator = torch.Generator().manual_seed(rows * 1000 + steps)
        if self.ids:
            return torch.randint(0, 20, (rows, steps), generator=generator)
        return torch.randn(rows, steps, self.width, generator=generator)


def program(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    d = Draft(rng, rng.choice(WIDTHS))
    width, ids = d.width, rng.random() < 0.25
    if ids:
        d.add("table", f"nn.Embedding(20, {width})")
        d.say("h = self.table(x)")
    else:
        d.say("h = x")
    _linear(d)
    for _ in range(rng.randrange(2, 7)):
        rng.choice(BLOCKS)(d)
    if ids and d.width == width and rng.random() < 0.5:
        d.say("h = h @ self.table.weight.t()")
    end = rng.choice(("h", "h", "{'y': h}", "(h, h.mean(1))", "h.sum(1)"))
    lines = [
        "import torch", "from torch import nn", "from torch.nn import functional as F", "", "",
        "class Program(nn.Module):", "    def __init__(self):", "        super().__init__()",
        *(f"        {m}" for m in d.made), "",
        "    def read(self, w):", "        return w.norm()", "",
        "    def forward(self, x):", *(f"        {s}" for s in d.body), f"        return {end}", "",
    ]  # fmt: skip
    return Program(seed, "\n".join(lines), ids, width)
