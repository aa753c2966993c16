"""Ten steps beside TRL's SFTTrainer: the same A and B, the same lines in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.data_files import json_rows
from lora_fx.fx.load.models import load_model
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.train.language_data import language_table
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.settings import Settings
from tests.benchmarks import trl
from tests.cli.test_cli import run
from tests.fx.train.language_models import KINDS, PLAIN, SIZES, folder, rows, tokenizer, write

pytestmark = pytest.mark.slow
STEPS, EACH, TOGETHER = 10, 3, 2


def trl_losses(base: Path, adapter: Path, data: list[dict[str, Any]], out: Path) -> list[float]:
    """The loss of every step, by TRL on PEFT's model."""
    sft, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    words = AutoTokenizer.from_pretrained(base)
    config = sft.SFTConfig(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=EACH,
        gradient_accumulation_steps=TOGETHER, learning_rate=0.02, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.01, optim="adamw_torch", max_grad_norm=1.0, max_length=24,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True,
        assistant_only_loss="messages" in data[0] and "generation" in words.chat_template,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = sft.SFTTrainer(
        PeftModel.from_pretrained(model, adapter, is_trainable=True),
        config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=words,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.filterwarnings("ignore")  # TRL's, datasets' and pyarrow's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["text", "prompt", "messages", "unmarked"])
def test_losses_equal_trl(tmp_path: Path, kind: str, form: str) -> None:
    pytest.importorskip("trl")
    data = rows(form, STEPS * EACH * TOGETHER)
    base = folder(tmp_path / "base", kind, *([PLAIN] if form == "unmarked" else []))
    loaded = load_model(base)
    path = write(tmp_path / "data.jsonl", data)
    found = language_table(path, loaded.module, base, 24)
    assert found is not None and len(found[0]) == len(data) == len(list(json_rows(path)))
    model = lora_fx.insert(loaded.module, (), loaded.kwargs, rank=3, alpha=4.5, exclude="role:head")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in insertion_of(model).slots().values():
            b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    lora_fx.save_adapter(model.adapter(), tmp_path / "start")
    order = np.arange(len(data))
    np.random.default_rng(0).shuffle(order)
    theirs = trl_losses(base, tmp_path / "start", [data[i] for i in order], tmp_path / "trl")
    settings = Settings(
        steps=STEPS, batch_size=EACH * TOGETHER, accumulate=TOGETHER, lr=0.02, schedule="linear",
        warmup=0.0,
    )  # fmt: skip
    ours = fit(model, found[0], settings=settings).losses
    print(kind, form, [f"{a:.4f} {b:.4f}" for a, b in zip(ours, theirs, strict=True)])
    assert max(ours) - min(ours) > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # TRL's, datasets' and pyarrow's own
def test_a_command_at_its_defaults_equals_trl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of 60 steps, and A and B after them; tests/benchmarks/trl.py times the same runs."""
    pytest.importorskip("trl")
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, tie_word_embeddings=False, **SIZES)
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    trl.write_data(tmp_path, trl.chat(500))
    trl.write_start(base, tmp_path / "start")
    trl.train_by_trl(str(base), str(tmp_path), 60)
    argv = trl.commands(base, tmp_path, 60)["lora-fx"]
    code, _, err = run(capsys, *argv[3:])
    assert code == 0, err

    ours, theirs = trl.losses_of(tmp_path)
    assert len(ours) == 60
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    trained = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    reference = load_file(tmp_path / "trl" / "adapter_model.safetensors")
    assert trained.keys() == reference.keys()
    for name, tensor in trained.items():
        largest = float(np.abs(reference[name]).max())
        assert largest > 2e-3, name
        np.testing.assert_allclose(tensor, reference[name], rtol=0, atol=0.02 * largest)
