"""Train a live model that lora_fx.attach adapted, with TRL's SFTTrainer and DPOTrainer.

`python samples/trl_sft_dpo.py` needs `pip install 'lora-fx[hf]' peft trl`. A tiny random Llama with
its own small tokenizer learns answers by heart, and then learns to prefer other answers. PEFT reads
the saved adapter and gives the same logits.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lora_fx
from lora_fx.fx.train.hf_trainer import AdapterCheckpoints

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sea": "blue"}
words = sorted({w for pair in COLOURS.items() for text in pair for w in text.split()} | {"is"})
vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
facts = [{"prompt": f"{thing} is", "completion": f" {c}"} for thing, c in COLOURS.items()]
others = [*list(COLOURS.values())[1:], "green"]
pairs = [
    {"prompt": fact["prompt"], "chosen": f" {other}", "rejected": fact["completion"]}
    for fact, other in zip(facts, others, strict=True)
]
settings = {
    "per_device_train_batch_size": 5, "learning_rate": 0.02, "lr_scheduler_type": "constant",
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "dataloader_pin_memory": False, "max_steps": 30,
}  # fmt: skip


class Sft(AdapterCheckpoints, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose checkpoints are adapter folders."""


class Dpo(AdapterCheckpoints, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer whose checkpoints are adapter folders."""


def logged(trainer: SFTTrainer | DPOTrainer, what: str) -> tuple[float, float]:
    """The first and the last logged value of `what`."""
    values = [row[what] for row in trainer.state.log_history if what in row]
    return values[0], values[-1]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    base, again = copy.deepcopy(model), copy.deepcopy(model)
    ids = torch.randint(3, len(vocabulary), (2, 5))
    lora_fx.attach(model, (), {"input_ids": ids}, rank=4, exclude="role:head")

    sft = Sft(
        model, SFTConfig(str(folder / "sft"), **settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list(facts),
    )  # fmt: skip
    sft.train()
    first, last = logged(sft, "loss")
    print(f"SFT: loss {first:.3f} → {last:.3f}")
    sft.save_model(str(folder / "learnt"))

    # the reference of DPO is the model after SFT: the base with the adapter folded in
    reference = PeftModel.from_pretrained(base, folder / "learnt").merge_and_unload()
    dpo = Dpo(
        model, reference, DPOConfig(str(folder / "dpo"), **settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs),
    )  # fmt: skip
    dpo.train()
    first, last = logged(dpo, "rewards/margins")
    print(f"DPO: margin of the rewards {first:.3f} → {last:.3f}")

    lora_fx.save_adapter(model.adapter(), folder / "preferred")
    theirs = PeftModel.from_pretrained(again, folder / "preferred").eval()
    with torch.no_grad():
        ours, peft, learnt = (m.eval()(ids).logits for m in (model, theirs, reference))
    same = bool((ours - peft).abs().max() < 1e-4 < 0.1 < (peft - learnt).abs().max())
    print(f"PEFT gives the same logits, which DPO has changed: {same}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
