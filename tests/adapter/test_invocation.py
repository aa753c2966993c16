"""Where an aLoRA begins to act, by PEFT's own function; and what cannot take one, by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx import Adapter, LoraFxError
from lora_fx.adapter.adapter import INVOCATION, mix
from lora_fx.adapter.invocation import ALWAYS, NEVER, adapter_starts, checked, planted
from lora_fx.adapter.lowrank import LowRank

KEY = "model.layers.0.self_attn.q_proj.weight"


def an_adapter(*tokens: int, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((3, 8)).astype(np.float32)
    b = rng.standard_normal((24, 3)).astype(np.float32)
    metadata = {INVOCATION: [*tokens]} if tokens else {}
    return Adapter({KEY: LowRank(a, b, 6.0)}, metadata)


def of_peft(ids: Any, tokens: list[int]) -> list[int]:
    """The starts by `calculate_alora_offsets`, which counts them from the end."""
    variants = pytest.importorskip("peft.tuners.lora.variants")
    config: Any = {"a": SimpleNamespace(alora_invocation_tokens=tokens)}
    offsets = variants.calculate_alora_offsets(config, "a", torch.tensor(ids))
    length = np.shape(ids)[1]
    return [NEVER if offset is None else length - offset for offset in offsets]


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [1, 2, 1]])
def test_starts_are_those_of_peft(length: int, tokens: list[int]) -> None:
    ids = np.random.default_rng(length).integers(1, 3, (40, length))
    starts = adapter_starts(ids, tokens)
    assert starts.tolist() == of_peft(ids, tokens)
    assert starts.dtype == np.int64
    if length == 9:
        assert len({*starts.tolist()}) > 2, "rows differ"


def test_the_last_occurrence_counts_and_pads_are_ids() -> None:
    assert adapter_starts(np.array([[0, 0, 5, 6, 7, 5, 6, 7]]), [5, 6]) == 5
    assert adapter_starts(np.array([5, 6]), [5, 6]) == 0
    assert adapter_starts(np.array([[5]]), [5, 6]) == NEVER
    assert adapter_starts(np.array([[5], [6]]), []).tolist() == [ALWAYS, ALWAYS]
    with pytest.raises(LoraFxError, match="rows of several lengths"):
        adapter_starts([[1, 5, 6], [2, 3]], [5, 6])


def test_wrong_ids_and_tokens_are_refused() -> None:
    for wrong in ([], [1.5], [-1], [True], "5,6", None, [1] * 5000):
        with pytest.raises(LoraFxError, match="expected a list of 1 to 4096 token ids"):
            checked(wrong, "invocation")
    assert checked(np.array([3, 4]), "invocation") == (3, 4)
    for ids in (np.zeros((2, 3)), np.zeros((1, 2, 3), int)):
        with pytest.raises(LoraFxError, match="expected whole numbers"):
            adapter_starts(ids, [1])


def test_planted_rows_have_the_tokens_but_for_every_third() -> None:
    starts = adapter_starts(planted(np.zeros((5, 7), int), [8, 9]), [8, 9])
    assert (starts != NEVER).tolist() == [True, True, False, True, True]
    assert len({*starts[starts != NEVER].tolist()}) > 1
    short = np.zeros((2, 1), int)
    assert (planted(short, [8, 9]) == short).all()


@pytest.mark.parametrize("format", ["kohya", "diffusers", "onnx_adapter"])
def test_formats_without_a_place_refuse(tmp_path: Path, format: str) -> None:
    name = "x.onnx_adapter" if format == "onnx_adapter" else "x.safetensors"
    with pytest.raises(LoraFxError, match="no place for invocation tokens") as caught:
        lora_fx.save_adapter(an_adapter(5, 6), tmp_path / name, format=format)
    assert caught.value.hint == "write format peft or gguf"
    assert not (tmp_path / name).exists()


def test_a_mix_needs_the_same_tokens() -> None:
    first, second = an_adapter(5, 6), an_adapter(5, 6, seed=1)
    assert mix([(first, 1.0), (second, 0.5)]).invocation == (5, 6)
    for other in (an_adapter(), an_adapter(6, 5)):
        with pytest.raises(LoraFxError, match="begin to act at different tokens"):
            mix([(first, 1.0), (other, 1.0)])


def test_truncate_and_weights_keep_the_tokens() -> None:
    adapter = an_adapter(5, 6)
    assert adapter.weighted(0.5).invocation == (5, 6)
    assert lora_fx.truncate(adapter, rank=2).invocation == (5, 6)
