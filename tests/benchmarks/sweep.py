"""A sweep of K seeds beside K runs of `lora-fx train` in a row, and beside K of PEFT.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sweep [--runs 8] [--rounds 3] [--steps 20]

A transformer with 4 layers of width 128, 320 rows of 32 tokens. Every arm builds the model, trains
and validates K adapters and saves them; a round runs all arms in turn, `in a row` twice: the second
is the control. Seconds of CPU and of the clock are sums over an arm's processes, peak memory is the
largest process's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks.interleave import Run, processor, rows, run

BATCH = 16
RATE = 1e-3
HELD_OUT = 0.1


MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
    def forward(self, x):
        y = self.before(x)
        heads = [f(y).unflatten(-1, (2, -1)).transpose(1, 2)
                 for f in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.after(x))))

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(500, 128), nn.Linear(128, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

def build():
    torch.manual_seed(0)
    return Reader().eval(), (torch.randint(5, 500, (2, 32)),), {}
"""


def write_inputs(folder: Path) -> None:
    """Write the model and the data of all arms."""
    (folder / "model.py").write_text(MODEL)
    ids = np.random.default_rng(0).integers(5, 500, (320, 32))
    np.savez(folder / "data.npz", ids=ids, labels=ids[:, 0] % 2)


def arms(folder: Path, runs: int, steps: int) -> dict[str, list[list[str]]]:
    """Return the commands of each arm."""
    common = [
        "-m", "lora_fx.cli", "-q", "train", f"{folder}/model.py:build", str(folder / "data.npz"),
        "--force", "--probe", "none", "--steps", str(steps), "--batch-size", str(BATCH),
    ]  # fmt: skip
    ours = [sys.executable, *common]
    peft = [sys.executable, "-m", __name__.replace("__main__", "tests.benchmarks.sweep")]
    seeds = range(runs)
    alone = [[*ours, "-o", str(folder / f"a{seed}"), "--seed", str(seed)] for seed in seeds]
    found = {
        "in a row": alone,
        "in a row again": alone,
        "PEFT, in a row": [
            [*peft, "--peft", str(seed), "--folder", str(folder), "--steps", str(steps)]
            for seed in seeds
        ],
    }
    for together in (1, 2, 8):
        sweep = [*ours, "-o", str(folder / "best"), "--seeds", str(runs)]
        found[f"sweep, {together} at a time"] = [[*sweep, "--together", str(together)]]
    return found


def train_with_peft(folder: Path, seed: int, steps: int) -> None:
    """Train an adapter with PEFT, with ten validations, and save it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lora_fx.data import read_table
    from lora_fx.held_out import split

    sys.path.insert(0, str(folder))
    model, _, _ = importlib.import_module("model").build()
    torch.manual_seed(seed)
    names = ["query", "key", "value", "out", "up", "down"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    training, held_out = split(read_table(str(folder / "data.npz")), HELD_OUT, 0)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = 0
    while step < steps:
        for batch in training.batches(BATCH, seed + step):
            columns = {name: torch.from_numpy(array) for name, array in batch.columns.items()}
            adapted.train()
            optimizer.zero_grad()
            scores = adapted(columns["ids"])
            torch.nn.functional.cross_entropy(scores, columns["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % max(1, steps // 10) == 0:
                adapted.eval()
                with torch.no_grad():
                    for part in held_out.batches(BATCH):
                        adapted(torch.from_numpy(part.columns["ids"]))
            if step == steps:
                break
    adapted.save_pretrained(folder / f"peft{seed}")


def summed(parts: Sequence[Run]) -> Run:
    """Return the processes of an arm as one: their seconds together, the largest memory."""
    wall = sum(part.wall for part in parts)
    cpu = sum(part.cpu for part in parts)
    return Run(wall, cpu, max(part.rss for part in parts))


def main() -> None:
    """Run the arms in turn, and print medians and ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peft", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peft is not None:
        train_with_peft(asked.folder, asked.peft, asked.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        commands = arms(Path(folder), asked.runs, asked.steps)
        found: dict[str, list[Run]] = {name: [] for name in commands}
        for number in range(asked.rounds):
            for name, argvs in commands.items():
                found[name].append(summed([run(argv) for argv in argvs]))
                last = found[name][-1]
                print(f"round {number + 1}, {name}: {last.wall:.1f} s, CPU {last.cpu:.1f} s, "
                      f"{last.rss:.0f} MB", flush=True)  # fmt: skip
        print(processor())
        for row in rows(found):
            print(row)


if __name__ == "__main__":
    main()
