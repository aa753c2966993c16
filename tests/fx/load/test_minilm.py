"""What the demo does around MiniLM: batches of like length, and probes on its features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lora_fx.dtypes import Array
from lora_fx.fx.load import minilm

ROWS: list[dict[str, Any]] = [{"ids": [1, 2, 3]}, {"ids": [4]}, {"ids": [5, 6]}]


def test_rows_of_like_length_are_batched_and_padded() -> None:
    first, second = minilm.batches(ROWS, 2)
    positions, ids, mask = first
    assert positions.tolist() == [1, 2]
    assert ids.tolist() == [[4, 0], [5, 6]] and mask.tolist() == [[1, 0], [1, 1]]
    assert [array.tolist() for array in second] == [[0], [[1, 2, 3]], [[1, 1, 1]]]


def test_results_have_the_order_of_the_rows() -> None:
    def total(ids: Array, mask: Array) -> Array:
        result: Array = (ids * mask).sum(1, keepdims=True)
        return result

    results = minilm.run_all(total, ROWS)
    assert results.tolist() == [[6.0], [4.0], [11.0]] and results.dtype == np.float32


def test_the_best_probe_tells_classes_apart() -> None:
    labels = [0, 1] * 20
    noise = np.random.default_rng(0).normal(scale=0.1, size=(40, 3))
    features = (noise + np.array(labels)[:, None]).astype(np.float32)
    weight, bias, decay = minilm.best_probe(features, labels, 2)
    scores = torch.from_numpy(features) @ weight.T + bias
    assert scores.argmax(1).tolist() == labels and decay in (3e-3, 1e-3, 3e-4, 1e-4)
    assert weight.shape == (2, 3) and bias.shape == (2,)
