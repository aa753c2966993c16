"""CPU time of a training step beside PEFT's and beside its bound, in ratios.

    python -m tests.benchmarks.train [MODEL ...] [--dtype D ...] [--rounds 15] [--compile]

Trunks of two layers, every linear layer and stack of experts adapted, forward and backward without
the optimizer, CPU time of the process on one thread. All run in turn, A B C A B C …; the first is
PEFT's default, the second the same once more, as a control. `frozen` is the bound: forward and the
gradient of the input, in the model without adapters; `to bound` is how far a median ratio is from
its. The gate of bfloat16 is the bound of the same run, and .06 of PEFT's time.
Saved bytes are those that one forward keeps.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx.onnx.timing import Sample, interleave, summary, timed
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, figures, gated, report
from tests.fx.train.saved_bytes import TRUNKS, Size, Trunk, saved_bytes, with_peft

MALLOC = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""Freed memory stays with the process, so that no step pays for pages that another gave back."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each model and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(TRUNKS))
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compiled PEFT and lora-fx as well")
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"width {given.width}, 2 × {given.tokens} tokens, rank {given.rank}: seconds of CPU")
    for name in given.models:
        for dtype in given.dtype:
            size = Size(given.width, given.width // 64, 2, given.tokens)
            table(name, getattr(torch, dtype), size, given)


def table(name: str, dtype: torch.dtype, size: Size, given: argparse.Namespace) -> None:
    """Time one model's steps and print them."""
    trunk = TRUNKS[name](size)
    trunk = replace(trunk, model=trunk.model.to(dtype), inputs=cast(trunk.inputs, dtype))
    steps, kept = {}, {}
    for label, model in models(trunk, given.rank, given.compile).items():
        step = partial(once, model, trunk.inputs)
        step()
        if "compiled" not in label:
            kept[label] = saved_bytes(model, partial(forward, model, trunk.inputs))[0]
        steps[label] = step
    frozen = copy.deepcopy(trunk.model).requires_grad_(False).train()
    steps["frozen (bound)"] = partial(once, frozen, differentiable(frozen, trunk.inputs))
    runs: dict[str, Callable[[], Sample]] = {k: partial(timed, s) for k, s in steps.items()}
    found = interleave(runs, given.rounds, warmup=2)
    base = [s.cpu for s in found["PEFT"]]
    bound = summary([s.cpu for s in found["frozen (bound)"]], base)["ratio"]
    rows: list[Row] = []
    for label, samples in found.items():
        row = figures(label, [sample.cpu for sample in samples], base)
        row["to bound"] = round(row["ratio"] - bound, 3) + 0.0
        if label in kept:
            row["bytes"] = round(kept[label] / kept["PEFT"], 3)
        if label == "lora-fx" and dtype == torch.bfloat16:
            row = gated(row, "bound + .06", bound + 0.06)
        rows.append(row)
    report("train", f"{name} {str(dtype)[6:]}: CPU seconds of a step", rows, given.keep)


def models(trunk: Trunk, rank: int, compiled: bool) -> dict[str, nn.Module]:
    """What is timed, the baseline first."""
    cap = lora_fx.capture(trunk.model, (), dict(trunk.inputs))
    peft = with_peft(trunk, rank)
    narrow = with_peft(trunk, rank, autocast_adapter_dtype=False)
    ours = lora_fx.insert(cap, rank=rank, dead="allow").train()
    plain = lora_fx.insert(cap, rank=rank, dead="allow", fast=False).train()
    found: dict[str, nn.Module] = {
        "PEFT": peft,
        "PEFT again (control)": peft,
        "PEFT, adapters in its dtype": narrow,
        "lora-fx": ours,
        "lora-fx, fast=False": plain,
    }
    if compiled:
        ours(**trunk.inputs)  # captured before it is compiled
        for label in ("PEFT", "PEFT, adapters in its dtype", "lora-fx"):
            found[f"{label}, compiled"] = torch.compile(found[label])
    return found


def forward(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The last hidden state."""
    made: torch.Tensor = model(**inputs).last_hidden_state
    return made


def once(model: nn.Module, inputs: Any) -> None:
    """Forward and backward."""
    forward(model, inputs).float().square().mean().backward()
    model.zero_grad()


def cast(inputs: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating inputs in a dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def differentiable(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs that require a gradient: embeddings in the place of ids."""
    if "input_ids" in inputs:
        made = model.get_input_embeddings()(inputs["input_ids"])
        return {"inputs_embeds": made.detach().requires_grad_()}
    return {k: v.clone().requires_grad_() for k, v in inputs.items()}


if __name__ == "__main__":
    if any(os.environ.get(k) != v for k, v in MALLOC.items()):
        again = [sys.executable, "-m", "tests.benchmarks.train", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **MALLOC})
    main()
