"""CPU time of insert and export beside torch's own capture and export, in ratios.

    python -m tests.benchmarks.capture [insert] [export] [--layers 16 32] [--rounds 3]

A random Llama. `insert` is compared with torch.export of the same model in train and in eval
mode, `lora_fx.export` with torch.onnx.export(dynamo=True). Both ways of torch are timed with
every size fixed, which is the baseline, and with a free batch and length, which is what lora_fx
captures and which costs torch twice as much. CPU time of the process on one thread; all run in
turn, A B C A B C …, the baseline twice, the second time as a control. What is imported on first
use is paid for by a model of one layer, which is not counted.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx.onnx.timing import interleave, timed
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import add_keep, figures, report

WORDS, LENGTH = 256, 16
FREE = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
"""Batch and length, as lora_fx frees them by default."""
AGAIN = "the same again (control)"


def llama(layers: int, width: int) -> nn.Module:
    """A random Llama without a cache, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def both_modes(model: nn.Module, args: tuple[Any, ...], sizes: Any = None) -> None:
    """Capture the train and the eval graph by torch alone."""
    for training in (True, False):
        model.train(training)
        torch.export.export(model, args, dynamic_shapes=sizes, strict=False)


def insert(model: nn.Module, args: tuple[Any, ...], folder: Path) -> dict[str, Callable[[], Any]]:
    """Insert, and what it is compared with, the baseline first."""
    alone = copy.deepcopy(model)  # its mode changes
    return {
        "torch.export, both modes": partial(both_modes, alone, args),
        AGAIN: partial(both_modes, alone, args),
        "the same, free sizes": partial(both_modes, alone, args, FREE),
        "lora_fx.insert": partial(lora_fx.insert, model, args),
    }


def export(model: nn.Module, args: tuple[Any, ...], folder: Path) -> dict[str, Callable[[], Any]]:
    """Export, and what it is compared with, the baseline first."""
    alone = partial(
        torch.onnx.export, model, args, folder / "torch.onnx", dynamo=True, verbose=False
    )
    return {
        "torch.onnx.export": alone,
        AGAIN: alone,
        "the same, free sizes": partial(alone, dynamic_shapes=FREE),
        "lora_fx.export": partial(lora_fx.export, model, folder / "ours.onnx", args, force=True),
    }


GROUPS = {"insert": insert, "export": export}


def main(argv: Sequence[str] | None = None) -> None:
    """Print two tables for every number of layers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.capture")
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"width {given.width}, {given.rounds} rounds: seconds of CPU")
    args = (torch.randint(0, WORDS, (2, LENGTH)),)
    with tempfile.TemporaryDirectory() as name:
        for group in given.groups or GROUPS:
            for run in GROUPS[group](llama(1, given.width), args, Path(name)).values():
                run()
            for layers in given.layers:
                calls = GROUPS[group](llama(layers, given.width), args, Path(name))
                runs = {k: partial(timed, f) for k, f in calls.items()}
                found = interleave(runs, given.rounds, warmup=0, before=gc.collect)
                base = [sample.cpu for sample in next(iter(found.values()))]
                rows = [
                    figures(label, [sample.cpu for sample in samples], base)
                    for label, samples in found.items()
                ]
                report("capture", f"{group}, {layers} layers: CPU seconds", rows, given.keep)


if __name__ == "__main__":
    main()
