"""Decode greedily with a key-value cache in ONNX Runtime, and compare with transformers.

`python samples/decode.py` needs `pip install 'lora-fx[hf]'`. It exports a tiny Llama with random
weights and an adapter, with its cache. The decoding loop in `greedy.py` uses only numpy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from greedy import greedy
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.onnx.session import open_session

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()

# two prompts of different lengths: the shorter one is padded on the left, and the mask is 0 there
ids = np.array([[5, 17, 29, 31, 8], [0, 0, 44, 3, 61]])
mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
feeds = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
STEPS = 20

# B is random, so that the adapter has an effect; training would start with B = 0
plain = model.generate(**feeds, max_new_tokens=STEPS, do_sample=False)
adapted = lora_fx.insert(model, (), {**feeds, "use_cache": False}, rank=4)
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "llama.onnx"
    print(lora_fx.export(adapted, path, cache=True, provider="cpu"))
    ours = greedy(open_session(path, "cpu"), ids, mask, STEPS)

lora_fx.attach(model, (), {**feeds, "use_cache": False}, adapter=adapted.adapter())
theirs = model.generate(**feeds, max_new_tokens=STEPS, do_sample=False)
print(f"tokens equal those of transformers: {np.array_equal(ours, theirs.numpy())}")
print(f"tokens equal the base model's: {np.array_equal(ours, plain.numpy())}")
