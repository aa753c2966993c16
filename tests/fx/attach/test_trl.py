"""attach and TRL's SFTTrainer, which reads the head's weight itself and never makes all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=44, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=44, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("build", [llama, gpt2], ids=lambda b: str(b.__name__))
def test_sft(build: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    torch.manual_seed(0)
    model, ids = build(), torch.randint(4, 44, (2, 8))
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    lora_fx.attach(model, (), inputs, rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"text": " ".join(f"w{(i + j) % 40}" for j in range(12))} for i in range(32)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8,
            learning_rate=2e-2, logging_steps=5, report_to=[], save_strategy="no", use_cpu=True,
            max_length=32, disable_tqdm=True, bf16=False, seed=0,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.7 * losses[0], losses
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}, "all of the adapter, and nothing else"
    adapter = model.adapter()
    with torch.no_grad():
        live = model.eval()(**inputs).logits
    lora_fx.detach(model)
    fresh = build()  # the trainer has put a forward of its own on the model
    fresh.load_state_dict(model.state_dict())
    graph = lora_fx.insert(fresh.eval(), (), inputs, adapter=adapter)
    with torch.no_grad():
        assert float((graph(**inputs).logits - live).abs().max()) < 1e-4 * float(live.abs().max())


def test_sft_refuses_a_captured_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    ids = torch.randint(4, 44, (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    module = lora_fx.insert(llama(), (), inputs, rank=4)
    with pytest.raises(LoraFxError, match=r"lora_fx\.attach"):
        trl.SFTTrainer(
            model=module,
            args=trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
            train_dataset=datasets.Dataset.from_list([{"text": "w1 w2"}]),
            processing_class=tokenizer(),
        )
