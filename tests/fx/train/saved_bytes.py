"""What a forward keeps for backward, and the trunks that it is measured on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RANK = 4


@dataclass(frozen=True)
class Size:
    """Of a trunk of two layers: width, heads, rows of a batch, and tokens of a row."""

    width: int = 128
    heads: int = 4
    rows: int = 2
    tokens: int = 49


def saved_bytes(module: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """(bytes that autograd saved, the result): each storage once, parameters and buffers left out.

    Args:
        module: Whose parameters and buffers are not counted.
        run: The forward.
    """
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(s.nbytes() for s in held.values()), result


@dataclass(frozen=True)
class Trunk:
    """Two layers of a known shape.

    Attributes:
        model: Seeded, without dropout.
        inputs: By argument name.
        targets: PEFT's names of the linear layers that lora_fx adapts by default.
        stacks: PEFT's names of the stacked experts, of which it reads W + s·B·A.
    """

    model: nn.Module
    inputs: Mapping[str, torch.Tensor]
    targets: tuple[str, ...]
    stacks: tuple[str, ...] = ()


def gpt2(size: Size) -> Trunk:
    """Conv1D with one fused qkv, GELU by its tanh formula."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=size.width,
        n_layer=2,
        n_head=size.heads,
        n_positions=size.tokens,
        vocab_size=99,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return Trunk(GPT2Model(config), _ids(size), ("c_attn", "c_proj", "c_fc"))


def llama(size: Size) -> Trunk:
    """RMS norms, rotary positions, two heads to a key, SiLU gates."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width,
        num_hidden_layers=2,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        intermediate_size=size.width * 11 // 4,
        vocab_size=99,
        use_cache=False,
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Trunk(LlamaModel(config), _ids(size), names)


def mixtral(size: Size) -> Trunk:
    """Eight stacked experts in the place of each MLP, two of which a token goes to."""
    from transformers import MixtralConfig, MixtralModel

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=size.width,
        num_hidden_layers=2,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        intermediate_size=size.width * 11 // 4,
        num_local_experts=8,
        vocab_size=99,
        use_cache=False,
    )
    stacks = ("experts.gate_up_proj", "experts.down_proj")
    return Trunk(MixtralModel(config), _ids(size), ("q_proj", "k_proj", "v_proj", "o_proj"), stacks)


def vit(size: Size) -> Trunk:
    """Layer norms, q, k and v apart, one GELU."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    side = 8 * math.isqrt(size.tokens)
    config = ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=2,
        num_attention_heads=size.heads,
        intermediate_size=size.width * 4,
        image_size=side,
        patch_size=8,
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    inputs = {"pixel_values": torch.randn(size.rows, 3, side, side)}
    return Trunk(ViTModel(config, add_pooling_layer=False), inputs, names)


def _ids(size: Size) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 99, (size.rows, size.tokens))}


TRUNKS: Mapping[str, Callable[[Size], Trunk]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "vit": vit,
}


def with_peft(trunk: Trunk, rank: int = RANK, **options: Any) -> nn.Module:
    """A copy of the model, adapted by PEFT with its own initial values."""
    from peft import LoraConfig, get_peft_model

    names: dict[str, Any] = {"target_modules": list(trunk.targets)}
    if trunk.stacks:
        names["target_parameters"] = list(trunk.stacks)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **names)
    made: nn.Module = get_peft_model(copy.deepcopy(trunk.model), config, **options)
    return made.train()
