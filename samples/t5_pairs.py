"""Adapt a small T5 that names the module of a docstring, and compare with PEFT.

`python samples/t5_pairs.py [--quick]` needs `pip install 'lora-fx[samples]'`. Package registries
have no T5 weights, so the sample first trains a small T5 on half of the modules' names. The adapter
then learns the other half. Texts are bytes, as in ByT5.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
from beside_peft import Batch, train, train_both
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

import lora_fx
from lora_fx.cli.demo_data import docstrings
from lora_fx.onnx.session import open_session

quick = "--quick" in sys.argv
first_steps, steps, held = (20, 5, 100) if quick else (300, 100, 500)
QUESTION, ANSWER, ROWS, WIDTH = 48, 12, 32, 64 if quick else 128


def encoded(texts: list[str], length: int) -> torch.Tensor:
    """[n, length]: each byte plus 3, then 1 for the end, then 0 as padding."""
    rows = [[b + 3 for b in text.encode()[: length - 1]] + [1] for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def questions(pairs: list[tuple[str, str]]) -> Batch:
    """A batch of docstrings and their modules; the decoder's input is the answer, one byte late."""
    asked, answers = (
        encoded([t for _, t in pairs], QUESTION),
        encoded([m for m, _ in pairs], ANSWER),
    )
    late = torch.cat([torch.zeros(len(pairs), 1, dtype=torch.long), answers[:, :-1]], 1)
    return {
        "input_ids": asked,
        "attention_mask": (asked > 0).long(),
        "decoder_input_ids": late,
        "labels": answers,
    }


def batches(pairs: list[tuple[str, str]], count: int) -> list[Batch]:
    """`count` batches, which repeat the pairs if there are too few."""
    rows = [pairs[i % len(pairs)] for i in range(count * ROWS)]
    return [questions(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


torch.manual_seed(0)
every = sorted(set(docstrings()))
order = torch.randperm(len(every)).tolist()
halves: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
for i in order:
    halves[every[i][0] >= "h"].append(every[i])
old, (test, fresh) = halves[0], (halves[1][:held], halves[1][held:])
print(f"{len(old)} pairs of modules up to g, {len(fresh)} of later modules; {held} more held out")
config = T5Config(
    vocab_size=259, d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
    dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
)  # fmt: skip
model = T5ForConditionalGeneration(config)


def scores(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The scores of every byte of the answers, [n, ANSWER, 259]."""
    return module(**{k: v for k, v in batch.items() if k != "labels"}).logits


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of the answers' bytes."""
    return cross_entropy(
        scores(module, batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=0
    )


losses = train(model, batches(old, first_steps), loss, lr=3e-3)
print(f"the base: loss {losses[0]:.3f} → {losses[-1]:.3f}")
model.requires_grad_(False)
asked = questions(test)


def answers(logits: torch.Tensor) -> torch.Tensor:
    """The most likely byte at every position of the answer, 0 after it."""
    return logits.argmax(-1) * (asked["labels"] > 0)


def judged(module: nn.Module) -> tuple[float, torch.Tensor]:
    """The perplexity of the held-out answers, and the predicted answers."""
    with torch.no_grad():
        return math.exp(loss(module, asked)), answers(scores(module, asked))


before, first = judged(model)
example = {k: v[:2] for k, v in asked.items() if k != "labels"}
adapted = lora_fx.insert(model, (), example, rank=8, exclude="lm_head")
both = train_both(model, adapted, batches(fresh, steps), loss, lr=1e-2)
print(both)
(after, ours), (reference, theirs) = judged(adapted), judged(both.peft)
print(f"perplexity {before:.2f} → {after:.2f}, PEFT's {reference:.2f}")
moved, differ = ((a != b).any(1).sum() for a, b in ((ours, first), (ours, theirs)))
print(f"{moved} predictions changed, {differ} differ from PEFT's, of {held}")

with tempfile.TemporaryDirectory() as folder:
    print(lora_fx.export(adapted, Path(folder) / "model.onnx", provider="cpu"))
    session = open_session(Path(folder) / "model.onnx", "cpu")
    got = session.run({k: v.numpy() for k, v in asked.items() if k != "labels"})["logits"]
same = int((answers(torch.from_numpy(got)) == ours).all(1).sum())
print(f"ONNX Runtime and torch predict equal answers for {same} of {held} pairs")
