"""Small bases and adapters as transformers and PEFT save them, for the tests of doctor and verify.

Everything has random weights and sizes that tell rows from columns.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import nn

from lora_fx.dtypes import Array
from lora_fx.files.tensor_files import read_tensors, write_tensors

VOCABULARY = 48
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(*, tied: bool = False, layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=24
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 12, 1)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.mix(self.stem(x)))
        return y


def save_base(model: nn.Module, path: Path) -> Path:
    """A folder by save_pretrained, or a file for a plain module."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(path)
        return path
    file = path.with_suffix(".safetensors")
    write_tensors(file, {k: v.numpy() for k, v in model.state_dict().items()}, {"format": "pt"})
    return file


def save_adapter(model: nn.Module, path: Path, edit: Any = None, **config: Any) -> Path:
    """An adapter by PEFT with small random factors; the model is not changed."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if ".lora_B" in name or ".lora_embedding_B" in name:
                    p.mul_(0.02 if ".lora_B" in name else 0.002)
        if edit is not None:
            edit(adapted)
        adapted.save_pretrained(path)
    return path


Change = Callable[[dict[str, Array], dict[str, Any]], Any]


def edited(source: Path, target: Path, change: Change) -> Path:
    """A copy of an adapter; `change` gets its tensors and its config and changes them."""
    tensors, header = read_tensors(source / WEIGHTS)
    config = json.loads((source / CONFIG).read_text())
    change(tensors, config)
    target.mkdir()
    write_tensors(target / WEIGHTS, tensors, header)
    (target / CONFIG).write_text(json.dumps(config))
    return target


def copied(source: Path, target: Path, change: Callable[[dict[str, Array]], Any]) -> Path:
    """A copy of a base folder; `change` gets its tensors and changes them."""
    tensors, header = read_tensors(source / "model.safetensors")
    change(tensors)
    target.mkdir()
    write_tensors(target / "model.safetensors", tensors, header)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def peft_merge(model: nn.Module, adapter: Path) -> Mapping[str, Array]:
    """What PEFT makes of a pair: the merged model's tensors by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
        state = merged.merge_and_unload().state_dict()
    return {k: np.asarray(v.float().numpy()) for k, v in state.items()}
