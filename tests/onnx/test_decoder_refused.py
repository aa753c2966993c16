"""What an export with a cache refuses, by name, with nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.insertion import insertion_of
from tests.onnx.decoders import gpt2, llama
from tests.onnx.test_decoder import IDS


def other(name: str) -> Any:
    """Models that have no cache of keys and values of all tokens."""
    import transformers as tf

    small = dict(vocab_size=96, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    if name == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**small, intermediate_size=40))
    if name == "mamba":
        config = tf.MambaConfig(vocab_size=96, hidden_size=24, num_hidden_layers=1, state_size=4)
        return tf.MambaForCausalLM(config)
    if name == "body":
        return llama().model
    return torch.nn.Linear(3, 4)


@pytest.mark.parametrize(
    "name, words",
    {
        "bert": "BertForMaskedLM",
        "mamba": "MambaForCausalLM",
        "body": "LlamaModel returns no logits",
        "linear": "Linear is not a decoder of transformers",
    }.items(),
)
def test_what_is_no_decoder_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(LoraFxError, match=words) as e:
        lora_fx.export(other(name).eval(), tmp_path / "m.onnx", cache=True)
    assert "causal language model" in str(e.value.hint)
    assert not list(tmp_path.iterdir())


def test_what_a_cache_excludes_is_refused(tmp_path: Path) -> None:
    path, ids = tmp_path / "m.onnx", torch.tensor(IDS)
    for more, words in (
        ({"mode": "train"}, "mode train has no cache"),
        ({"kwargs": {"input_ids": ids}}, "sets the inputs and their dimensions itself"),
        ({"inputs": {"input_ids": IDS}}, "sets the inputs and their dimensions itself"),
        ({"dynamic": {"input_ids": {1: "n"}}}, "sets the inputs and their dimensions itself"),
    ):
        with pytest.raises(LoraFxError, match=words):
            lora_fx.export(llama(), path, cache=True, **more)
    replaced = llama()
    replaced.forward = replaced.forward
    with pytest.raises(LoraFxError, match="object was replaced"):
        lora_fx.export(replaced, path, cache=True)
    program = torch.export.export(torch.nn.Linear(3, 4), (torch.randn(2, 3),))
    torch.export.save(program, tmp_path / "x.pt2")
    with pytest.raises(LoraFxError, match="holds a traced graph without a cache"):
        lora_fx.export(tmp_path / "x.pt2", path, cache=True)
    (tmp_path / "x.pt2").unlink()
    path.write_text("mine")
    with pytest.raises(LoraFxError, match="exists"):
        lora_fx.export(gpt2(), path, cache=True)
    with pytest.raises(LoraFxError, match="attached"):
        model = llama()
        lora_fx.attach(model, (), {"input_ids": ids, "use_cache": False}, rank=2)
        lora_fx.export(model, tmp_path / "n.onnx", cache=True)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_cache_among_the_outputs_of_a_capture_is_left_out_and_said() -> None:
    model, ids = gpt2(), torch.tensor(IDS)
    module = lora_fx.insert(model, (ids,), rank=2)
    (note,) = insertion_of(module).found.notes
    assert "a key-value cache is not a tensor" in note
    out = module(ids)
    torch.testing.assert_close(out.logits, model(ids).logits)
    assert list(out) == ["logits"]
