"""A training step in ONNX Runtime (mode train) beside torch's on the module that insert made.

    python -m tests.benchmarks.step [bert gpt2] [--rounds 11] [--keep quiet]

Trunks of two layers of width 768 with every linear layer adapted, AdamW, one thread. Each side is a
process of its own, so that its peak of resident memory is its own; one step of each is timed in
turn, A B C A B C …, torch twice (the control). Both start from the same adapter: their losses are
compared after the last step. Peaks are those of the steps alone, and of the whole process. The gate
is the step in torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.onnx.timing import Sample, interleave, timed
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, figures, gated, report

SIZES = {"bert": (8, 128), "gpt2": (2, 256)}
"""(rows, tokens) of a batch"""
WORDS = {"bert": 30522, "gpt2": 50257}
EXAMPLE = (2, 16)
LR = 1e-3
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""Freed memory stays with the process, so that no step pays for pages that another gave back."""


def batch(name: str, size: tuple[int, int]) -> dict[str, Array]:
    """Words and labels: of BERT one a row, of GPT-2 the words themselves."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, WORDS[name], size)
    labels = rng.integers(0, 3, size[0]) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def build(name: str) -> Any:
    """A random transformer of two layers without dropout."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if name == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(
            num_hidden_layers=2, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
    return tf.GPT2LMHeadModel(tf.GPT2Config(
        n_layer=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
    ))  # fmt: skip


def example(name: str) -> dict[str, Any]:
    """The arguments of a capture."""
    import torch

    return {k: torch.tensor(v) for k, v in batch(name, EXAMPLE).items()}


def in_torch(name: str, _: str) -> Callable[[], float]:
    """Step of the module that insert makes."""
    import torch

    import lora_fx

    torch.set_num_threads(1)
    module = lora_fx.insert(build(name), (), example(name)).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], LR)
    given = {k: torch.tensor(v) for k, v in batch(name, SIZES[name]).items()}

    def step() -> float:
        loss = module(**given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def in_onnx(name: str, file: str) -> Callable[[], float]:
    """Step of a file; torch is never imported."""
    from lora_fx.onnx import TrainSession

    session = TrainSession(file, LR, "cpu", 1)
    given = batch(name, SIZES[name])
    assert "torch" not in sys.modules
    return lambda: session.step(given)


SIDES = {"torch": in_torch, "onnx": in_onnx}


def serve(side: str, name: str, file: str) -> None:
    """Take a step for each line of stdin and tell [wall, cpu, loss, peak MB of steps, of all]."""
    warnings.simplefilter("ignore")
    step = SIDES[side](name, file)
    whole = peak()
    losses: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: without capture or load
    for _ in sys.stdin:
        spent = timed(lambda: losses.append(step()))
        found = [spent.wall, spent.cpu, losses[-1], peak(), max(whole, peak())]
        print(json.dumps(found), flush=True)


def peak() -> float:
    """The peak of resident memory, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


class Side:
    """A process that takes steps."""

    def __init__(self, side: str, name: str, file: str) -> None:
        argv = [sys.executable, "-m", "tests.benchmarks.step", "--serve", side, name, file]
        env = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
        self.child = subprocess.Popen(
            argv, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.last: list[float] = []

    def __call__(self) -> Sample:
        """Take one."""
        assert self.child.stdin and self.child.stdout
        print(file=self.child.stdin, flush=True)
        self.last = json.loads(self.child.stdout.readline())
        return Sample(*self.last[:2])

    def close(self) -> None:
        """End it."""
        self.child.communicate()


def table(name: str, folder: Path, rounds: int, keep: str | None) -> None:
    """Export the step of a model, and time it beside torch's."""
    import lora_fx

    path = folder / f"{name}.onnx"
    lora_fx.export(build(name), path, (), example(name), mode="train", provider="cpu")
    sides = {"torch": "torch", "torch again (control)": "torch", "ONNX Runtime": "onnx"}
    opened = {label: Side(side, name, str(path)) for label, side in sides.items()}
    found = interleave({label: partial(s) for label, s in opened.items()}, rounds, warmup=2)
    losses = [s.last[2] for s in opened.values()]
    assert max(losses) - min(losses) < 1e-4 * abs(losses[0]), losses
    base = [s.cpu for s in next(iter(found.values()))]
    rows, tokens = SIZES[name]
    print(f"\n{name}: loss {losses[0]:.6f} and {losses[-1]:.6f} at the end")
    made: list[Row] = []
    for label, samples in found.items():
        in_steps, whole = opened[label].last[3:]
        opened[label].close()
        memory = {"MB of steps": round(in_steps), "MB": round(whole)}
        made.append(figures(label, [sample.cpu for sample in samples], base, **memory))
    made[-1] = gated(made[-1], "1.00 × torch", 1.0)
    report("step", f"{name} {rows} × {tokens}: CPU seconds of a step", made, keep)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=11)
    add_keep(parser)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.serve:
        serve(*given.serve)
        return
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
          f"{datetime.date.today()}, {given.rounds} rounds")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            table(name, Path(folder), given.rounds, given.keep)


if __name__ == "__main__":
    main()
