"""Adapt a protein model (ESM-2) to tell membrane-like sequences from soluble ones.

`python samples/protein_esm2.py` needs `pip install 'lora-fx[domains]'`. The architecture is ESM-2's
own, from transformers, at a small size and with random weights: no package has trained ones.
The task is made: half of the sequences have a stretch of hydrophobic residues.
"""

from __future__ import annotations

import torch
from domains import Batch, adapt, prove, train
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import EsmConfig, EsmForSequenceClassification

RESIDUES = "LAGVSERTIDPKQNFYMHWC"  # ESM-2's order: their numbers begin at 4
HYDROPHOBIC = torch.tensor([4 + RESIDUES.index(residue) for residue in "LAVIFM"])
START, END = 0, 2
torch.manual_seed(0)


def batch(size: int = 16, length: int = 40, stretch: int = 14) -> Batch:
    """Random sequences between a start and an end; those of class 1 have a hydrophobic stretch."""
    ids = torch.randint(4, 24, (size, length))
    labels = torch.arange(size) % 2
    for row in range(1, size, 2):
        start = int(torch.randint(1, length - stretch - 1, ()))
        ids[row, start : start + stretch] = HYDROPHOBIC[torch.randint(0, 6, (stretch,))]
    ids[:, 0], ids[:, -1] = START, END
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


base = EsmForSequenceClassification(
    EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=256, position_embedding_type="rotary",
        token_dropout=True, emb_layer_norm_before=False, num_labels=2,
    )
).eval()  # fmt: skip
print("ESM-2, 3 layers, random weights")

batches = [batch() for _ in range(4)]
inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
adapted = adapt(base, inputs)


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of a batch."""
    output = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return cross_entropy(output.logits, batch["labels"])


train(adapted, batches, loss)
prove(base, adapted, inputs)
