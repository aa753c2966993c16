"""Which way of choosing ranks is worth it: adapters of one budget on digits that a net never saw.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ranks [--seeds 100-115] [--uniform 1]
    OMP_NUM_THREADS=1 python -m tests.benchmarks.ranks --cut-from 8   # one run, truncated

scikit-learn's digits (8 × 8; it has to be installed). A net of three pre-norm transformer blocks
(16 patches, D = 32, MLP 128, 18 target matmuls) learns classes 0 to 4; it is adapted to 5 to 9 with
20 images a class, and judged on 450 others. Its new head is a linear probe of the frozen net, and
trains along. Every method spends the elements of uniform rank R; scale 2 for every rank, AdamW at
1e-2, 30 epochs, batches of 20. A seed draws the net, its training and the split; methods share all
of that, so that differences are paired. `random` (Dirichlet shares) is a control: a method that is
no better than it has chosen nothing. Nothing was tuned for a method, and the seeds were named
before any of them ran; 0 to 3 served to see that the task can be learned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.truncate import truncation
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.inputs import generator
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.plan import plan
from lora_fx.targets.budget import allocate
from lora_fx.targets.rank_methods import METHODS
from tests.benchmarks.kept import Row, add_keep, report

CONTROL = "random"
DIM, HEADS, WIDE, CLASSES = 32, 4, 128, 5


class Block(nn.Module):
    """Pre-norm attention and MLP: six matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, WIDE), nn.Linear(WIDE, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class Net(nn.Module):
    """Patches of 2 × 2, three blocks, the mean of the tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, DIM)
        self.place = nn.Parameter(torch.randn(16, DIM) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        h = self.patch(x) + self.place
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.norm(h).mean(1)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


Data = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Data, Data, Data]:
    """(of 0 to 4), (100 of 5 to 9), (450 others of 5 to 9); x [n, 16 patches, 4 pixels]."""
    x, y = load_digits(return_X_y=True)
    patches = x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4) / 16 - 0.3
    x, y = torch.tensor(patches, dtype=torch.float32), torch.tensor(y)
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(y.numpy() >= CLASSES))
    new = y[order] - CLASSES
    few = np.concatenate([order[np.flatnonzero(new.numpy() == c)[:20]] for c in range(CLASSES)])
    rest = order[~np.isin(order, few)][:450]
    old = y < CLASSES
    return (x[old], y[old]), (x[few], y[few] - CLASSES), (x[rest], y[rest] - CLASSES)


def batches(data: Data, size: int, epochs: int) -> Iterator[Data]:
    for _ in range(epochs):
        for i in torch.randperm(len(data[0])).split(size):
            yield data[0][i], data[1][i]


def train(model: nn.Module, data: Data, lr: float, epochs: int, size: int) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    model.train()
    for x, y in batches(data, size, epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def judge(model: nn.Module, data: Data) -> tuple[float, float]:
    """(accuracy, cross entropy)."""
    out = model(data[0])
    return float((out.argmax(-1) == data[1]).double().mean()), float(
        nn.functional.cross_entropy(out, data[1])
    )


def pretrained(seed: int, old: Data, few: Data) -> Net:
    """Trained on the old classes; the head is a probe for the new ones."""
    torch.manual_seed(seed)
    net = Net()
    train(net, old, 3e-3, 10, 32)
    net.head = nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        seen = net.features(few[0])
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=3e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.head(seen), few[1]).backward()
        optimizer.step()
    return net


def chance(cap: Captured, uniform: int, seed: int) -> dict[str, dict[str, float]]:
    """Ranks by random shares, under the same budget."""
    even = plan(cap, budget=f"uniform:{uniform}", include="blocks.*")
    costs = {row.key: row.cost for row in even.rows}
    targets = find(cap)
    most = {key: targets[key].layout.max_rank for key in costs}
    shares = generator("random ranks", seed).dirichlet(np.ones(len(costs)))
    gains = {k: s / np.arange(1.0, most[k] + 1) for (k, s) in zip(costs, shares, strict=True)}
    ranks = allocate(gains, costs, most, even.limit)
    assert sum(costs[k] * r for k, r in ranks.items()) <= even.limit
    return {k: {"rank": r, "alpha": 2.0 * r} for k, r in ranks.items() if r}


def one(seed: int, uniform: int, methods: list[str]) -> dict[str, tuple[float, float, int]]:
    """Method → (accuracy, cross entropy, elements of A and B)."""
    old, few, rest = digits(seed)
    net = pretrained(seed, old, few)
    result = {"probe": (*judge(net.eval(), rest), 0)}
    cap = capture(net, (few[0][:2],))
    for method in methods:
        data = [{"x": few[0], "labels": few[1]}]
        ranks: dict[str, Any] = (
            chance(cap, uniform, seed)
            if method == CONTROL
            else plan(
                cap, data=data, budget=f"uniform:{uniform}", method=method, include="blocks.*"
            ).ranks
        )
        module = lora_fx.insert(cap, plan=ranks, also_train="head.*", seed=seed, dead="allow")
        size = sum(a.numel() + b.numel() for a, b in insertion_of(module).slots().values())
        torch.manual_seed(seed)
        train(module, few, 1e-2, 30, 20)
        result[method] = (*judge(module, rest), size)
    return result


def cut(seed: int, uniform: int, high: int) -> dict[str, tuple[float, float, int]]:
    """One run at a high rank, cut to the elements of a low one, and a run at the low rank."""
    old, few, rest = digits(seed)
    cap = capture(pretrained(seed, old, few), (few[0][:2],))
    limit = plan(cap, budget=f"uniform:{uniform}", include="blocks.*").limit
    result: dict[str, tuple[float, float, int]] = {}
    for name, rank in (("uniform", uniform), (f"rank {high}", high)):
        ranks = plan(cap, budget=f"uniform:{rank}", include="blocks.*").ranks
        module = lora_fx.insert(cap, plan=ranks, also_train="head.*", seed=seed, dead="allow")
        torch.manual_seed(seed)
        train(module, few, 1e-2, 30, 20)
        size = sum(a.numel() + b.numel() for a, b in insertion_of(module).slots().values())
        result[name] = (*judge(module, rest), size)
    adapter = module.adapter()
    for name, goal in (("cut, spread", {"params": limit}), ("cut, even", {"rank": uniform})):
        made = truncation(adapter, **goal)
        module.load_adapter(made.adapter)
        result[name] = (*judge(module, rest), made.parameters)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="100-115")
    parser.add_argument("--uniform", type=int, default=1)
    parser.add_argument("--cut-from", type=int, help="Rank of a run that is cut, instead.")
    add_keep(parser)
    parser.add_argument("--methods", default=f"{','.join(METHODS)},{CONTROL}")
    options = parser.parse_args()
    first, _, last = options.seeds.partition("-")
    methods = options.methods.split(",")
    runs: list[dict[str, tuple[float, float, int]]] = []
    start = time.time()
    for seed in range(int(first), int(last or first) + 1):
        high = options.cut_from
        made = cut(seed, options.uniform, high) if high else one(seed, options.uniform, methods)
        runs.append(made)
        said = "  ".join(f"{m} {v[0]:.3f}/{v[1]:.3f}/{v[2]}" for m, v in runs[-1].items())
        print(f"seed {seed} ({time.time() - start:.0f} s): {said}", flush=True)
    rows: list[Row] = []
    for m in runs[0]:
        row: Row = {"what": m, "elements": round(statistics.mean(r[m][2] for r in runs))}
        row["accuracy"], row["cross entropy"] = (_mean([r[m][i] for r in runs]) for i in (0, 1))
        if m not in ("uniform", "probe"):
            paired = [[r[m][i] - r["uniform"][i] for r in runs] for i in (0, 1)]
            row["Δ accuracy"], row["Δ cross entropy"] = map(_mean, paired)
            row["better than uniform"] = f"{sum(d > 0 for d in paired[0])} of {len(runs)}"
        rows.append(row)
    what = "method"
    if options.cut_from:
        what = f"one run at rank {options.cut_from}, cut"
    report("ranks", what, rows, options.keep)


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.3f} ({error:.3f})"


if __name__ == "__main__":
    main()
