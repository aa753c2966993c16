"""The callback with TRL's SFTTrainer, where trl is installed: `pip install trl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.integrations.trainer import ExportAtEnd

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("default")  # trl and datasets warn of transformers and of each other
@pytest.mark.parametrize("kind", ["attach", "peft"])
def test_sft(kind: str, tmp_path: Path) -> None:
    import trl_sft_dpo as sample
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(sample.vocabulary), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, len(sample.vocabulary), (2, 5))
    more: dict[str, Any] = {}
    if kind == "attach":
        lora_fx.attach(model, (), {"input_ids": ids}, rank=4, exclude="role:head")
    else:
        more["peft_config"] = peft.LoraConfig(r=4, target_modules="all-linear")
    callback = ExportAtEnd(tmp_path / "x.onnx", kwargs={"input_ids": ids})
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(str(tmp_path / "out"), **{**sample.settings, "max_steps": 4}),
        processing_class=sample.tokenizer, train_dataset=datasets.Dataset.from_list(sample.facts),
        callbacks=[callback], **more,
    )  # fmt: skip
    trainer.train()
    first, last = sample.logged(trainer, "loss")
    assert last < first
    assert callback.verified and max(row.rel for row in callback.verified.parity) < 1e-5
