"""MiniLM and SmolLM2 with batches of 512 tokens and held-out texts, for tests beside PEFT."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sources import smollm2
from torch import nn

from lora_fx.cli.demo_data import topics
from lora_fx.fx.load import minilm
from lora_fx.onnx.session import open_session

TOKENS = 512
"""Of one step."""


@dataclass(frozen=True)
class Case:
    """A model, what insert is told, batches with labels, and held-out inputs in equal parts."""

    model: nn.Module
    options: dict[str, Any]
    batches: list[dict[str, torch.Tensor]]
    held: list[dict[str, torch.Tensor]]
    lr: float

    @property
    def example(self) -> dict[str, torch.Tensor]:
        return inputs(self.batches[0])


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}


def scores(model: nn.Module, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**feeds)
    return getattr(out, "logits", out)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of classes, or of the next token."""
    got, labels = scores(model, inputs(batch)), batch["labels"]
    if got.dim() == 3:
        got, labels = got[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(got, labels)


@torch.no_grad()
def predictions(model: nn.Module, held: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """The best class of every text, or the best next token at every position."""
    return np.concatenate([scores(model, part).argmax(-1).flatten().numpy() for part in held])


def runtime_predictions(path: Path, held: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """The same of an ONNX file, in ONNX Runtime."""
    session = open_session(path, "cpu")
    parts = []
    for part in held:
        out = session.run({k: v.numpy() for k, v in part.items()})
        parts.append(next(iter(out.values())).argmax(-1).flatten())
    return np.concatenate(parts)


def minilm_case(
    layers: int, steps: int, held: int, probed: int = 400, package: str | None = None
) -> Case:
    """Docstrings of 32 tokens or more, cut there, by volume; the head starts from a probe.

    With `package` they are those of one package of the standard library: fewer files to parse.
    """
    length = 32
    root = Path(sysconfig.get_paths()["stdlib"]) / package if package else None
    data = topics(5000, 1000, root=root)
    model = minilm.Classifier(len(data.names)).eval().requires_grad_(False)
    model.encoder.encoder.layer = model.encoder.encoder.layer[:layers]

    def rows(part: tuple[list[str], list[int]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [row["ids"] for row in minilm.tokenise(part[0], length)]
        long = [i for i, row in enumerate(ids) if len(row) == length][:count]
        assert len(long) == count, f"{len(long)} texts are long enough, not {count}"
        return torch.tensor([ids[i] for i in long]), torch.tensor([part[1][i] for i in long])

    each = TOKENS // length
    ids, labels = rows(data.train, probed + steps * each)
    mask = torch.ones(each, length, dtype=torch.long)
    with torch.no_grad():
        parts = [model.features(x, torch.ones_like(x)).numpy() for x in ids[:probed].split(50)]
        weight, bias = minilm.probe(
            np.concatenate(parts), labels[:probed].tolist(), len(data.names), 1e-3
        )
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    batches = [
        {"input_ids": x, "attention_mask": mask, "labels": y}
        for x, y in zip(ids[probed:].split(each), labels[probed:].split(each), strict=True)
    ]
    parts = rows(data.test, held)[0].split(50)
    kept = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in parts]
    return Case(model, {"exclude": "head", "also_train": "head"}, batches, kept, 1e-3)


def smollm2_case(steps: int, held: int) -> Case:
    """The whole model on windows of 256 tokens of docstrings; held is a number of windows.

    Raises:
        LoraFxError: The file is not there.
    """
    model, tokenizer = smollm2()
    length = 256
    data = topics(6000, 600)

    def windows(texts: list[str], count: int) -> torch.Tensor:
        ids = tokenizer("\n\n".join(texts))["input_ids"][: count * length]
        return torch.tensor(ids).view(count, length)

    return language_case(
        model, windows(data.train[0], steps * TOKENS // length), windows(data.test[0], held)
    )


def smollm2_cut(layers: int, steps: int, held: int) -> Case:
    """SmolLM2's blocks, few of them, with random weights, a smaller vocabulary and random tokens.

    CI has no file of the real one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (2 * steps + held, 256))
    return language_case(LlamaForCausalLM(config).eval(), ids[held:], ids[:held])


def language_case(model: nn.Module, windows: torch.Tensor, held: torch.Tensor) -> Case:
    model.requires_grad_(False)
    model.config.use_cache = False
    each = TOKENS // windows.shape[1]
    batches = [{"input_ids": x, "labels": x} for x in windows.split(each)]
    return Case(model, {}, batches, [{"input_ids": x} for x in held.split(2)], 5e-4)
