"""`lora-fx train` at its defaults beside TRL's SFTTrainer with PEFT: losses, CPU and peak memory.

    pip install trl peft datasets
    OMP_NUM_THREADS=1 python -m tests.benchmarks.trl [--steps 15 60] [--layers 30]
        [--rounds 1] [--keep quiet]

A random Llama of SmolLM2-135M's shape, and a chat of short lines. Both commands start from the same
A and B, read the same lines in the same order, and train in float32 on the assistant's tokens with
AdamW. TRL is given the learning rates of our warm-up: transformers' own has rate 0 in the first
step; `--warmup 0` makes the schedules of both equal without that. `--validation 0` is the only
default that is set otherwise, since TRL validates nothing by default.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = (
    *("the", "cat", "sees", "a", "small", "dog", "and", "it", "runs", "over", "green", "hills"),
    *("while", "rain", "falls", "on", "old", "roofs"),
)
BATCH, BATCHES, RATE, WARMUP, LONGEST = 4, 2, 2e-4, 0.05, 1024
"""The defaults of causal language models, as `lora-fx train` prints them."""


def chat(lines: int) -> list[dict[str, Any]]:
    """Return a user's question and an assistant's answer for each line."""
    generator = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    return [
        {
            "messages": [
                {"role": "user", "content": words(5, 20)},
                {"role": "assistant", "content": words(10, 40)},
            ]
        }
        for _ in range(lines)
    ]


def in_our_order(rows: Sequence[Any]) -> list[Any]:
    """Return the lines in the order in which the first epoch of `lora-fx train` reads them."""
    import numpy as np

    order = np.arange(len(rows))
    np.random.default_rng(0).shuffle(order)
    return [rows[int(number)] for number in order]


def build(folder: Path, layers: int) -> None:
    """Write a random Llama of SmolLM2-135M's shape with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.fx.train.language_models import tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.04,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(size=1000).save_pretrained(folder)


def write_data(folder: Path, rows: Sequence[Any]) -> None:
    """Write the lines for both: ours are shuffled by the command, TRL's are in that order."""
    for name, lines in (("ours", rows), ("trl", in_our_order(rows))):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def write_start(base: Path, adapter: Path) -> None:
    """Save the adapter from which `lora-fx train BASE` starts, in PEFT's format."""
    import lora_fx

    module = lora_fx.insert(str(base), dead="allow")
    lora_fx.save_adapter(module.adapter(), adapter)


def share_of_rate(step: int, steps: int) -> float:
    """Return the share of the rate at a step, counted from 0: warm-up, then half a cosine."""
    rise = math.ceil(steps * WARMUP)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def train_by_trl(base: str, folder: str, steps: int) -> None:
    """Train by TRL, save the adapter as `FOLDER/trl` and the losses as `FOLDER/trl.json`."""
    import torch
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{folder}/start", is_trainable=True)
    with open(f"{folder}/trl.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    config = trl.SFTConfig(
        output_dir=f"{folder}/trl", max_steps=steps, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=BATCHES, max_grad_norm=1.0, max_length=LONGEST,
        train_sampling_strategy="sequential", assistant_only_loss=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(min(step, steps - 1), steps)
    )
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    trainer.save_model(f"{folder}/trl")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    Path(folder, "trl.json").write_text(json.dumps(losses), "utf-8")


def commands(base: Path, folder: Path, steps: int) -> dict[str, list[str]]:
    """Return the command of each side."""
    ours = ["lora_fx.cli", "train", str(base), f"{folder}/ours.jsonl", "-o", f"{folder}/ours"]
    ours += ["--steps", str(steps), "--validation", "0", "--curve", f"{folder}/ours.csv", "--force"]
    theirs = [__spec__.name, "--trl", str(base), str(folder), str(steps)]
    return {
        name: [sys.executable, "-m", *rest] for name, rest in (("TRL", theirs), ("lora-fx", ours))
    }


def losses_of(folder: Path) -> tuple[list[float], list[float]]:
    """Return our losses and TRL's after both commands ran."""
    lines = (folder / "ours.csv").read_text("utf-8").splitlines()[1:]
    ours = [float(line.split(",")[1]) for line in lines]
    return ours, json.loads((folder / "trl.json").read_text("utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """Print losses, their largest difference, and what both commands took."""
    from tests.benchmarks.interleave import Run, processor, rows, run
    from tests.benchmarks.kept import add_keep, report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 60])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    add_keep(parser)
    options = parser.parse_args(argv)
    print(processor())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = folder / "base"
        build(base, options.layers)
        write_data(folder, chat(1000))
        write_start(base, folder / "start")
        for steps in options.steps:
            found: dict[str, list[Run]] = {}
            for _ in range(options.rounds):
                for name, command in commands(base, folder, steps).items():
                    found.setdefault(name, []).append(run(command))
            ours, theirs = losses_of(folder)
            print(f"\n{options.layers} layers, {steps} steps: loss of lora-fx, of TRL, difference")
            for step, (our, their) in enumerate(zip(ours, theirs, strict=True), 1):
                print(f"{step:4} {our:10.6f} {their:10.6f} {our - their:10.1e}")
            pairs = zip(ours, theirs, strict=True)
            difference = max(abs(our - their) for our, their in pairs)
            what = f"{options.layers} layers, {steps} steps: whole commands, seconds"
            table = rows(found)
            table[-1]["largest difference of a loss"] = f"{difference:.1e}"
            report("trl", what, table, options.keep)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        train_by_trl(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
