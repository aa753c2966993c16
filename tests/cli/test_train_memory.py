"""The memory of a training run up to its first step, beside the weights of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PEAK = """
import os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lora_fx.cli import main
from tests.anonymous_memory import watched
from tests.fx.train.language_models import WORDS, tokenizer, write
from pathlib import Path

os.chdir(sys.argv[1])
TOKENS, CLASSES, PART = 256, 32768, 4

def train(name, classes, tokens):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=classes, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    model.save_pretrained(name)
    del model
    tokenizer().save_pretrained(name)
    write(Path(f"{name}.jsonl"), 8 * [{"text": " ".join(WORDS * 200)}])

    options = f"--steps 1 --validation 0 --max-length {tokens} -o {name}-adapter"
    with watched() as grown:
        try:
            main(["train", name, f"{name}.jsonl", *options.split()])
        except SystemExit as end:
            assert not end.code, end.code
    return grown.peak - weights

train("small", 512, 8)  # imports
scores = PART * TOKENS * CLASSES * 4
print(train("large", CLASSES, TOKENS) / scores)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_first_step_holds_no_scores_of_a_whole_batch(tmp_path: Path) -> None:
    """Anonymous bytes from the start of the command, beside those of the weights.

    They are measured in scores of one batch of 4 lines in float32, of which a whole loss keeps
    about 4. What is left is two chunks of scores, each half of them, and the graphs.
    """
    run = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 2
