"""Train the module that insert returns with Hugging Face's Trainer: checkpoints and resuming.

`python samples/hf_trainer.py` needs `pip install 'lora-fx[hf]' accelerate`. A tiny Llama with tied
weights learns rows of numbers by heart. A second run resumes from a checkpoint of the first run.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fx
from lora_fx.fx.train.hf_trainer import AdapterCheckpoints

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
    initializer_range=0.2,
)  # fmt: skip
base = LlamaForCausalLM(config).eval()
ids = torch.randint(3, 64, (16, 10))
rows = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
example = {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}


class AdapterTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints are adapter folders."""


start = lora_fx.insert(base, (), example, rank=4, exclude="role:head")


def train(folder: Path, resume: Path | None = None) -> lora_fx.Adapter:
    model = copy.deepcopy(start)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=16, per_device_train_batch_size=4, learning_rate=0.02,
        lr_scheduler_type="constant", activation_checkpointing=True, save_steps=8, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = AdapterTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume and str(resume))
    print(f"loss {before:.3f} → {trainer.evaluate()['eval_loss']:.3f}")
    return model.adapter()


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    whole = train(folder)
    print("checkpoint:", *sorted(p.name for p in (folder / "checkpoint-8").glob("adapter*")))
    resumed = train(folder, resume=folder / "checkpoint-8")
same = all((resumed.lowrank[key].b == update.b).all() for key, update in whole.lowrank.items())
print(f"the resumed run gives the same adapter: {same}")
