"""Tiny causal language models with a tokenizer and a chat template, as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
TEXT = "the cat sees a small dog and it runs over green hills while rain falls on old roofs"
WORDS = TEXT.split(" ")
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
)
"""A template that does not say what the assistant wrote."""
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


def tokenizer(template: str | None = MARKED, size: int = 320) -> PreTrainedTokenizerFast:
    """Byte pairs, learnt from a few words, with these special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=template,
    )  # fmt: skip


def folder(path: Path, kind: str = "llama", template: str | None = MARKED) -> Path:
    """A random model of that kind, and its tokenizer."""
    torch.manual_seed(0)
    config, model, more = KINDS[kind]
    words = tokenizer(template)
    model(config(vocab_size=len(words), **SIZES, **more)).save_pretrained(path)
    words.save_pretrained(path)
    return path


def write(path: Path, rows: Iterable[object]) -> str:
    """Lines of JSON; the name of the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def rows(form: str, count: int) -> list[dict[str, Any]]:
    """Lines of a form, of 4 to 17 words."""

    def words(start: int, length: int) -> str:
        return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))

    made: list[dict[str, Any]] = []
    for i in range(count):
        before, after = words(i, 2 + i % 5), words(3 * i + 1, 2 + (7 * i) % 11)
        if form == "text":
            made.append({"text": f"{before} {after}"})
        elif form == "prompt":
            made.append({"prompt": before, "completion": f" {after}"})
        else:
            turns = [("user", before), ("assistant", after), ("user", words(i, 1 + i % 3))]
            turns += [("assistant", words(i + 5, 3))] if i % 2 else []
            if not i % 3:
                turns.insert(0, ("system", "the rain"))
            made.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    return made
