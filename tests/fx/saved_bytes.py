"""What a forward keeps for backward, and the trunks that it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH, HEADS, RANK = 128, 4, 4
TOKENS = (2, 48)


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
    """

    model: nn.Module
    inputs: Mapping[str, torch.Tensor]
    targets: tuple[str, ...]


def gpt2(dropout: float = 0.0) -> Trunk:
    """Conv1D with one fused qkv, GELU by its tanh formula."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
        vocab_size=99,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return Trunk(GPT2Model(config), _ids(), ("c_attn", "c_proj", "c_fc"))


def llama() -> Trunk:
    """RMS norms, rotary positions, two heads to a key, SiLU gates."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        intermediate_size=WIDTH * 11 // 4,
        vocab_size=99,
        use_cache=False,
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Trunk(LlamaModel(config), _ids(), names)


def vit() -> Trunk:
    """Layer norms, q, k and v apart, one GELU."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=WIDTH * 4,
        image_size=56,
        patch_size=8,
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    inputs = {"pixel_values": torch.randn(2, 3, 56, 56)}
    return Trunk(ViTModel(config, add_pooling_layer=False), inputs, names)


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 99, TOKENS)}


TRUNKS: Mapping[str, Callable[[], Trunk]] = {"gpt2": gpt2, "llama": llama, "vit": vit}


def with_peft(trunk: Trunk, **options: Any) -> nn.Module:
    """The same model adapted by PEFT, b at random numbers of seed 1."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(trunk.targets))
    made: nn.Module = get_peft_model(copy.deepcopy(trunk.model), config, **options)
    return made.train()
