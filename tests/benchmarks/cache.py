"""CPU time of an export with a key-value cache beside the same export without, by depth.

    python -m tests.benchmarks.cache [--layers 2 8 16] [--rounds 3]

A random Llama with its head, of so many layers, with a free batch and length; with the cache its
length is free too. Both run in turn, A B A B …, and so does a long way round, which traces and
translates every layer (`--long`). The table is that of tests.benchmarks.depth: the least CPU time
for each depth, its ratio to the export without a cache, and what a layer costs (b).
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from tests.benchmarks.capture import WORDS
from tests.benchmarks.depth import least_times, table
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import add_keep, gated, report

BASE = "export"
LONG = "export --cache --no-repeat"
ROWS: dict[str, dict[str, Any]] = {
    BASE: {},
    "export --cache": {"cache": True},
    LONG: {"cache": True, "repeat": False},
}
"""Name → options of export."""


def llama(layers: int, width: int) -> nn.Module:
    """A random Llama with its head, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def export(layers: int, width: int, path: Path, options: dict[str, Any]) -> Callable[[], object]:
    """An export of a new model, with or without its cache."""
    model = llama(layers, width)
    if options.get("cache"):
        return partial(lora_fx.export, model, path, force=True, provider="cpu", **options)
    model.config.use_cache = False
    args = torch.randint(0, WORDS, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    return partial(lora_fx.export, model, path, args, force=True, provider="cpu", **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for every depth and row, and their table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cache")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="time the long way too")
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"width {given.width}, the least of {given.rounds} rounds: seconds of CPU")

    rows = [row for row in ROWS if given.long or row != LONG]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"

        def jobs(layers: int) -> dict[str, Callable[[], object]]:
            return {row: export(layers, given.width, path, ROWS[row]) for row in rows}

        rows_by_depth = table(given.layers, least_times(given.layers, given.rounds, jobs))
        deepest = given.layers[-1]
        cached = rows_by_depth[1]
        gate = gated({"what": "", "ratio": cached[f"ratio at {deepest}"]}, "1.30 × export", 1.3)
        rows_by_depth[1] = {**cached, **{name: gate[name] for name in gate if name != "what"}}
        report("cache", f"{deepest} layers at most: CPU seconds", rows_by_depth, given.keep)


if __name__ == "__main__":
    main()
